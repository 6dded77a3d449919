"""Records in, tidy rows out: every query of many records is answered in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from mscke.benchmark.sample import EditRecord
from mscke.editors.base import EditedModel, Editor
from mscke.evaluation.metrics import (
    CHANGES,
    METRICS,
    ROLES,
    TOP_K,
    exact_match,
    strict_match,
    token_accuracy,
    unchanged_share,
)
from mscke.models.decoding import Forced, in_batches, said
from mscke.models.mllm import MLLM
from mscke.models.room import check_records
from mscke.system.files import replacing
from mscke.system.workers import processes

COLUMNS = "track backbone method protocol record metric value strict question expected answer".split()


def evaluate(
    editor: Editor, base: MLLM, records: Sequence[EditRecord], track: str, together: bool = False
) -> pd.DataFrame:
    """Edit, ask, score. One row a record, metric and protocol.

    Columns: track, backbone, method, protocol, record, metric, value in [0, 1], strict (the value where answers
    are compared to the letter; of teacher forcing, which compares token ids, the same value), question, expected
    (the corrected answer, or the one before the edit), answer (as said, in lower case). Each record is edited
    alone, as in the paper, unless ``together`` puts all of them in force at once.

    Raises :class:`mscke.benchmark.sample.RecordError` for a record that ``base`` has no room for.
    """
    check_records(base, records)
    model = editor.edit(records)
    among = None if together else torch.arange(len(records)).repeat_interleave(len(ROLES))
    return named(ask(model, base, records, among), track, base.name, editor.name)


def ask(
    model: EditedModel,
    base: MLLM,
    records: Sequence[EditRecord],
    among: torch.Tensor | None,
    protocols: Sequence[str] = ("generated", "teacher_forced"),
) -> pd.DataFrame:
    """Rows of every query under each of ``protocols``, of which teacher forcing spares most of the generating.

    Unchanged is what the model answers with its edits and without, asked both ways in the same batches
    (:meth:`mscke.editors.base.EditedModel.unedited`). A model whose updates do not all exist at once is asked
    all about some records before the next ones (``chunk``).
    """
    size = len(records) if among is None else model.chunk or len(records)
    frames = []
    for part in tqdm(in_batches(len(records), max(1, size)), desc="records", leave=False, mininterval=2):
        rows = None if among is None else among.view(len(records), -1)[part].flatten()
        asked = _Asked(model, base, records[part], rows)
        forced = asked.force() if "teacher_forced" in protocols else None
        frames += [PROTOCOLS[p](asked, forced).assign(protocol=p) for p in protocols]
    rows = pd.concat(frames, ignore_index=True)
    order = rows["protocol"].map(list(protocols).index)
    return rows.iloc[order.argsort(kind="stable")].reset_index(drop=True)


def named(rows: pd.DataFrame, track: str, backbone: str, method: str) -> pd.DataFrame:
    """``rows`` of one method with the columns that say whose they are, in the order of :data:`COLUMNS`."""
    return rows.assign(track=track, backbone=backbone, method=method)[COLUMNS]


def evaluate_shared(
    editor: Editor, base: MLLM, records: Sequence[EditRecord], track: str, at_once: int | None = None
) -> pd.DataFrame:
    """The rows of :func:`evaluate`, each record edited alone, by :func:`shared`."""
    return shared(lambda part: evaluate(editor, base, part, track), records, at_once)


def shared(
    ask: Callable[[Sequence[EditRecord]], pd.DataFrame], records: Sequence[EditRecord], at_once: int | None = None
) -> pd.DataFrame:
    """The rows of ``ask(records)``: every process gets all of them, and computes those of its share of the records.

    ``at_once`` records are asked about together, all of them unless told: fewer need less memory.
    """
    with processes().split_between_processes(list(records)) as mine:
        frames = [ask(mine[part]) for part in in_batches(len(mine), at_once or len(mine) or 1)]
    rows = pd.concat(gather_object(frames), ignore_index=True)
    return rows.sort_values("protocol", kind="stable", ignore_index=True)  # as one process has them


class _Asked:
    """The questions of some records, record by record; what a model says to them, and says without its edits
    to those whose answer must stay.

    These are asked apart from the others: so a question is asked twice only where both answers are compared.
    """

    def __init__(self, model: EditedModel, base: MLLM, records: Sequence[EditRecord], among: torch.Tensor | None):
        self.model, self.base, self.among = model, base, among
        self.queries = [r.queries[role] for r in records for role in ROLES]
        self.gold = [r.answers[role] for r in records for role in ROLES]
        self.role = list(ROLES) * len(records)
        self.stay = np.array([role not in CHANGES for role in self.role], bool)
        self.record = np.repeat([r.id for r in records], len(ROLES))

    def force(self) -> tuple[list[Forced], list[Forced | None]]:
        """Predictions of the gold answers: after the edits, and before them (None where the answer must change)."""
        return self._both(lambda who, rows: who.force(*self._of(rows, self.queries, self.gold)))

    def answer(self, forced: tuple[list, list] | None) -> tuple[list[str], list[str | None]]:
        """Greedy answers as :meth:`force`. Where ``forced`` shows them to be the gold ones they are not asked for."""
        greedy = np.zeros(len(self.queries), bool)
        if forced:
            limit, pairs = self.base.encoder.reserve, zip(*forced, strict=True)
            greedy[:] = [all(f.is_greedy(limit) for f in both if f is not None) for both in pairs]
        known = np.flatnonzero(greedy)
        ids = [self.base.encoder.answer(self.gold[i], eos=False) for i in known]
        told = dict(zip(known, said(self.base.encoder, ids) if ids else [], strict=True))
        after, before = self._both(lambda who, rows: who.answer(*self._of(rows, self.queries)), ~greedy)
        for i, text in told.items():
            after[i], before[i] = text, text if self.stay[i] else None
        return after, before

    def _both(self, ask: Callable, which: np.ndarray | None = None) -> tuple[list, list]:
        """``ask`` (of a model, rows) of the rows ``which`` (all, if None): with the edits, and without them what must stay."""
        which = np.ones(len(self.queries), bool) if which is None else which
        after, before = ([None] * len(self.queries) for _ in range(2))
        sides = (after, self.model, ~self.stay), (after, self.model, self.stay)
        for found, who, mine in (*sides, (before, self.model.unedited(), self.stay)):
            if len(rows := np.flatnonzero(mine & which)):
                for i, result in zip(rows, ask(who, rows), strict=True):
                    found[i] = result
        return after, before

    def _of(self, rows: np.ndarray, *columns: list) -> tuple:
        """These rows of ``columns``, and which edit is in force for each."""
        return *([c[i] for i in rows] for c in columns), None if self.among is None else self.among[rows]

    def frame(self, **columns) -> pd.DataFrame:
        """The columns that identify each row, and these."""
        who = {"record": self.record, "question": [q.question for q in self.queries]}
        return pd.DataFrame(who | columns | {"metric": [METRICS[role] for role in self.role]})


def generated(asked: _Asked, forced: tuple[list, list] | None = None) -> pd.DataFrame:
    """Greedy answers, compared as the field does; unchanged = the same answer as before the edit."""
    answers, before = asked.answer(forced)
    expected = [b if stays else g for b, g, stays in zip(before, asked.gold, asked.stay, strict=True)]
    return asked.frame(
        expected=expected, answer=answers, value=exact_match(answers, expected), strict=strict_match(answers, expected)
    )


def teacher_forced(asked: _Asked, forced: tuple[list, list]) -> pd.DataFrame:
    """Token accuracy given the gold prefix; unchanged = the same top-k ids at every position."""
    values = []
    for query, role, after, before in zip(asked.queries, asked.role, *forced, strict=True):
        if before is None:
            values.append(token_accuracy(after))
        else:
            prefix = asked.base.encoder.prefix_length(query.image is not None)
            values.append(unchanged_share(before, after, TOP_K[role], prefix))
    return asked.frame(expected=asked.gold, answer="", value=values, strict=values)


PROTOCOLS = {"generated": generated, "teacher_forced": teacher_forced}


def save_rows(rows: pd.DataFrame, path: Path) -> None:
    """Store per-record rows as parquet, whole or not at all."""
    with replacing(path) as whole:
        rows.to_parquet(whole, index=False, compression="zstd")
