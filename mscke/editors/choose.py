"""What is chosen on validation records: by the mean of the paper's four metrics on generated answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mscke.benchmark.answers import normalise_answer
from mscke.benchmark.sample import EditRecord
from mscke.editors.base import EditedModel
from mscke.training.scope import IN_ROLES, ROLES


def judged(model: EditedModel, records: Sequence[EditRecord]) -> dict[str, float]:
    """Shares of right answers by role, ``specificity``, and ``score``: the mean of Reliability, Generality, Locality and
    Specificity. Each record is asked under its own edit; what must stay is compared with the unedited model's.
    """
    queries = [r.queries[role] for r in records for role in ROLES]
    gold, changes = [r.answers[role] for r in records for role in ROLES], IN_ROLES * len(records)
    among = torch.arange(len(records)).repeat_interleave(len(ROLES))
    answers, before = model.answer(queries, among), model.unedited().answer(queries, among)
    expected = [g if c else b for g, b, c in zip(gold, before, changes, strict=True)]
    pairs = zip(map(normalise_answer, answers), map(normalise_answer, expected), strict=True)
    right = torch.tensor([a == e for a, e in pairs]).float().view(-1, len(ROLES))
    share = dict(zip(ROLES, right.mean(0).tolist(), strict=True))
    specificity = (share["in_scope"] + share["out_of_scope"]) / 2
    score = (share["reliability"] + share["generality"] + share["locality"] + specificity) / 4
    return share | {"specificity": specificity, "score": score}
