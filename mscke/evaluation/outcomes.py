"""Both answers to every query, so that any scope classifier is scored by a lookup.

A routed method has one bit to say about a query: it is *taken* by the record's own edit, or *left* to the
base model. Both answers are asked for once; the metrics of any classifier, threshold or probe then follow
from its decisions ρ ≥ t without a language model::

    both = outcomes(base, in_scope, records)                        # the only cost
    routed = own_scores(classifier, records) >= 0.5                 # (R, 5)
    both.rows(routed)                                               # as protocol.evaluate gives them
    answered(both.values(), routed).mean(0)                         # (6,), by COLUMNS
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from mscke.benchmark.sample import Edit, EditRecord, Query
from mscke.classifier import ScopeClassifier
from mscke.editors.mscke import RoutedModel, own_edits
from mscke.evaluation.metrics import CHANGES, METRICS, ROLES
from mscke.evaluation.protocol import ask
from mscke.models.mllm import MLLM
from mscke.router import Route
from mscke.training.scope import encode_records

COLUMNS = (*METRICS.values(), "specificity")


@dataclass(frozen=True)
class Outcomes:
    """Rows of every query, record by record: ``left`` to the base model, and ``taken`` by its own edit.

    Columns: record, question, expected, answer, value in [0, 1], metric, protocol.
    """

    left: pd.DataFrame
    taken: pd.DataFrame

    def rows(self, routed: np.ndarray) -> pd.DataFrame:
        """What a method that takes the queries ``routed`` (R, 5) bool answers."""
        take = np.tile(routed.ravel(), self.left["protocol"].nunique())
        return pd.concat([self.left[~take], self.taken[take]]).sort_index()

    def values(self, protocol: str = "generated") -> np.ndarray:
        """How right each query is (R, 5, 2) float in [0, 1]: [record, role, left or taken]."""
        both = [side.loc[side["protocol"] == protocol, "value"] for side in (self.left, self.taken)]
        return np.stack(both, -1).reshape(-1, len(ROLES), 2)


@dataclass(frozen=True)
class _Always:
    """A router that sends every query to the edit it is asked under (``taken``), or none."""

    memory: list[Edit]
    taken: bool

    def route(self, queries: Sequence[Query], among: Tensor) -> Route:
        return Route(among if self.taken else torch.full_like(among, -1), torch.ones(len(queries)))


def outcomes(
    base: MLLM, in_scope, records: Sequence[EditRecord], protocols: Sequence[str] = ("generated",)
) -> Outcomes:
    """Ask all queries both ways. ``in_scope`` answers what is taken, as in :class:`RoutedModel`."""
    left, taken = (ask_all(base, who, records, protocols) for who in (None, in_scope))
    return Outcomes(left, taken)


def ask_all(base: MLLM, in_scope, records: Sequence[EditRecord], protocols: Sequence[str]) -> pd.DataFrame:
    """One side of :class:`Outcomes`: every query taken by its own edit, or left if ``in_scope`` is None."""
    model = RoutedModel(base, in_scope, _Always([r.edit for r in records], in_scope is not None))
    among = own_edits(len(records), len(ROLES))
    return ask(model, base, records, among, protocols)


def answered(values: np.ndarray, routed: np.ndarray) -> np.ndarray:
    """Each record's metrics (R, 6), by :data:`COLUMNS`: of ``values`` (R, 5, 2) and ``routed`` (R, 5) bool."""
    found = np.where(routed, values[..., 1], values[..., 0])
    fine = [ROLES.index("in_scope"), ROLES.index("out_of_scope")]
    return np.concatenate([found, found[:, fine].mean(1, keepdims=True)], 1)


@torch.inference_mode()
def own_scores(
    classifier: ScopeClassifier, records: Sequence[EditRecord], asked: Sequence[EditRecord] | None = None
) -> np.ndarray:
    """ρ (R, 5) of every record's queries against its own edit; ``asked`` gives the queries, if not they."""
    edits, (_, queries) = encode_records(classifier, records)[0], encode_records(classifier, asked or records)
    z = classifier.embed_features(queries).unflatten(0, (len(records), len(ROLES)))
    z_edit = classifier.embed_features(edits).unsqueeze(1)
    return classifier.score((z_edit - z).square().sum(-1)).numpy()


def with_images(records: Sequence[EditRecord], image: Mapping[str, str]) -> list[EditRecord]:
    """The records with each image replaced by ``image[path]``, in the edit and in every visual query."""
    visual = ("rephrase", "in_scope", "out_of_scope")
    swap = lambda part: replace(part, image=image[part.image])  # noqa: E731
    return [replace(r, edit=swap(r.edit), **{name: swap(getattr(r, name)) for name in visual}) for r in records]


def vision_probes(records: Sequence[EditRecord], blank: Path) -> dict[str, list[EditRecord]]:
    """The records as a classifier sees them whose image is a grey one (written to ``blank``), or another's."""
    images = list(dict.fromkeys(r.edit.image for r in records))
    with Image.open(images[0]) as first:
        grey = Image.new("RGB", first.size, (128, 128, 128))
    blank.parent.mkdir(parents=True, exist_ok=True)
    grey.save(blank)
    other = dict(zip(images, images[1:] + images[:1], strict=True))
    swaps = {"blank_image": dict.fromkeys(images, str(blank)), "other_image": other}
    return {name: with_images(records, swap) for name, swap in swaps.items()}


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
