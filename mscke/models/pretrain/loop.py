"""One training loop for every pretraining stage: resumable, logged as CSV, the same bytes a seed."""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm


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
) -> None:
    """Minimise ``step(rng, progress)["loss"]`` over the parameters of ``modules`` that require a gradient.

    Every ``every`` steps the curve (``folder/name.csv``) gains a row and a checkpoint
    (``folder/name.pt``) is replaced; a stage that was interrupted goes on from there with the same
    random numbers. Each step draws from a generator of its own, seeded by (seed, step).
    """
    folder.mkdir(parents=True, exist_ok=True)
    parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad] + list(extra)
    decay = [p for p in parameters if p.ndim >= 2]
    plain = [p for p in parameters if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    checkpoint, curve = folder / f"{name}.pt", folder / f"{name}.csv"
    first, spent, rows = 0, 0.0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for key, module in modules.items():
            module.load_state_dict(state["modules"][key])
        optimiser.load_state_dict(state["optimiser"])
        first, spent, rows = state["step"], state["seconds"], state["rows"]
    bar = tqdm(range(first, steps), desc=name, initial=first, total=steps, mininterval=5)
    start, sums, count = time.perf_counter(), {}, 0
    for i in bar:
        factor = one_cycle(i, steps)
        for group in optimiser.param_groups:
            group["lr"] = lr * factor
        losses = step(np.random.default_rng([seed, i]), i / steps)
        optimiser.zero_grad(set_to_none=True)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
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
                "optimiser": optimiser.state_dict(), "step": i + 1,
                "seconds": spent + time.perf_counter() - start, "rows": rows,
            })  # fmt: skip
            sums, count = {}, 0


def finished(name: str, folder: Path, steps: int) -> bool:
    """Has the stage run to its end?"""
    path = folder / f"{name}.csv"
    if not path.exists():
        return False
    with path.open() as file:
        return any(int(row["step"]) >= steps for row in csv.DictReader(file))


def _write_csv(path: Path, rows: list[dict]) -> None:
    fields = list(dict.fromkeys(key for row in rows for key in row))
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def _save(path: Path, state: dict) -> None:
    temporary = path.with_suffix(".tmp-pt")
    torch.save(state, temporary)
    os.replace(temporary, path)
