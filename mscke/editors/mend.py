"""MEND (Mitchell et al., ICLR 2022): a learned network turns an edit's gradient into a weight update.

The gradient of the edit's loss by a weight matrix is a sum of rank-one terms δ_t u_tᵀ. An editor network
maps each pair (u_t, δ_t) to another; the update is −α Σ_t δ̃_t ũ_tᵀ. Untrained, it is one gradient step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from tqdm import tqdm

from mscke.benchmark.sample import Edit, EditRecord, Query
from mscke.editors.deltas import DeltaModel, Deltas, Dense, LowRank, Stages, applied, gradient, matrices, read
from mscke.fit import fit
from mscke.models.features import fingerprint
from mscke.models.mllm import MLLM, Forced, normalise_answer
from mscke.training import IN_ROLES, ROLES, digest, held_loss, of_rows, tokens

TRAINED = ("reliability", "in_scope", "out_of_scope", "locality")  # of a record's queries, those that train
MEASURED = 256  # train edits, at most, whose gradients give the pairs' mean and standard deviation


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

    def __init__(self, base: MLLM, networks: MendNetworks):
        self.base, self.networks = base, networks

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
        return DeltaModel(self.base, len(edits), lambda rows: self.deltas([edits[i] for i in rows]), half)

    def _each(self, edits: Sequence[Edit]) -> tuple[DeltaModel, Tensor]:
        """A model of the edits without their repetitions, and each one's place (B) among them."""
        place = {edit: i for i, edit in enumerate(dict.fromkeys(edits))}
        return self._under(list(place)), torch.tensor([place[edit] for edit in edits])


def mend_loss(mend: MEND, records: Sequence[EditRecord], c_edit: float = 1.0, c_loc: float = 1.0) -> Tensor:
    """c_edit × cross-entropy where the answer must change + c_loc × KL(before ‖ after) where it must not.

    Both are means over the answers' tokens, and over records and roles (MEND, §3.2): the edit and the in-scope
    question must change, the out-of-scope and the text-only one must not. The rephrasing is left to be inferred.
    """
    language_model = mend.base.model.language_model
    queries = [r.queries[role] for role in TRAINED for r in records]
    reading = read(mend.base, queries, [r.answers[role] for role in TRAINED for r in records])
    updates = mend.networks(mend.gradients([r.edit for r in records]))
    rows, changed = torch.arange(len(records)).repeat(len(TRAINED)), 2 * len(records)
    with applied(language_model, {n: u[rows] for n, u in updates.items()}):
        after = language_model(**reading.inputs).logits
    kept = reading[changed:]
    with torch.no_grad():
        before = language_model(**kept.inputs).logits
    where = kept.labels >= 0
    p, q = (logits[where].float().log_softmax(-1) for logits in (before, after[changed:]))
    edited = reading[:changed].loss(after[:changed]).mean()
    return c_edit * edited + c_loc * F.kl_div(q, p, log_target=True, reduction="batchmean")


def train_mend(
    mend: MEND,
    train: Sequence[EditRecord],
    validation: Sequence[EditRecord],
    folder: Path,
    epochs: int = 2,
    lr: float = 2e-3,
    batch_size: int = 24,
    seed: int = 0,
    c_edit: float = 1.0,
    c_loc: float = 1.0,
    **options,
) -> pd.DataFrame:
    """Train MEND's networks in place; returns the curve, resumes as :func:`mscke.fit.fit` says."""
    measured = min(MEASURED, mend.base.batch_size // 2)  # all in one batch
    mend.networks.measure(mend.gradients([r.edit for r in train[:measured]]))

    def share(records: Sequence[EditRecord], part: slice) -> Tensor:  # means over records, and over tokens
        some, kept = records[part], ROLES[3:]
        of_tokens = tokens(mend.base, some, kept) / tokens(mend.base, records, kept)
        return mend_loss(mend, some, c_edit * (len(some) / len(records)), c_loc * of_tokens)

    def evaluate() -> dict[str, float]:
        rows = [(r.queries[role], r.edit, r.answers[role]) for r in validation for role in ROLES]
        queries, edits, gold = map(list, zip(*rows, strict=True))
        rows = zip(mend.answer(queries, edits), gold, mend.base.answer(queries), strict=True)
        same = torch.tensor([(a == normalise_answer(g), a == b) for a, g, b in rows]).float()
        right = torch.where(torch.tensor(IN_ROLES), *same.view(-1, len(ROLES), 2).mean(0).unbind(-1))
        return {f"right_{r}": float(v) for r, v in zip(ROLES, right, strict=True)}

    frozen = fingerprint(mend.base.model)
    made_of = {"records": digest(train), "frozen": frozen, "c_edit": c_edit, "c_loc": c_loc}
    run = (folder, epochs, lr, batch_size, seed, made_of, partial(held_loss, share, validation, batch_size))
    return fit(mend.networks, of_rows(share, train), evaluate, len(train), *run, **options)
