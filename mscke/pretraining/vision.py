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
from mscke.models.mllm import MEAN, STD
from mscke.pretraining.loop import train


def pixels(scenes: list[Scene]) -> Tensor:
    """Rendered and normalised images, float32 (B, 3, 96, 96)."""
    images = torch.from_numpy(np.stack([render(s) for s in scenes])).permute(0, 3, 1, 2).float() / 255
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def cells_of_patches(patch: int) -> np.ndarray:
    """Which grid cell each patch's centre lies in, row by row: (patches,)."""
    centres = (np.arange(IMAGE_SIZE // patch) + 0.5) * patch // (IMAGE_SIZE / GRID)
    return (centres[:, None] * GRID + centres[None]).astype(int).ravel()


def labels(scenes: list[Scene], patch: int) -> tuple[Tensor, Tensor]:
    """(kind, card) class of every patch, two long (B, patches); class 0 is background."""
    kinds, cards = np.zeros((2, len(scenes), GRID * GRID), np.int64)
    colours = tuple(CARDS)
    for i, scene in enumerate(scenes):
        for e in scene.entities:
            kinds[i, e.cell], cards[i, e.cell] = 1 + KNOWN.index(e.kind), 1 + colours.index(e.card)
    where = cells_of_patches(patch)
    return torch.from_numpy(kinds[:, where]), torch.from_numpy(cards[:, where])


def surroundings(scenes: list[Scene], patch: int) -> Tensor:
    """What an entity's patches should know of where they are: long (5, B, patches).

    First the cell (0–8), then the kind just left, right, above and below the patch's entity (class 0:
    nothing there, or a background patch).
    """
    around = np.zeros((5, len(scenes), GRID * GRID), np.int64)
    around[0] = np.arange(GRID * GRID)
    for i, scene in enumerate(scenes):
        kinds = {e.cell: 1 + KNOWN.index(e.kind) for e in scene.entities}
        for cell in kinds:
            for j, direction in enumerate(("left of", "right of", "above", "below"), 1):
                around[j, i, cell] = kinds.get(neighbours(cell).get(direction, -1), 0)
    return torch.from_numpy(around[:, :, cells_of_patches(patch)])


class DenseHeads(nn.Module):
    """Linear heads that ask every patch what it is part of; thrown away after pretraining.

    The kind and the card of its entity, its cell, and the kinds next to it: without the last two, a
    tower forgets where its patches are, and nothing can be looked up by place.
    """

    def __init__(self, width: int, patch: int):
        super().__init__()
        n_kinds, n_cards = 1 + len(KNOWN), 1 + len(CARDS)
        classes = (n_kinds, n_cards, GRID * GRID, *4 * (n_kinds,))
        self.patch = patch
        self.heads = nn.ModuleList([nn.Linear(width, n) for n in classes])
        self.weights = [None if n == GRID * GRID else torch.tensor([0.1] + [1.0] * (n - 1)) for n in classes]

    def targets(self, scenes: list[Scene]) -> tuple[Tensor, ...]:
        return (*labels(scenes, self.patch), *surroundings(scenes, self.patch))

    def forward(self, tokens: Tensor, scenes: list[Scene]) -> dict[str, Tensor]:
        """Losses of patch tokens (B, P, width): kind, card, cell, around, and their sum."""
        losses = [
            F.cross_entropy(head(tokens).flatten(0, 1), target.flatten(), weight)
            for head, target, weight in zip(self.heads, self.targets(scenes), self.weights, strict=True)
        ]
        kind, card, cell, around = *losses[:3], sum(losses[3:]) / 4
        return {"loss": kind + card + cell + around, "kind": kind, "card": card, "cell": cell, "around": around}

    @torch.no_grad()
    def accuracy(self, tokens: Tensor, scenes: list[Scene]) -> dict[str, float]:
        """On the patches of entities (``left``: of those with something to their left)."""
        targets, right = self.targets(scenes), {}
        for what, head, target in zip(("kind", "card", "cell", "left"), self.heads, targets, strict=False):
            chosen = target > 0 if what == "left" else targets[0] > 0
            right[f"{what}_accuracy"] = float((head(tokens).argmax(-1) == target)[chosen].float().mean())
        return right


def pretrain_vision(
    tower: nn.Module,
    patch_tokens: Callable[[Tensor], Tensor],
    heads: DenseHeads,
    name: str,
    steps: int,
    folder: Path,
    seed: int = 0,
    batch: int = 64,
) -> None:
    """Train ``tower`` to name what lies under each of its patches."""

    def step(rng: np.random.Generator, progress: float) -> dict[str, Tensor]:
        scenes = [sample_scene_of(rng, PRETRAINING_FOLDS) for _ in range(batch)]
        return heads(patch_tokens(pixels(scenes)), scenes)

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        rng = np.random.default_rng([seed, 99])
        scenes = [sample_scene_of(rng, HELD_OUT_FOLD) for _ in range(256)]
        return heads.accuracy(patch_tokens(pixels(scenes)), scenes)

    modules = {"tower": tower, "heads": heads.heads}
    train(name, modules, step, steps, 1e-3, folder, seed, evaluate, weight_decay=0.02)
