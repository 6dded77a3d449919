"""MEND (Mitchell et al., ICLR 2022): a learned network turns an edit's gradient into a weight update.

The gradient of the edit's loss by a weight matrix is a sum of rank-one terms δ_t u_tᵀ. An editor network
maps each pair (u_t, δ_t) to another; the update is −α Σ_t δ̃_t ũ_tᵀ. Untrained, it is one gradient step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from tqdm import tqdm

from mscke.benchmark.sample import Edit, EditRecord, Query
from mscke.editors.deltas import DeltaModel, Deltas, Dense, LowRank, Stages, applied, matrices
from mscke.editors.reading import gradient, read
from mscke.models.decoding import Forced
from mscke.models.mllm import MLLM


class EditorNetwork(nn.Module):
    """For the ``modes`` matrices (out, in) of one shape: z + U relu(s_ℓ ⊙ V z + o_ℓ), z = [u; δ] normalised.

    Scale s_ℓ, offset o_ℓ, rate α_ℓ and the pairs' mean and deviation are a matrix's own; U starts at 0.
    """

    def __init__(self, shape: tuple[int, int], modes: int, rank: int, rate: float):
        super().__init__()
        width = sum(shape)
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.up.weight)
        self.scale = nn.Parameter(torch.ones(modes, rank))
        self.offset = nn.Parameter(torch.zeros(modes, rank))
        self.log_rate = nn.Parameter(torch.full((modes,), rate).log())
        self.register_buffer("mean", torch.zeros(modes, width))
        self.register_buffer("std", torch.ones(modes, width))

    @torch.no_grad()
    def measure(self, gradient: LowRank, mode: int) -> None:
        """Take mean and deviation from these pairs."""
        pairs = torch.cat([gradient.right, gradient.left], -1)[gradient.left.any(-1)]
        self.mean[mode], self.std[mode] = pairs.mean(0), pairs.std(0).clamp(min=1e-8)

    def forward(self, gradient: LowRank, mode: int) -> LowRank:
        """The update, in factors, from the gradient's; a position without gradient gives none."""
        z = (torch.cat([gradient.right, gradient.left], -1) - self.mean[mode]) / self.std[mode]
        z = z + self.up(F.relu(self.scale[mode] * self.down(z) + self.offset[mode]))
        pairs = z * self.std[mode] + self.mean[mode]
        right, left = pairs.split([gradient.right.shape[-1], gradient.left.shape[-1]], -1)
        return LowRank(-self.log_rate[mode].exp() * left * gradient.left.any(-1, keepdim=True), right)


class MendNetworks(nn.Module, PyTorchModelHubMixin):
    """What MEND learns: an editor network for each weight shape.

    ``shapes``: [out, in] by the matrix's name. Use :meth:`beside` to make fresh ones for a base model.
    """

    def __init__(self, shapes: dict[str, list[int]], rank: int = 128, rate: float = 0.7):
        super().__init__()
        alike: dict[str, list[str]] = {}
        for name, shape in shapes.items():
            alike.setdefault("x".join(map(str, shape)), []).append(name)
        self.place = {n: (key, mode) for key, names in alike.items() for mode, n in enumerate(names)}
        networks = {k: EditorNetwork(shapes[names[0]], len(names), rank, rate) for k, names in alike.items()}
        self.networks = nn.ModuleDict(networks)

    @classmethod
    def beside(cls, base: MLLM, layers: int = 3, **kwargs) -> MendNetworks:
        """Untrained networks for the MLP matrices of ``base``'s last ``layers`` decoder layers."""
        language_model = base.model.language_model
        names = matrices(language_model, layers)
        return cls({n: list(language_model.get_submodule(n).weight.shape) for n in names}, **kwargs)

    def rates(self) -> dict[str, float]:
        """The updates' rates α by the matrix's name."""
        return {n: self.networks[shape].log_rate[mode].exp().item() for n, (shape, mode) in self.place.items()}

    def measure(self, gradients: Deltas) -> None:
        """Normalise pairs by those of ``gradients`` from now on: the base model is frozen, so once is enough."""
        for name, (shape, mode) in self.place.items():
            self.networks[shape].measure(gradients[name], mode)

    def forward(self, gradients: Deltas) -> Deltas:
        """Updates ΔW of E edits from their gradients, both in factors by the matrix's name."""
        return {n: self.networks[shape](gradients[n], mode) for n, (shape, mode) in self.place.items()}


class MEND:
    """Edits the MLP matrices of the last decoder layers: one backward pass for a batch of edits.

    It also answers in scope in MSCKE-MEND: :meth:`answer` and :meth:`force` take an edit for each
    query, as :class:`mscke.models.counterfactual.CounterfactualModel`'s do.
    """

    name = "MEND"

    def __init__(self, base: MLLM, networks: MendNetworks, off: bool = False):
        self.base, self.networks, self.off = base, networks, off

    def gradients(self, edits: Sequence[Edit]) -> Deltas:
        """The gradients of the edits' losses, in factors."""
        reading = read(self.base, [Query(e.prompt, e.image) for e in edits], [e.answer for e in edits])
        return gradient(self.base.model.language_model, list(self.networks.place), reading)[1]

    @torch.no_grad()
    def deltas(self, edits: Sequence[Edit]) -> Deltas:
        """The edits' updates, in factors."""
        return self.networks(self.gradients(edits))

    def edit(self, records: Sequence[EditRecord]) -> DeltaModel:
        """One model an edit. Updates are computed when it is asked: there may be any number of edits."""
        return self._under([r.edit for r in records])

    def answer(self, queries: Sequence[Query], edits: Sequence[Edit]) -> list[str]:
        """Greedy answers to (B) queries, each under its own edit."""
        model, among = self._each(edits)
        return model.answer(queries, among)

    def force(self, queries: Sequence[Query], edits: Sequence[Edit], answers: Sequence[str]) -> list[Forced]:
        """Teacher-forced predictions of (B) gold answers, each under its own edit."""
        model, among = self._each(edits)
        return model.force(queries, answers, among)

    def unedited(self) -> MEND:
        """The same without its updates: the base model, asked in the same batches."""
        return MEND(self.base, self.networks, off=True)

    def sequence(self, records: Sequence[EditRecord], checkpoints: Sequence[int]) -> Stages:
        """One model for all: each edit's gradient is taken at the weights that the edits before it left."""
        language_model = self.base.model.language_model
        shapes = {n: language_model.get_submodule(n).weight.shape for n in self.networks.place}
        now = {n: Dense(torch.zeros(1, *s, device=language_model.device)) for n, s in shapes.items()}
        for done, record in enumerate(tqdm(records[: max(checkpoints)], desc=self.name, leave=False), 1):
            with applied(language_model, now):
                updates = self.deltas([record.edit])
            now = {n: Dense(w.weight + updates[n].dense()) for n, w in now.items()}
            if done in checkpoints:
                yield done, DeltaModel(self.base, 1, lambda _, now=now: now)

    def _under(self, edits: Sequence[Edit]) -> DeltaModel:
        half = max(1, self.base.batch_size // 2)  # an update's factors are as long as the edit
        model = DeltaModel(self.base, len(edits), lambda rows: self.deltas([edits[i] for i in rows]), half)
        return model.unedited() if self.off else model

    def _each(self, edits: Sequence[Edit]) -> tuple[DeltaModel, Tensor]:
        """A model of the edits without their repetitions, and each one's place (B) among them."""
        place = {edit: i for i, edit in enumerate(dict.fromkeys(edits))}
        return self._under(list(place)), torch.tensor([place[edit] for edit in edits])
