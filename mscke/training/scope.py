"""Training of the scope classifier and of the counterfactual model; resumable, logged, seeded."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from mscke.benchmark.answers import normalise_answer
from mscke.benchmark.sample import EditRecord, Query
from mscke.classifier import ScopeClassifier
from mscke.models.clip import Features
from mscke.models.counterfactual import CounterfactualModel
from mscke.models.decoding import in_batches
from mscke.models.mllm import MLLM
from mscke.models.names import fingerprint
from mscke.system.files import code_of
from mscke.training.fit import fit

ROLES = ("reliability", "generality", "in_scope", "out_of_scope", "locality")
IN_ROLES = (True, True, True, False, False)
# weight of each role in the loss: the two fine-grained ones count twice, so that they decide where ρ = 0.5 lies
FINE_GRAINED = (0.25, 0.25, 0.5, 0.8, 0.2)
AS_RELEASED = (0.5, 0.5, 0.0, 0.0, 1.0)  # SERAC's: the edit and its rephrasing against unrelated text

# what a training does is named by these and by its model's module
HERE = ("mscke.training.scope", "mscke.training.fit")
Share = Callable[[Sequence[EditRecord], slice], Tensor]  # what a part of some records adds to their loss


def encode_records(classifier: ScopeClassifier, records: Sequence[EditRecord]) -> tuple[Features, Features]:
    """Frozen features of the edits (R) and of their queries (5 R, record by record)."""
    return _encode(classifier.encoder, tuple(records))


@functools.lru_cache(maxsize=8)  # classifiers on one encoder, trained or scored in turn, share them
@torch.inference_mode(False)  # who asks first may only score; who asks next may train
def _encode(encoder: Callable[..., Features], records: tuple[EditRecord, ...]) -> tuple[Features, Features]:
    prompts = [Query(r.edit.prompt, r.edit.image) for r in records]
    edits = encoder(prompts, [r.edit.answer for r in records])
    return edits, encoder([r.queries[role] for r in records for role in ROLES])


def scope_loss(
    classifier: ScopeClassifier,
    edits: Features,
    queries: Features,
    weights: Sequence[float],
    others: float,
    part: slice = slice(None),
) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy of in- and out-of-scope queries (§3): (loss, logits of own queries (P, 5)).

    Of R records; ``queries`` are those of the ``part`` of P records, and the loss is what they add to the
    whole's: every part is held against all edits, which cost little, and needs no other part's queries.

    ``others`` weighs the visual queries against *other* records' edits in the batch, which are all out of
    scope: what keeps edits apart when many share one memory. Of them the nearest counts, for in a
    memory the nearest decides; their mean would hardly feel the few look-alikes.
    """
    z_edit, z_query = classifier(edits).float(), classifier(queries).float()
    n, mine = len(z_edit), len(z_query) // 5
    # a distance is a small difference of large numbers: in full precision
    with torch.autocast(z_edit.device.type, enabled=False):
        own = z_edit[part].unsqueeze(1) - z_query.unflatten(0, (mine, 5))
        own = classifier.logit(own.square().sum(-1))  # (P, 5)
        target = torch.tensor(IN_ROLES, dtype=own.dtype, device=own.device).expand_as(own)
        per_role = F.binary_cross_entropy_with_logits(own, target, reduction="none").mean(0)
        loss = (per_role * per_role.new_tensor(weights)).sum()
        if others and n > 1:
            asked = z_query.unflatten(0, (mine, 5))[:, :4].flatten(0, 1)  # (4 P, d), visual ones
            squared = z_edit.square().sum(-1, keepdim=True) + asked.square().sum(-1) - 2 * z_edit @ asked.T
            strangers = classifier.logit(squared.clamp(min=0)).unflatten(1, (mine, 4))  # (R, P, 4)
            itself = torch.eye(n, dtype=torch.bool, device=own.device)[:, part].unsqueeze(-1)
            strangers = strangers.masked_fill(itself, -torch.inf)
            loss = loss + others * F.softplus(strangers.amax(0)).mean()
    return loss * (mine / n), own


def train_classifier(
    classifier: ScopeClassifier,
    train: Sequence[EditRecord],
    validation: Sequence[EditRecord],
    folder: Path,
    epochs: int = 4,
    lr: float = 1.5e-3,
    batch_size: int = 128,
    seed: int = 0,
    weights: Sequence[float] = FINE_GRAINED,
    others: float = 1.0,
    **options,
) -> pd.DataFrame:
    """Train in place on frozen features; returns the curve (one row an epoch).

    ``folder`` receives the curve, the weights, and a checkpoint from which an interrupted or repeated call
    goes on; ValueError if another run made it. ``options`` are :func:`mscke.training.fit.fit`'s.
    """

    @functools.cache
    def encoded(held: bool) -> tuple[Features, Features]:  # when first needed: a finished run is only read
        return encode_records(classifier, validation if held else train)

    def loss(batch: Tensor, part: slice) -> Tensor:
        edits, queries = encoded(held=False)
        own = (batch[part].unsqueeze(1) * 5 + torch.arange(5)).flatten()
        return scope_loss(classifier, edits.select(batch), queries.select(own), weights, others, part)[0]

    @torch.inference_mode()
    def evaluate() -> dict[str, float]:
        value, logits = scope_loss(classifier, *encoded(held=True), weights, others=0.0)
        right = ((logits.cpu() >= 0) == torch.tensor(IN_ROLES)).float().mean(0)
        return {"validation_loss": float(value)} | {f"right_{r}": float(v) for r, v in zip(ROLES, right, strict=True)}

    made_of = {
        "records": digest(train), "frozen": fingerprint(classifier.encoder.model),
        "weights": list(weights), "others": others, "code": code_of("mscke.classifier", "mscke.models.attention", *HERE),
    }  # fmt: skip
    run = (len(train), folder, epochs, lr, batch_size, seed, made_of)
    return fit(classifier, loss, evaluate, *run, **options)


def train_counterfactual(
    model: CounterfactualModel,
    train: Sequence[EditRecord],
    validation: Sequence[EditRecord],
    folder: Path,
    epochs: int = 4,
    lr: float = 1.5e-3,
    batch_size: int = 64,
    seed: int = 0,
    roles: Sequence[str] = ROLES[:3],
    **options,
) -> pd.DataFrame:
    """Train f_cfr on the questions of each record in these ``roles``: edit prompt, rephrasing, in-scope question.

    Returns the curve, resumes as :func:`mscke.training.fit.fit` says; ``options`` are its.
    """
    asked = ROLES[:3]

    def examples(records: Sequence[EditRecord], some: Sequence[str]):
        rows = [(r.queries[role], r.edit, r.answers[role]) for r in records for role in some]
        return map(list, zip(*rows, strict=True))

    def share(records: Sequence[EditRecord], part: slice) -> Tensor:  # the loss is a mean over tokens
        of_part = tokens(model.base, records[part], roles) / tokens(model.base, records, roles)
        return model.loss(*examples(records[part], roles)) * of_part

    @torch.inference_mode()
    def evaluate() -> dict[str, float]:
        queries, edits, answers = examples(validation, asked)
        pairs = zip(model.answer(queries, edits), answers, strict=True)
        same = [normalise_answer(a) == normalise_answer(b) for a, b in pairs]
        right = torch.tensor(same).float().view(-1, len(asked))
        return {f"right_{r}": float(v) for r, v in zip(asked, right.mean(0), strict=True)}

    code = code_of("mscke.models.counterfactual", *HERE)
    frozen = fingerprint(model.base.model)
    made_of = {"records": digest(train), "frozen": frozen, "asked": list(roles), "code": code}
    run = (len(train), folder, epochs, lr, batch_size, seed, made_of)
    held = functools.partial(held_loss, share, validation, batch_size)
    return fit(model, of_rows(share, train), evaluate, *run, held, **options)


def tokens(base: MLLM, records: Sequence[EditRecord], roles: Sequence[str]) -> int:
    """How many tokens the records' answers in these roles have, their ends included."""
    return sum(len(base.encoder.answer(r.answers[role])) for r in records for role in roles)


def of_rows(share: Share, records: Sequence[EditRecord]) -> Callable[[Tensor, slice], Tensor]:
    """The loss as :func:`mscke.training.fit.fit` asks for it, by the rows of ``records``."""
    return lambda batch, part: share([records[i] for i in batch.tolist()], part)


@torch.inference_mode()
def held_loss(share: Share, records: Sequence[EditRecord], batch_size: int) -> float:
    """The loss of held-out records, batch by batch: what early stopping watches."""
    return sum(float(share(records, part)) for part in in_batches(len(records), batch_size))


def digest(records: Sequence[EditRecord]) -> str:
    """Sixteen hex digits that name the records' texts and images, wherever these lie."""
    return _digest(tuple(records))


@functools.lru_cache(maxsize=16)  # many runs are made of the same records
def _digest(records: tuple[EditRecord, ...]) -> str:
    texts = [
        (os.path.basename(r.edit.image), r.edit.answer, [q.question for q in r.queries.values()], r.answers)
        for r in records
    ]
    return hashlib.sha256(repr(texts).encode()).hexdigest()[:16]
