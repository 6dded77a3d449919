"""How like the edited entity others look to CLIP, and what a classifier does about it among many edits.

The similarity is CLIP's own and no classifier's: an entity's vector is the mean of the patches in its cell,
projected into the joint space; :func:`entity_similarity` compares that of the edited entity with the others in its
picture, and with the edited entities of all other records, which share a memory with it. A record's outcome
in that memory is again a lookup (:mod:`mscke.evaluation.outcomes`)::

    likeness = entity_similarity(classifier.encoder, records)
    rho, own, other = routed_among(classifier, records)
    found = answered_among(values, own, other)                             # (R, 6)
    by_similarity(found[:, -1], likeness["memory"])
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from mscke.benchmark.sample import EditRecord
from mscke.benchmark.scenes import GRID
from mscke.classifier import ScopeClassifier
from mscke.evaluation.metrics import ROLES
from mscke.evaluation.outcomes import answered
from mscke.memory import EditMemory
from mscke.models.clip import ClipEncoder
from mscke.training.scope import encode_records


def cell_vectors(encoder: ClipEncoder, paths: Sequence[str]) -> Tensor:
    """What CLIP sees in each cell of the scenes' grid: unit vectors (I, 9, d) in the joint space."""
    rows = encoder.images(paths)
    patches = F.normalize(encoder.images.columns[1][rows] @ encoder.model.visual.proj, dim=-1)
    side = round(patches.shape[1] ** 0.5)
    line = (torch.arange(side) + 0.5).mul(GRID / side).long()  # the row of cells that a patch's middle is in
    cell = (line.unsqueeze(1) * GRID + line).flatten()
    return F.normalize(torch.stack([patches[:, cell == c].mean(1) for c in range(GRID * GRID)], 1), dim=-1)


@torch.inference_mode()
def entity_similarity(encoder: ClipEncoder, records: Sequence[EditRecord]) -> pd.DataFrame:
    """Greatest cosine of each edited entity (R) with another: columns image, memory (float in [−1, 1]).

    ``image``: with the others in its picture. ``memory``: with the edited entities of the other records.
    Raises KeyError for a record that does not say what its scene holds (``meta``).
    """
    cells = cell_vectors(encoder, [r.edit.image for r in records])
    edited = torch.tensor([r.meta["cell"] for r in records])
    own = cells[torch.arange(len(records)), edited]
    there = torch.zeros(len(records), GRID * GRID, dtype=torch.bool)
    for row, record in zip(there, records, strict=True):
        row[[e["cell"] for e in record.meta["scene"]["entities"]]] = True
    there[torch.arange(len(records)), edited] = False
    in_image = (cells @ own.unsqueeze(-1)).squeeze(-1).masked_fill(~there, -1).amax(1)
    in_memory = (own @ own.T).fill_diagonal_(-1).amax(1)
    return pd.DataFrame({"image": in_image.numpy(), "memory": in_memory.numpy()})


@torch.inference_mode()
def routed_among(
    classifier: ScopeClassifier, records: Sequence[EditRecord], threshold: float = 0.5
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ρ (R, 5) of each query with its own edit alone, as :func:`mscke.evaluation.outcomes.own_scores` has it; and
    with all records' edits in one memory, which queries their own edit takes, and which another's: bool (R, 5)."""
    z_edit, z = map(classifier.embed_features, encode_records(classifier, records))
    memory = EditMemory(classifier.dim)
    memory.add([r.edit for r in records], z_edit)
    distance, ids = (found.view(-1, len(ROLES)) for found in memory.nearest(z))
    taken, own = classifier.score(distance) >= threshold, ids == torch.arange(len(records)).unsqueeze(1)
    apart = z_edit.unsqueeze(1) - z.view(len(records), len(ROLES), -1)
    return classifier.score(apart.square().sum(-1)).numpy(), (taken & own).numpy(), (taken & ~own).numpy()


def answered_among(values: np.ndarray, own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """:func:`mscke.evaluation.outcomes.answered` (R, 6) in a memory: what another's edit takes counts as wrong.

    That is a lower bound: by chance another's edit may leave an answer as it should be.
    """
    return answered(np.where(other[..., None], 0.0, values), own)


def by_similarity(value: np.ndarray, similarity: np.ndarray, bins: int = 6) -> list[tuple[float, np.ndarray]]:
    """Values (R,) in ``bins`` groups of equal size along ``similarity`` (R,): pairs (its mean, the values)."""
    groups = np.array_split(np.argsort(similarity, kind="stable"), bins)
    return [(float(np.mean(similarity[group])), value[group]) for group in groups]
