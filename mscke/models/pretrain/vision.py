"""Vision first, alone: every patch learns to name what lies under it, before any text is read.

One dense stage serves three towers: BLIP-2-mini's ViT and those of the two mini CLIPs.
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
    render,
    sample_scene_of,
)  # fmt: skip
from mscke.models.mllm import MEAN, STD
from mscke.models.pretrain.loop import train


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


def pretrain_vision(
    tower: nn.Module,
    patch_tokens: Callable[[Tensor], Tensor],
    width: int,
    patch: int,
    name: str,
    steps: int,
    folder: Path,
    seed: int = 0,
    batch: int = 64,
) -> None:
    """Train ``tower`` with two linear heads on its patch tokens; the heads are thrown away."""
    heads = nn.ModuleList([nn.Linear(width, 1 + len(KNOWN)), nn.Linear(width, 1 + len(CARDS))])
    weights = [torch.tensor([0.1] + [1.0] * (head.out_features - 1)) for head in heads]

    def step(rng: np.random.Generator, progress: float) -> dict[str, Tensor]:
        scenes = [sample_scene_of(rng, PRETRAINING_FOLDS) for _ in range(batch)]
        tokens = patch_tokens(pixels(scenes))
        losses = [
            F.cross_entropy(head(tokens).flatten(0, 1), target.flatten(), weight)
            for head, target, weight in zip(heads, labels(scenes, patch), weights, strict=True)
        ]
        return {"loss": sum(losses), "kind": losses[0], "card": losses[1]}

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        rng = np.random.default_rng([seed, 99])
        scenes = [sample_scene_of(rng, HELD_OUT_FOLD) for _ in range(256)]
        tokens, targets = patch_tokens(pixels(scenes)), labels(scenes, patch)
        found = targets[0] > 0
        hits = [
            (h(tokens).argmax(-1) == t)[found].float().mean() for h, t in zip(heads, targets, strict=True)
        ]
        return {"kind_accuracy": float(hits[0]), "card_accuracy": float(hits[1])}

    train(
        name, {"tower": tower, "heads": heads}, step, steps, 1e-3, folder, seed, evaluate, weight_decay=0.02
    )
