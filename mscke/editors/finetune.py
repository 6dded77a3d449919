"""FT-LLM: the language model's last decoder layers are fine-tuned on the edit until it is fitted.

The usual baseline of knowledge editing (Zeng et al., ICCV 2025, Tab. 2; stopping rule of EasyEdit's FT).
Many edits are fitted at once: each has its own copy ΔW of the edited matrices, the losses are summed,
so their gradients stay apart, and Adam works element by element: the same as one edit after another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from mscke.benchmark.sample import EditRecord
from mscke.editors.choose import judged
from mscke.editors.deltas import DeltaModel, Deltas, Dense, Stages, applied, matrices
from mscke.editors.reading import Reading, gradient, read
from mscke.models.decoding import in_batches
from mscke.models.mllm import MLLM


class FineTune:
    """Fits every edit alone, with Adam, until its loss is below ``tolerance`` or for ``steps`` steps.

    ``layers``: how many of the last decoder layers are trained, their MLPs' matrices; ``chunk``: how
    many edits are fitted at once, ``at_once``: of how many the copies are kept (of all, if None; else an edit
    is fitted when it is asked). Both change memory and speed but no result.
    """

    name = "FT-LLM"

    def __init__(
        self,
        base: MLLM,
        layers: int = 1,
        lr: float = 3e-3,
        steps: int = 25,
        tolerance: float = 1e-2,
        chunk: int = 64,
        at_once: int | None = None,
    ):
        self.base, self.layers, self.lr, self.steps = base, layers, lr, steps
        self.tolerance, self.chunk, self.at_once = tolerance, min(chunk, at_once or chunk), at_once
        self.language_model = base.model.language_model
        self.names = matrices(self.language_model, layers)

    def edit(self, records: Sequence[EditRecord]) -> DeltaModel:
        """One model an edit. Keeps copies of the edited matrices (float32): E, or ``at_once``."""
        if self.at_once:
            ask = lambda edits: self._fitted([records[i] for i in edits])  # noqa: E731
            return DeltaModel(self.base, len(records), ask, at_once=self.at_once)
        deltas = self._fitted(records)
        return DeltaModel(self.base, len(records), lambda edits: {n: d[edits] for n, d in deltas.items()})

    def _fitted(self, records: Sequence[EditRecord]) -> Deltas:
        """Fitted updates (E), ``chunk`` at a time."""
        deltas = self._nothing(len(records))
        for part in tqdm(in_batches(len(records), self.chunk), desc=self.name, leave=False):
            self._fit(*self._read(records[part]), {n: d[part] for n, d in deltas.items()})
        return deltas

    def sequence(self, records: Sequence[EditRecord], checkpoints: Sequence[int]) -> Stages:
        """One model for all: edit after edit on the same weights."""
        deltas = self._nothing(1)
        bar = tqdm(total=max(checkpoints), desc=f"{self.name}, sequential", leave=False)
        for start, stop in zip([0, *checkpoints], checkpoints, strict=False):
            for part in in_batches(stop - start, self.chunk):
                read_once = self._read(records[start:stop][part])
                for row in torch.arange(part.stop - part.start).split(1):
                    self._fit(*(each[row] for each in read_once), deltas)
                    bar.update()
            now = {n: Dense(d.weight.clone()) for n, d in deltas.items()}
            yield stop, DeltaModel(self.base, 1, lambda _, now=now: now)
        bar.close()

    def one_by_one(self, record: EditRecord) -> dict[str, Tensor]:
        """ΔW (out, in) by name, fitted the plain way: one edit, torch's Adam, the whole model every step.

        What :meth:`edit` is tested against and timed against.
        """
        before = {n: self.language_model.get_submodule(n).weight for n in self.names}
        weights = {f"{n}.weight": w.float().clone().requires_grad_() for n, w in before.items()}
        optimiser = torch.optim.Adam(weights.values(), self.lr)
        reading, *_ = self._read([record])
        for _ in range(self.steps):
            rounded = {n: w.to(self.language_model.dtype) for n, w in weights.items()}  # as the model computes
            logits = functional_call(self.language_model, rounded, kwargs=reading.inputs).logits
            loss = reading.loss(logits).sum()
            if loss < self.tolerance:
                break
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return {n: weights[f"{n}.weight"].detach() - w.float() for n, w in before.items()}

    def _nothing(self, n: int) -> Deltas:
        shapes = {m: self.language_model.get_submodule(m).weight.shape for m in self.names}
        return {m: Dense(torch.zeros(n, *s, device=self.language_model.device)) for m, s in shapes.items()}

    @torch.no_grad()
    def _read(self, records: Sequence[EditRecord]) -> tuple[Reading, Tensor, Tensor]:
        """The edits as the model reads them; what enters the first edited layer, and its attention's
        output (both B, L, d): nothing below its MLP depends on the update."""
        edits = [r.queries["reliability"] for r in records]
        reading = read(self.base, edits, [r.edit.answer for r in records])
        layer, seen = self.language_model.get_decoder().layers[-self.layers], {}
        with (
            layer.register_forward_pre_hook(lambda _, args: seen.update(states=args[0])),
            layer.self_attn.register_forward_hook(lambda _m, _a, output: seen.update(attended=output[0])),
        ):
            self.language_model(**reading.inputs)
        return reading, seen["states"], seen["attended"]

    def _fit(self, reading: Reading, states: Tensor, attended: Tensor, deltas: Deltas) -> None:
        """Adam on ``deltas`` (B), in place. A fitted edit gets no gradient, and so stands still."""
        copies = {n: list(d.weight) for n, d in deltas.items()}  # the same memory, one parameter an edit
        optimiser = torch.optim.Adam([p for each in copies.values() for p in each], self.lr, fused=True)
        with applied(self.language_model, deltas), self._only_edited(reading, states, attended):
            for _ in range(self.steps):
                losses, gradients = gradient(self.language_model, self.names, reading)
                unfitted = (losses >= self.tolerance).tolist()
                if not any(unfitted):
                    break
                for name, factors in gradients.items():
                    for parameter, g, going in zip(copies[name], factors.dense(), unfitted, strict=True):
                        parameter.grad = g if going else None
                optimiser.step()

    @contextmanager
    def _only_edited(self, reading: Reading, states: Tensor, attended: Tensor) -> Iterator[None]:
        """Within it the model computes what depends on the update, from ``states`` and ``attended`` on.

        A single edited layer is needed only at the positions that predict the answer.
        """
        keep = reading.labels.shape[1] if self.layers == 1 else states.shape[1]
        decoder = self.language_model.get_decoder()
        whole, first = decoder.layers, decoder.layers[-self.layers]
        below = [_Known(states[:, -keep:])] * (len(whole) - self.layers)
        attention = first.self_attn
        decoder.layers = nn.ModuleList([*below, *whole[-self.layers :]])
        first.self_attn = _Known((attended[:, -keep:], None))
        try:
            yield
        finally:
            decoder.layers, first.self_attn = whole, attention


class _Known(nn.Module):
    """Stands for a module whose output is known."""

    def __init__(self, output: Tensor | tuple):
        super().__init__()
        self.output = output

    def forward(self, *_, **__) -> Tensor | tuple:
        return self.output


def choose_rate(
    base: MLLM, validation: Sequence[EditRecord], choices: Sequence[tuple[float, int]], at_once: int | None = None
) -> tuple[dict, pd.DataFrame]:
    """The (rate, steps) of ``choices`` that does best on ``validation`` by :func:`mscke.editors.choose.judged`:
    ({"lr": …, "steps": …}, a row a choice)."""
    rows = [
        {"lr": lr, "steps": steps}
        | judged(FineTune(base, lr=lr, steps=steps, at_once=at_once).edit(validation), validation)
        for lr, steps in choices
    ]
    table = pd.DataFrame(rows)
    best = table.loc[table["score"].idxmax()]
    return {"lr": float(best["lr"]), "steps": int(best["steps"])}, table
