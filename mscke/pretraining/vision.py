"""Vision first, alone: every patch learns to name what lies under it, before any text is read.

One dense stage serves four towers: BLIP-2-mini's ViT and those of the three mini CLIPs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mscke.benchmark.questions import OPPOSITE
from mscke.benchmark.scenes import (
    CARDS,
    GRID,
    HELD_OUT_FOLD,
    IMAGE_SIZE,
    KNOWN,
    PRETRAINING_FOLDS,
    Scene,
    neighbours,
    render,
    sample_scene_of,
)
from mscke.models.mllm import normalise
from mscke.pretraining.loop import train


def draw(rng: np.random.Generator, n: int, folds: frozenset[int] = PRETRAINING_FOLDS) -> list[Scene]:
    """So many random scenes, to train on or of other ``folds``."""
    return [sample_scene_of(rng, folds) for _ in range(n)]


def pixels(scenes: list[Scene]) -> Tensor:
    """Rendered and normalised images, float32 (B, 3, 96, 96)."""
    return normalise([render(s) for s in scenes])


def cells_of_patches(patch: int) -> np.ndarray:
    """Which grid cell each patch's centre lies in, row by row: (patches,)."""
    centres = (np.arange(IMAGE_SIZE // patch) + 0.5) * patch // (IMAGE_SIZE / GRID)
    return (centres[:, None] * GRID + centres[None]).astype(int).ravel()


def labels(scenes: list[Scene], patch: int) -> Tensor:
    """What every patch should know of its entity: long (7, B, patches).

    Its kind, its card, its cell (0–8), and the kinds just left, right, above and below of it. Class 0 of a kind or a
    card is background, or nothing there.
    """
    found = np.zeros((7, len(scenes), GRID * GRID), np.int64)
    found[2] = np.arange(GRID * GRID)
    for i, scene in enumerate(scenes):
        kinds = {e.cell: 1 + KNOWN.index(e.kind) for e in scene.entities}
        for e in scene.entities:
            beside = neighbours(e.cell)
            found[:2, i, e.cell] = kinds[e.cell], 1 + tuple(CARDS).index(e.card)
            found[3:, i, e.cell] = [kinds.get(beside.get(way), 0) for way in OPPOSITE]
    return torch.from_numpy(found[:, :, cells_of_patches(patch)])


class DenseHeads(nn.Module):
    """Linear heads that ask every patch what it is part of; thrown away after pretraining.

    Without cells and neighbours a tower forgets where its patches are, and nothing can be looked up by place.
    """

    def __init__(self, width: int, patch: int):
        super().__init__()
        n_kinds, n_cards = 1 + len(KNOWN), 1 + len(CARDS)
        classes = (n_kinds, n_cards, GRID * GRID, *4 * (n_kinds,))
        self.patch = patch
        self.heads = nn.ModuleList([nn.Linear(width, n) for n in classes])
        self.weights = [None if n == GRID * GRID else torch.tensor([0.1] + [1.0] * (n - 1)) for n in classes]

    def forward(self, tokens: Tensor, scenes: list[Scene]) -> dict[str, Tensor]:
        """Losses of patch tokens (B, P, width): kind, card, cell, around, and their sum."""
        losses = [
            F.cross_entropy(head(tokens).flatten(0, 1), target.flatten(), weight)
            for head, target, weight in zip(self.heads, labels(scenes, self.patch), self.weights, strict=True)
        ]
        kind, card, cell, around = *losses[:3], sum(losses[3:]) / 4
        return {"loss": kind + card + cell + around, "kind": kind, "card": card, "cell": cell, "around": around}

    @torch.no_grad()
    def accuracy(self, tokens: Tensor, scenes: list[Scene]) -> dict[str, float]:
        """On the patches of entities (``left``: of those with something to their left)."""
        targets, right = labels(scenes, self.patch), {}
        for what, head, target in zip(("kind", "card", "cell", "left"), self.heads, targets, strict=False):
            chosen = target > 0 if what == "left" else targets[0] > 0
            right[f"{what}_accuracy"] = float((head(tokens).argmax(-1) == target)[chosen].float().mean())
        return right


def pretrain_vision(
    tower: nn.Module, patch_tokens: Callable[[Tensor], Tensor], heads: DenseHeads, name: str, steps: int, folder: Path,
    seed: int = 0,
) -> None:  # fmt: skip
    """Train ``tower`` to name what lies under each of its patches."""

    def step(rng: np.random.Generator, progress: float) -> dict[str, Tensor]:
        scenes = draw(rng, 64)
        return heads(patch_tokens(pixels(scenes)), scenes)

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        scenes = draw(np.random.default_rng([seed, 99]), 256, HELD_OUT_FOLD)
        return heads.accuracy(patch_tokens(pixels(scenes)), scenes)

    modules = {"tower": tower, "heads": heads.heads}
    train(name, modules, step, steps, 1e-3, folder, seed, evaluate, weight_decay=0.02)
