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
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from mscke.benchmark.sample import EditRecord, Query
from mscke.classifier import ScopeClassifier
from mscke.models.clip import Features
from mscke.models.counterfactual import CounterfactualModel
from mscke.models.features import fingerprint
from mscke.models.mllm import normalise_answer

ROLES = ("reliability", "generality", "in_scope", "out_of_scope", "locality")
IN_ROLES = (True, True, True, False, False)
# weight of each role in the loss: the two fine-grained ones count twice, so that they decide where ρ = 0.5 lies
FINE_GRAINED = (0.25, 0.25, 0.5, 0.8, 0.2)
AS_RELEASED = (0.5, 0.5, 0.0, 0.0, 1.0)  # SERAC's: the edit and its rephrasing against unrelated text


def encode_records(classifier: ScopeClassifier, records: Sequence[EditRecord]) -> tuple[Features, Features]:
    """Frozen features of the edits (R) and of their queries (5 R, record by record)."""
    return _encode(classifier.encoder, tuple(records))


@functools.lru_cache(maxsize=4)  # classifiers on one encoder, trained or scored in turn, share them
@torch.inference_mode(False)  # who asks first may only score; who asks next may train
def _encode(encoder: Callable[..., Features], records: tuple[EditRecord, ...]) -> tuple[Features, Features]:
    prompts = [Query(r.edit.prompt, r.edit.image) for r in records]
    edits = encoder(prompts, [r.edit.answer for r in records])
    return edits, encoder([r.queries[role] for r in records for role in ROLES])


def scope_loss(
    classifier: ScopeClassifier, edits: Features, queries: Features, weights: Sequence[float], others: float
) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy of in- and out-of-scope queries (§3): (loss, logits of own queries (R, 5)).

    ``others`` weighs the visual queries against *other* records' edits in the batch, which are all out of
    scope: what keeps edits apart when many share one memory. Of them the nearest counts, for in a
    memory the nearest decides; their mean would hardly feel the few look-alikes.
    """
    z_edit, z_query = classifier(edits), classifier(queries)
    n = len(z_edit)
    own = classifier.logit((z_edit.unsqueeze(1) - z_query.unflatten(0, (n, 5))).square().sum(-1))  # (R, 5)
    target = torch.tensor(IN_ROLES, dtype=own.dtype).expand_as(own)
    per_role = F.binary_cross_entropy_with_logits(own, target, reduction="none").mean(0)
    loss = (per_role * torch.tensor(weights)).sum()
    if others and n > 1:
        asked = z_query.unflatten(0, (n, 5))[:, :4].flatten(0, 1)  # (4 R, d), visual ones
        squared = z_edit.square().sum(-1, keepdim=True) + asked.square().sum(-1) - 2 * z_edit @ asked.T
        strangers = classifier.logit(squared.clamp(min=0)).unflatten(1, (n, 4))  # (R, R, 4)
        strangers = strangers.masked_fill(torch.eye(n, dtype=torch.bool).unsqueeze(-1), -torch.inf)
        loss = loss + others * F.softplus(strangers.amax(0)).mean()
    return loss, own


def train_classifier(
    classifier: ScopeClassifier,
    train: Sequence[EditRecord],
    validation: Sequence[EditRecord],
    folder: Path,
    epochs: int = 20,
    lr: float = 1e-3,
    batch_size: int = 128,
    seed: int = 0,
    weights: Sequence[float] = FINE_GRAINED,
    others: float = 1.0,
) -> pd.DataFrame:
    """Train in place on frozen features; returns the curve (one row an epoch).

    The last epoch is kept: nothing is selected. ``folder`` receives the curve, the weights, and a
    checkpoint from which an interrupted or repeated call goes on; ValueError if another run made it.
    """

    @functools.cache
    def encoded(held: bool) -> tuple[Features, Features]:  # when first needed: a finished run is only read
        return encode_records(classifier, validation if held else train)

    def loss(rows: Tensor) -> Tensor:
        edits, queries = encoded(held=False)
        own = (rows.unsqueeze(1) * 5 + torch.arange(5)).flatten()
        return scope_loss(classifier, edits.select(rows), queries.select(own), weights, others)[0]

    @torch.inference_mode()
    def evaluate() -> dict[str, float]:
        value, logits = scope_loss(classifier, *encoded(held=True), weights, others=0.0)
        right = ((logits >= 0) == torch.tensor(IN_ROLES)).float().mean(0)
        return {"validation_loss": float(value)} | {
            f"right_{r}": float(v) for r, v in zip(ROLES, right, strict=True)
        }

    made_of = {
        "records": digest(train), "frozen": fingerprint(classifier.encoder.model),
        "weights": list(weights), "others": others,
    }  # fmt: skip
    return fit(classifier, loss, evaluate, len(train), folder, epochs, lr, batch_size, seed, made_of)


def train_counterfactual(
    model: CounterfactualModel,
    train: Sequence[EditRecord],
    validation: Sequence[EditRecord],
    folder: Path,
    epochs: int = 4,
    lr: float = 1.5e-3,
    batch_size: int = 64,
    seed: int = 0,
) -> pd.DataFrame:
    """Train f_cfr on the edit prompt, its rephrasing and the in-scope question of each record."""
    roles = ROLES[:3]

    def examples(records: Sequence[EditRecord]):
        rows = [(r.queries[role], r.edit, r.answers[role]) for r in records for role in roles]
        return map(list, zip(*rows, strict=True))

    def loss(rows: Tensor) -> Tensor:
        return model.loss(*examples([train[i] for i in rows.tolist()]))

    @torch.inference_mode()
    def evaluate() -> dict[str, float]:
        queries, edits, answers = examples(validation)
        pairs = zip(model.answer(queries, edits), answers, strict=True)
        right = torch.tensor([a == normalise_answer(b) for a, b in pairs])
        return {f"right_{r}": float(v) for r, v in zip(roles, right.float().view(-1, 3).mean(0), strict=True)}

    made_of = {"records": digest(train), "frozen": model.base.eyes()}
    return fit(model, loss, evaluate, len(train), folder, epochs, lr, batch_size, seed, made_of)


def fit(
    model: nn.Module,
    loss: Callable[[Tensor], Tensor],
    evaluate: Callable[[], dict[str, float]],
    n: int,
    folder: Path,
    epochs: int,
    lr: float,
    batch_size: int,
    seed: int,
    made_of: dict,
) -> pd.DataFrame:
    """AdamW with one cosine cycle over (epochs × batches), a checkpoint every epoch.

    The checkpoint is all that a run needs to go on, replaced in one piece; weights and curve beside it
    are for others to read. ``made_of`` and the arguments after ``folder`` tell one run from another.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, rows = folder / "checkpoint.pt", []
    made_of = made_of | {"epochs": epochs, "lr": lr, "batch_size": batch_size, "seed": seed}
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    batches = -(-n // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, epochs * batches, pct_start=0.1)
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if other := [k for k, v in made_of.items() if saved["made_of"].get(k) != v]:
            raise ValueError(f"{folder} holds a run with other {', '.join(other)}: delete it to train anew")
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        schedule.load_state_dict(saved["schedule"])
        rows = saved["rows"]
        _publish(model, rows, folder)
    if len(rows) == epochs:
        model.eval()
        return pd.DataFrame(rows)
    bar = tqdm(total=epochs * batches, initial=len(rows) * batches, desc=folder.name, mininterval=2)
    for epoch in range(len(rows), epochs):
        model.train()
        with torch.random.fork_rng():  # dropout repeats, and the caller's random numbers are left alone
            torch.manual_seed(1000 * seed + epoch)
            total = 0.0
            for part in torch.randperm(n).split(batch_size):
                value = loss(part)
                optimiser.zero_grad(set_to_none=True)
                value.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimiser.step()
                schedule.step()
                total += value.item() * len(part)
                bar.update()
        model.eval()
        rows.append({"epoch": epoch + 1, "loss": total / n} | evaluate())
        bar.set_postfix({k: round(v, 3) for k, v in rows[-1].items()})
        state = {
            "made_of": made_of, "rows": rows, "model": model.state_dict(),
            "optimiser": optimiser.state_dict(), "schedule": schedule.state_dict(),
        }  # fmt: skip
        write_whole(checkpoint, lambda p, state=state: torch.save(state, p))
        _publish(model, rows, folder)
    bar.close()
    return pd.DataFrame(rows)


def _publish(model: nn.Module, rows: list[dict], folder: Path) -> None:
    """Write weights and curve for others to read."""
    state = {k: v.clone() for k, v in model.state_dict().items()}  # tied ones too: safetensors shares nothing
    write_whole(folder / "model.safetensors", lambda p: save_file(state, p))
    write_whole(folder / "curve.csv", lambda p: pd.DataFrame(rows).to_csv(p, index=False))


def digest(records: Sequence[EditRecord]) -> str:
    """Sixteen hex digits that name the records' texts and images, wherever these lie."""
    texts = [
        (Path(r.edit.image).name, r.edit.answer, [q.question for q in r.queries.values()], r.answers)
        for r in records
    ]
    return hashlib.sha256(repr(texts).encode()).hexdigest()[:16]


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """``write`` to a temporary file that then takes ``path``'s place: nothing is ever half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)
