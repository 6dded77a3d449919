"""The decision rule (§3): k* = argmax ρ over the memory; ρ ≥ 0.5 → counterfactual, else base.

ρ falls as the distance grows, so the edit of the highest ρ is the nearest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mscke.benchmark.sample import Query
from mscke.memory import EditMemory


@dataclass(frozen=True)
class Route:
    """Where queries go.

    ``edit_id`` (B,) long: the edit that answers each query, −1 for none. ``rho`` (B,) float in [0, 1]: the score of the
    best edit, whether it is taken or not; 0 with an empty memory.
    """

    edit_id: Tensor
    rho: Tensor

    @property
    def in_scope(self) -> Tensor:
        return self.edit_id >= 0


class ScopeRouter:
    """Sends each query to an edit in memory or to none. Every edited model decides by this rule.

    Raises ValueError if the memory says that another classifier wrote it.
    """

    def __init__(self, classifier, memory: EditMemory, threshold: float = 0.5):
        if memory.fingerprint and memory.fingerprint != (mine := classifier.fingerprint()):
            raise ValueError(
                f"the memory was written by classifier {memory.fingerprint}, not {mine}: embed its edits again "
                "with memory.embed_again(classifier, path)"
            )
        self.classifier, self.memory, self.threshold = classifier, memory, threshold

    def route(self, queries: Sequence[Query], among: Tensor | None = None) -> Route:
        """Route (B) queries against the whole memory.

        ``among`` (B,) long names one edit for each query, as if the memory held that edit alone. That is the paper's
        protocol, for many records in one batch.
        """
        if len(self.memory) == 0:
            return Route(torch.full((len(queries),), -1), torch.zeros(len(queries)))
        embeddings = self.classifier.embed(queries)
        if among is not None:
            distance, best = self.memory.distances(embeddings, among), among
        else:
            distances, ids = self.memory.nearest(embeddings, 1)
            distance, best = distances[:, 0], ids[:, 0]
        rho = self.classifier.score(distance)
        return Route(torch.where(rho >= self.threshold, best, -1), rho)
