"""Edits that change nothing: the control of every metric that says "unchanged", which must then read 100.

There is one for each way of editing: weights, a learned update, the context, and a router to either side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mscke.benchmark.sample import EditRecord
from mscke.classifier import ScopeClassifier
from mscke.editors.base import Editor
from mscke.editors.finetune import FineTune
from mscke.editors.ike import InContextModel
from mscke.editors.mend import MEND, MendNetworks
from mscke.editors.mscke import MSCKE, own_edits
from mscke.models.mllm import MLLM

NEVER, ALWAYS = 2.0, 0.0  # thresholds that no score ρ reaches, and that each does


@dataclass(frozen=True)
class NullContext:
    """An in-context edit that tells nothing."""

    base: MLLM
    name: str = "context"

    def edit(self, records: Sequence[EditRecord]) -> InContextModel:
        return InContextModel(self.base, [""] * len(records), lambda queries: own_edits(len(queries), 1) * 0)


def null_edits(base: MLLM, classifier: ScopeClassifier, at_once: int | None = None) -> list[Editor]:
    """An editor that changes nothing for each way of editing ``base``; ``at_once`` is FT-LLM's.

    ``classifier`` scores what the routed ones then overrule: one sends every query to an update of nothing, one
    sends none.
    """
    weights, context = FineTune(base, steps=0, at_once=at_once), NullContext(base)
    update = MEND(base, MendNetworks.beside(base, rank=1, rate=0.0).to(base.model.device))
    weights.name, update.name = "weights", "learned update"
    routed = [
        MSCKE(base, update, classifier, "all routed", ALWAYS),
        MSCKE(base, update, classifier, "none routed", NEVER),
    ]
    return [weights, update, context, *routed]
