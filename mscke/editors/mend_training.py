"""Training of MEND's networks (Mitchell et al., ICLR 2022, §3.2): the edit's loss after it, and what it must not move."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from mscke.benchmark.answers import normalise_answer
from mscke.benchmark.sample import EditRecord
from mscke.editors.deltas import applied
from mscke.editors.mend import MEND
from mscke.editors.reading import Reading, read
from mscke.models.names import fingerprint
from mscke.system.files import code_of
from mscke.training.fit import fit
from mscke.training.scope import IN_ROLES, ROLES, digest, held_loss, of_rows, tokens

VISUAL, TEXT = ("reliability", "in_scope", "out_of_scope"), ("locality",)  # a record's questions that train
CHANGED = VISUAL[:2]  # of these, those whose answer the edit changes
MEASURED = 128  # train edits, at most, whose gradients give the pairs' mean and standard deviation


def mend_loss(mend: MEND, records: Sequence[EditRecord], c_edit: float = 1.0, c_loc: float = 1.0) -> Tensor:
    """c_edit × cross-entropy where the answer must change + c_loc × KL(before ‖ after) where it must not.

    Both are means over the answers' tokens, and over records and roles (MEND, §3.2): the edit and the in-scope
    question must change, the out-of-scope and the text-only one must not. The rephrasing is left to be inferred.
    """
    language_model = mend.base.model.language_model

    def ask(roles: Sequence[str]) -> Reading:
        rows = [(r.queries[role], r.answers[role]) for r in records for role in roles]
        return read(mend.base, *zip(*rows, strict=True))

    seen, told = ask(VISUAL), ask(TEXT)  # apart: text alone is short
    with applied(language_model, mend.networks(mend.gradients([r.edit for r in records]))):
        after_seen, after_told = (language_model(**reading.inputs).logits for reading in (seen, told))
    changes = torch.tensor([role in CHANGED for role in VISUAL] * len(records))
    pairs = []
    for reading, after in ((seen[~changes], after_seen[~changes]), (told, after_told)):
        with torch.no_grad():
            before = language_model(**reading.inputs).logits
        pairs.append([logits[reading.labels >= 0].float().log_softmax(-1) for logits in (before, after)])
    p, q = map(torch.cat, zip(*pairs, strict=True))
    edited = seen[changes].loss(after_seen[changes]).mean()
    return c_edit * edited + c_loc * F.kl_div(q, p, log_target=True, reduction="batchmean")


def train_mend(
    mend: MEND,
    train: Sequence[EditRecord],
    validation: Sequence[EditRecord],
    folder: Path,
    epochs: int = 1,
    lr: float = 2e-3,
    batch_size: int = 12,
    seed: int = 0,
    c_edit: float = 1.0,
    c_loc: float = 1.0,
    rate_lr: float | None = None,
    **options,
) -> pd.DataFrame:
    """Train MEND's networks in place; returns the curve, resumes as :func:`mscke.training.fit.fit` says.

    ``rate_lr``: at which the logarithms of the updates' rates α are learned, ``lr`` unless told.
    """
    measured = min(MEASURED, mend.base.batch_size)  # all in one batch
    mend.networks.measure(mend.gradients([r.edit for r in train[:measured]]))

    def share(records: Sequence[EditRecord], part: slice) -> Tensor:  # means over records, and over tokens
        some, kept = records[part], ROLES[3:]
        of_tokens = tokens(mend.base, some, kept) / tokens(mend.base, records, kept)
        return mend_loss(mend, some, c_edit * (len(some) / len(records)), c_loc * of_tokens)

    def evaluate() -> dict[str, float]:
        rows = [(r.queries[role], r.edit, r.answers[role]) for r in validation for role in ROLES]
        queries, edits, gold = map(list, zip(*rows, strict=True))
        rows = zip(mend.answer(queries, edits), gold, mend.unedited().answer(queries, edits), strict=True)
        forms = (tuple(map(normalise_answer, row)) for row in rows)
        same = torch.tensor([(a == g, a == b) for a, g, b in forms]).float()
        right = torch.where(torch.tensor(IN_ROLES), *same.view(-1, len(ROLES), 2).mean(0).unbind(-1))
        return {f"right_{r}": float(v) for r, v in zip(ROLES, right, strict=True)}

    frozen = fingerprint(mend.base.model)
    code = code_of(
        *(
            f"mscke.{m}"
            for m in ("editors.mend", "editors.deltas", "editors.reading", "editors.mend_training", "training.fit")
        )
    )
    made_of = {"records": digest(train), "frozen": frozen, "c_edit": c_edit, "c_loc": c_loc, "code": code}
    run = (folder, epochs, lr, batch_size, seed, made_of, partial(held_loss, share, validation, batch_size))
    rates = {"log_rate": rate_lr} if rate_lr else None
    return fit(mend.networks, of_rows(share, train), evaluate, len(train), *run, rates=rates, **options)
