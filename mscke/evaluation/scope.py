"""How a scope classifier scores each record's own queries, apart from any answer."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch

from mscke.benchmark.sample import EditRecord, Query
from mscke.classifier import ScopeClassifier
from mscke.evaluation.metrics import CHANGES, ROLES


def scope_scores(classifier: ScopeClassifier, records: Sequence[EditRecord]) -> pd.DataFrame:
    """ρ of every record's five queries against the record's own edit.

    Columns: record, role, rho in (0, 1), in_scope (what is true), right (is ρ ≥ 0.5 on its side?).
    """
    edits = classifier.embed([Query(r.edit.prompt, r.edit.image) for r in records], [r.edit.answer for r in records])
    queries = classifier.embed([r.queries[role] for r in records for role in ROLES])
    distance = (edits.repeat_interleave(len(ROLES), 0) - queries).square().sum(-1)
    frame = pd.DataFrame({
        "record": torch.tensor([r.id for r in records]).repeat_interleave(len(ROLES)).numpy(),
        "role": list(ROLES) * len(records),
        "rho": classifier.score(distance).numpy(),
    })  # fmt: skip
    frame["in_scope"] = frame["role"].isin(CHANGES)
    frame["right"] = (frame["rho"] >= 0.5) == frame["in_scope"]
    return frame
