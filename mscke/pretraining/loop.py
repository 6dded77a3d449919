"""One training loop for every pretraining stage: resumable, logged as CSV, the same bytes a seed.

It counts steps and draws fresh scenes for each; :func:`mscke.training.fit.fit` counts epochs over fixed records.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mscke.system.files import replacing

EVERY = 50  # steps, after which the curve gains a row


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
    seed: int,
    evaluate: Callable[[], dict[str, float]],
    weight_decay: float = 0.01,
    muon: float = 0.0,
) -> None:
    """Minimise ``step(rng, progress)["loss"]`` over the parameters of ``modules`` that require a gradient.

    Every :data:`EVERY` steps the curve (``folder/name.csv``) gains a row and a checkpoint
    (``folder/name.pt``) is replaced; a stage that was interrupted goes on from there with the same
    random numbers. Each step draws from a generator of its own, seeded by (seed, step).

    AdamW at ``lr``; with ``muon`` > 0 the hidden layers' matrices take Muon's orthogonalised steps at
    that rate instead (Jordan et al., 2024; the scaling that matches AdamW's update size is Liu et al.'s,
    arXiv 2502.16982).
    """
    model = nn.ModuleDict(modules)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimisers = make_optimisers(model, lr, muon, weight_decay)
    rates = [group["lr"] for optimiser in optimisers for group in optimiser.param_groups]
    checkpoint, curve = folder / f"{name}.pt", folder / f"{name}.csv"
    first, spent, rows = 0, 0.0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for key, module in modules.items():
            module.load_state_dict(state["modules"][key])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        first, spent, rows = state["step"], state["seconds"], state["rows"]
    groups = [group for optimiser in optimisers for group in optimiser.param_groups]
    bar = tqdm(range(first, steps), desc=name, initial=first, total=steps, mininterval=5)
    start, sums, logged = time.perf_counter(), Counter(), first
    for i in bar:
        factor = one_cycle(i, steps)
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * factor
        losses = step(np.random.default_rng([seed, i]), i / steps)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        sums.update({key: float(value.detach()) for key, value in losses.items()})
        if (i + 1) % EVERY and i + 1 < steps:
            continue
        seconds = spent + time.perf_counter() - start
        row = {"step": i + 1, "seconds": round(seconds, 1)}
        row |= {key: round(value / (i + 1 - logged), 4) for key, value in sums.items()}
        model.eval()
        row |= {key: round(value, 4) for key, value in evaluate().items()}
        model.train()
        rows.append(row)
        sums, logged = Counter(), i + 1
        bar.set_postfix({k: v for k, v in row.items() if k not in ("step", "seconds")})
        with replacing(curve) as whole:
            pd.DataFrame(rows).to_csv(whole, index=False, na_rep="nan")
        with replacing(checkpoint) as whole:
            state = {"modules": {k: m.state_dict() for k, m in modules.items()}, "step": i + 1, "seconds": seconds}
            torch.save(state | {"optimisers": [o.state_dict() for o in optimisers], "rows": rows}, whole)


def make_optimisers(model: nn.Module, lr: float, muon: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """AdamW, without decay on vectors; and Muon, if it has a rate, for the matrices inside transformer layers."""
    hidden, matrices, vectors = [], [], []
    for name, p in model.named_parameters():
        if p.requires_grad and p.ndim < 2:
            vectors.append(p)
        elif p.requires_grad and muon and p.ndim == 2 and re.search(r"\.layers?\.\d+\.", name):
            hidden.append(p)
        elif p.requires_grad:
            matrices.append(p)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    if not hidden:
        return [adamw]
    return [adamw, torch.optim.Muon(hidden, lr=muon, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")]
