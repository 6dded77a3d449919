"""MSCKE (Zeng et al., ICCV 2025, §3): memory, multimodal scope classifier, counterfactual model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mscke.benchmark.sample import EditRecord, Query
from mscke.editors.base import InScope
from mscke.memory import EditMemory
from mscke.models.decoding import Forced
from mscke.models.mllm import MLLM
from mscke.router import Route, ScopeRouter


class RoutedModel:
    """The base model behind a router: in scope the counterfactual answers, else the base model."""

    chunk = None

    def __init__(self, base: MLLM, in_scope: InScope | None, router: ScopeRouter):
        self.base, self.in_scope, self.router = base, in_scope, router

    def answer(self, queries: Sequence[Query], among: Tensor | None = None) -> list[str]:
        route = self.router.route(queries, among)
        return self._dispatch(route, queries, lambda m, q, e: m.answer(q, *e))

    def force(self, queries: Sequence[Query], answers: Sequence[str], among: Tensor | None = None) -> list[Forced]:
        route = self.router.route(queries, among)
        pairs = list(zip(queries, answers, strict=True))
        return self._dispatch(route, pairs, lambda m, p, e: m.force([q for q, _ in p], *e, [a for _, a in p]))

    def unedited(self) -> RoutedModel:
        """The base model, by the same routes: what is left to it is asked in the batches of :meth:`answer`."""
        return RoutedModel(self.base, self.in_scope and self.in_scope.unedited(), self.router)

    def _dispatch(self, route: Route, items: Sequence, ask: Callable) -> list:
        """Ask each item of the model its route names; keep the order."""
        inside = route.in_scope.nonzero().flatten().tolist()
        outside = (~route.in_scope).nonzero().flatten().tolist()
        edits = [self.router.memory[int(route.edit_id[i])] for i in inside]
        results = [None] * len(items)
        for rows, model, extra in ((inside, self.in_scope, [edits]), (outside, self.base, [])):
            if rows:
                found = ask(model, [items[i] for i in rows], extra)
                for i, result in zip(rows, found, strict=True):
                    results[i] = result
        return results


class MSCKE:
    """Keeps edits in a memory and never touches the base model's parameters.

    ``classifier`` scores scope (:class:`mscke.classifier.ScopeClassifier`; SERAC passes a text-only
    one), ``in_scope`` answers what is in scope.
    """

    def __init__(self, base: MLLM, in_scope: InScope, classifier, name="MSCKE", threshold=0.5):
        self.base, self.in_scope, self.classifier = base, in_scope, classifier
        self.name, self.threshold = name, threshold

    def edit(self, records: Sequence[EditRecord]) -> RoutedModel:
        """Write the records' edits into a fresh memory; edit k gets id k. Of one fact the last edit answers, but
        where a query is asked ``among`` one edit alone.

        Raises :class:`mscke.models.prompts.TooLong` for an edit that the classifier's CLIP would cut.
        """
        edits = [r.edit for r in records]
        memory = EditMemory.of(self.classifier)
        if edits:
            prompts = [Query(e.prompt, e.image) for e in edits]
            memory.add(edits, self.classifier.embed(prompts, [e.answer for e in edits]))
        return RoutedModel(self.base, self.in_scope, ScopeRouter(self.classifier, memory, self.threshold))


def own_edits(n: int, queries_each: int) -> Tensor:
    """``among`` for n records' queries, record by record: 0 0 0 … 1 1 1 …"""
    return torch.arange(n).repeat_interleave(queries_each)
