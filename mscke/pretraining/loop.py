"""One training loop for every pretraining stage: resumable, logged as CSV, the same bytes a seed."""

from __future__ import annotations

import csv
import math
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mscke.system.files import replacing


def one_cycle(step: int, steps: int, warmup: int = 100) -> float:
    """Learning-rate factor: linear warm-up, then cosine to 5 %."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


def train(
    name: str,
    modules: dict[str, nn.Module],
    step: Callable[[np.random.Generator, float], dict[str, Tensor]],
    steps: int,
    lr: float,
    folder: Path,
    seed: int = 0,
    evaluate: Callable[[], dict[str, float]] | None = None,
    every: int = 50,
    weight_decay: float = 0.01,
    extra: Iterable[nn.Parameter] = (),
    muon: float = 0.0,
) -> None:
    """Minimise ``step(rng, progress)["loss"]`` over the parameters of ``modules`` that require a gradient.

    Every ``every`` steps the curve (``folder/name.csv``) gains a row and a checkpoint
    (``folder/name.pt``) is replaced; a stage that was interrupted goes on from there with the same
    random numbers. Each step draws from a generator of its own, seeded by (seed, step).

    AdamW at ``lr``; with ``muon`` > 0 the hidden layers' matrices take Muon's orthogonalised steps at
    that rate instead (Jordan et al., 2024; the scaling that matches AdamW's update size is Liu et al.'s,
    arXiv 2502.16982).
    """
    folder.mkdir(parents=True, exist_ok=True)
    parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad] + list(extra)
    optimisers = make_optimisers(parameters, _hidden(modules) if muon else set(), lr, muon, weight_decay)
    rates = [group["lr"] for o in optimisers for group in o.param_groups]
    checkpoint, curve = folder / f"{name}.pt", folder / f"{name}.csv"
    first, spent, rows = 0, 0.0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for key, module in modules.items():
            module.load_state_dict(state["modules"][key])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        first, spent, rows = state["step"], state["seconds"], state["rows"]
    bar = tqdm(range(first, steps), desc=name, initial=first, total=steps, mininterval=5)
    start, sums, count = time.perf_counter(), {}, 0
    for i in bar:
        factor = one_cycle(i, steps)
        for group, rate in zip((g for o in optimisers for g in o.param_groups), rates, strict=True):
            group["lr"] = rate * factor
        losses = step(np.random.default_rng([seed, i]), i / steps)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        for key, value in losses.items():
            sums[key] = sums.get(key, 0.0) + float(value.detach())
        count += 1
        if (i + 1) % every == 0 or i + 1 == steps:
            row = {"step": i + 1, "seconds": round(spent + time.perf_counter() - start, 1)}
            row |= {key: round(value / count, 4) for key, value in sums.items()}
            if evaluate is not None:
                for module in modules.values():
                    module.eval()
                row |= {key: round(value, 4) for key, value in evaluate().items()}
                for module in modules.values():
                    module.train()
            rows.append(row)
            bar.set_postfix({k: v for k, v in row.items() if k not in ("step", "seconds")})
            _write_csv(curve, rows)
            _save(checkpoint, {
                "modules": {k: m.state_dict() for k, m in modules.items()},
                "optimisers": [o.state_dict() for o in optimisers], "step": i + 1,
                "seconds": spent + time.perf_counter() - start, "rows": rows,
            })  # fmt: skip
            sums, count = {}, 0


def _hidden(modules: dict[str, nn.Module]) -> set[int]:
    """Ids of the matrices inside transformer layers: what Muon is for (not embeddings, not the head)."""
    named = (item for m in modules.values() for item in m.named_parameters())
    return {id(p) for name, p in named if re.search(r"\.layers?\.\d+\.", name) and p.ndim == 2}


def make_optimisers(
    parameters: list[nn.Parameter], hidden: set[int], lr: float, muon: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """AdamW over everything but ``hidden``, Muon over that; no decay on vectors."""
    rest = [p for p in parameters if id(p) not in hidden]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    matrices = [p for p in parameters if id(p) in hidden]
    if not matrices:
        return [adamw]
    return [adamw, torch.optim.Muon(
        matrices, lr=muon, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
    )]  # fmt: skip


def _write_csv(path: Path, rows: list[dict]) -> None:
    fields = list(dict.fromkeys(key for row in rows for key in row))
    with replacing(path) as whole, whole.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _save(path: Path, state: dict) -> None:
    with replacing(path) as whole:
        torch.save(state, whole)
