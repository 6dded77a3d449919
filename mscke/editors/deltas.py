"""Edits as updates ΔW of linear layers, every row of a batch under its own; the model is never copied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mscke.benchmark.sample import Query
from mscke.models.decoding import Forced, generate, teacher_force
from mscke.models.mllm import MLLM

ASKED = 3  # questions of a record at once, at most: those that its edit must change


@dataclass(frozen=True)
class Dense:
    """Updates ``weight`` (E, out, in), one an edit. Called with x (E, L, in): ΔW x, (E, L, out)."""

    weight: Tensor

    def __len__(self) -> int:
        return len(self.weight)

    def __getitem__(self, rows: Tensor) -> Dense:
        return Dense(self.weight[rows])

    def __call__(self, x: Tensor) -> Tensor:
        return x.to(self.weight) @ self.weight.mT


@dataclass(frozen=True)
class LowRank:
    """Updates Σ_t left_t right_tᵀ, one an edit: ``left`` (E, T, out), ``right`` (E, T, in)."""

    left: Tensor
    right: Tensor

    def __len__(self) -> int:
        return len(self.left)

    def __getitem__(self, rows: Tensor) -> LowRank:
        return LowRank(self.left[rows], self.right[rows])

    def __call__(self, x: Tensor) -> Tensor:
        return (x.to(self.right) @ self.right.mT) @ self.left

    def dense(self) -> Tensor:
        """The updates (E, out, in) themselves."""
        return self.left.mT @ self.right


Deltas = dict[str, Dense | LowRank]  # by the name of the nn.Linear within the language model


def matrices(language_model: nn.Module, layers: int) -> list[str]:
    """Names of the linear maps of the MLPs in the last ``layers`` decoder layers."""
    last = {m for layer in language_model.get_decoder().layers[-layers:] for m in layer.modules()}
    linear = [n for n, m in language_model.named_modules() if isinstance(m, nn.Linear) and m in last]
    return [n for n in linear if "attn" not in n]


@contextmanager
def applied(language_model: nn.Module, deltas: Deltas) -> Iterator[None]:
    """Within it every batch's rows run under the edits of ``deltas``: B rows under E edits, B / E under each in turn."""

    def adds(delta: Dense | LowRank) -> Callable:
        def hook(_: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            x = args[0].reshape(len(delta), -1, args[0].shape[-1])  # OPT's MLP folds batch and length
            return output + delta(x).reshape(output.shape).to(output.dtype)

        return hook

    with ExitStack() as stack:
        for name, delta in deltas.items():
            stack.enter_context(language_model.get_submodule(name).register_forward_hook(adds(delta)))
        yield


class DeltaModel:
    """The base model under E edits (:class:`mscke.editors.base.EditedModel`).

    ``deltas`` gives the updates of some edits, long (U,); it is asked batch by batch (the base model's
    size, unless given), so that those of many edits need not exist at once: of ``at_once`` at most, if told. The
    last ones are kept, so that another question about the same edits computes none. A single edit is in force for
    every query.
    """

    def __init__(
        self,
        base: MLLM,
        n: int,
        deltas: Callable[[Tensor], Deltas],
        batch_size: int | None = None,
        at_once: int | None = None,
    ):
        self.base, self.n, self.deltas = base, n, deltas
        self.batch_size, self.at_once = batch_size or base.batch_size, at_once
        self.chunk = at_once or max(1, self.batch_size // ASKED)
        self._last: tuple[Tensor, Deltas] | None = None

    def answer(self, queries: Sequence[Query], among: Tensor | None = None) -> list[str]:
        return self._ask(generate, among, queries)

    def force(self, queries: Sequence[Query], answers: Sequence[str], among: Tensor | None = None) -> list[Forced]:
        ids = [self.base.encoder.answer(a, eos=False) for a in answers]
        return self._ask(teacher_force, among, queries, ids)

    def unedited(self) -> DeltaModel:
        """The base model, asked in the same batches."""
        return DeltaModel(self.base, self.n, lambda edits: {}, self.batch_size, self.at_once)

    def _ask(self, ask: Callable, among: Tensor | None, queries: Sequence[Query], *extra: list) -> list:
        """``ask`` the language model batch by batch; ValueError if it is unclear which edit is in force."""
        if among is None and self.n != 1:
            raise ValueError(f"{self.n} edits make {self.n} models: say with `among` which one each query is for")
        among = torch.zeros(len(queries), dtype=torch.long) if among is None else among
        language_model, results = self.base.model.language_model, []
        run = len(among) // max(1, len(among.unique()))  # queries of an edit: a batch ends with an edit's last
        size = self.batch_size // max(1, run) * run or self.batch_size  # or within it, if they are too many
        for part in self._parts(among, size):
            edits, rows = among[part].unique(return_inverse=True)
            deltas, found = self._of(edits), {}
            for some in apart(queries[part]):
                asked, mine = [queries[part][i] for i in some], rows[some]
                own = deltas if in_turn(mine, len(edits)) else {n: d[mine] for n, d in deltas.items()}
                inputs = self.base.prompts(asked), *([e[part][i] for i in some] for e in extra)
                with applied(language_model, own):
                    answers = ask(language_model, self.base.encoder, *inputs, self.base.see(asked))
                found |= zip(some, answers, strict=True)
            results += [found[i] for i in range(len(found))]
        return results

    def _of(self, edits: Tensor) -> Deltas:
        """The updates of these edits, unless they are those of the last batch."""
        if self._last is None or not torch.equal(self._last[0], edits):
            self._last = None  # before others take their memory
            self._last = edits, self.deltas(edits)
        return self._last[1]

    def _parts(self, among: Tensor, size: int) -> Iterator[slice]:
        """Batches of ``size`` queries, or of fewer where these would be of more edits than there may be at once."""
        start, seen = 0, set()
        for i, edit in enumerate(among.tolist()):
            if i - start == size or (edit not in seen and len(seen) == self.at_once):
                yield slice(start, i)
                start, seen = i, set()
            seen.add(edit)
        if seen:
            yield slice(start, len(among))


def apart(queries: Sequence[Query]) -> list[list[int]]:
    """Places of the queries with an image, and of those without: together the short ones would be padded."""
    found = [[i for i, q in enumerate(queries) if (q.image is None) == text] for text in (False, True)]
    return [some for some in found if some]


def in_turn(rows: Tensor, n: int) -> bool:
    """Whether ``rows`` (B,) are 0 0 … 1 1 … n−1, equally often: then no update need be copied for its queries."""
    return len(rows) % n == 0 and torch.equal(rows, torch.arange(n).repeat_interleave(len(rows) // n))


Stages = Iterator[tuple[int, DeltaModel]]  # sequential edits: (N, the model after N of them), N ascending
