"""Records in, tidy rows out: every query of many records is answered in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate.utils import gather_object

from mscke.benchmark.sample import EditRecord, Query
from mscke.checkpoint import write_whole
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
from mscke.workers import processes

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
    """Rows of every query under each of ``protocols``, of which teacher forcing spares most of the generating."""
    forced = _force(model, base, records, among) if "teacher_forced" in protocols else ([], [])
    frames = [PROTOCOLS[p](model, base, records, among, *forced).assign(protocol=p) for p in protocols]
    return pd.concat(frames, ignore_index=True)


def named(rows: pd.DataFrame, track: str, backbone: str, method: str) -> pd.DataFrame:
    """``rows`` of one method with the columns that say whose they are, in the order of :data:`COLUMNS`."""
    return rows.assign(track=track, backbone=backbone, method=method)[COLUMNS]


def evaluate_shared(
    editor: Editor, base: MLLM, records: Sequence[EditRecord], track: str, at_once: int | None = None
) -> pd.DataFrame:
    """The rows of :func:`evaluate`, each record edited alone, by :func:`shared`."""
    return shared(lambda part: evaluate(editor, base, part, track), records, at_once)


def shared(
    ask: Callable[[Sequence[EditRecord]], pd.DataFrame],
    records: Sequence[EditRecord],
    at_once: int | None = None,
) -> pd.DataFrame:
    """The rows of ``ask(records)``: every process gets all of them, and computes those of its share of the records.

    ``at_once`` records are asked about together, all of them unless told: fewer need less memory.
    """
    with processes().split_between_processes(list(records)) as mine:
        frames = [ask(mine[part]) for part in in_batches(len(mine), at_once or len(mine) or 1)]
    rows = pd.concat(gather_object(frames), ignore_index=True)
    return rows.sort_values("protocol", kind="stable", ignore_index=True)  # as one process has them


def _queries(records: Sequence[EditRecord]) -> tuple[list, list[str], pd.DataFrame]:
    """All queries, record by record; their gold answers; and what identifies each row."""
    queries = [r.queries[role] for r in records for role in ROLES]
    gold = [r.answers[role] for r in records for role in ROLES]
    frame = pd.DataFrame({
        "record": np.repeat([r.id for r in records], len(ROLES)),
        "role": list(ROLES) * len(records),
        "question": [q.question for q in queries],
    })  # fmt: skip
    return queries, gold, frame


def generated(
    model: EditedModel,
    base: MLLM,
    records: Sequence[EditRecord],
    among: torch.Tensor | None,
    after: Sequence[Forced] = (),
    before: Sequence[Forced] = (),
) -> pd.DataFrame:
    """Greedy answers, compared as the field does; unchanged = the base model's own answer. ``after``, ``before``: if
    there are any, the gold answers' predictions by the model, and by the base model for what must stay."""
    queries, gold, frame = _queries(records)
    stays = ~frame["role"].isin(CHANGES)
    kept = np.flatnonzero(stays)
    own = _greedy(base.answer, base, [queries[i] for i in kept], [gold[i] for i in kept], before)
    frame["expected"] = gold
    frame.loc[stays, "expected"] = own
    frame["answer"] = _greedy(model.answer, base, queries, gold, after, among)
    frame["value"] = exact_match(frame["answer"], frame["expected"])
    frame["strict"] = strict_match(frame["answer"], frame["expected"])
    return _named(frame)


def _greedy(
    answer: Callable,
    base: MLLM,
    queries: Sequence[Query],
    gold: Sequence[str],
    forced: Sequence[Forced],
    among: torch.Tensor | None = None,
) -> list[str]:
    """Greedy answers (B). Where teacher forcing shows them to be the gold ones they need not be asked for."""
    known = [i for i, f in enumerate(forced) if f.is_greedy]
    ids = [base.encoder.answer(gold[i], eos=False) for i in known]
    found = dict(zip(known, said(base.encoder, ids) if ids else [], strict=True))
    rest = [i for i in range(len(queries)) if i not in found]
    if rest:
        asked = [queries[i] for i in rest], *(() if among is None else (among[rest],))
        found |= zip(rest, answer(*asked), strict=True)
    return [found[i] for i in range(len(queries))]


def _force(
    model: EditedModel, base: MLLM, records: Sequence[EditRecord], among: torch.Tensor | None
) -> tuple[list[Forced], list[Forced]]:
    """The gold answers' predictions by the model, and by the base model for the queries that must stay."""
    queries, gold, frame = _queries(records)
    kept = np.flatnonzero(~frame["role"].isin(CHANGES))
    return model.force(queries, gold, among), base.force([queries[i] for i in kept], [gold[i] for i in kept])


def teacher_forced(
    model: EditedModel,
    base: MLLM,
    records: Sequence[EditRecord],
    among: torch.Tensor | None,
    after: Sequence[Forced] = (),
    before: Sequence[Forced] = (),
) -> pd.DataFrame:
    """Token accuracy given the gold prefix; unchanged = the same top-k ids at every position. ``after`` and
    ``before`` are as in :func:`generated`."""
    if not after:
        after, before = _force(model, base, records, among)
    queries, gold, frame = _queries(records)
    values, own = [token_accuracy(forced) for forced in after], iter(before)
    for i, role in enumerate(frame["role"]):
        if role not in CHANGES:
            prefix = base.encoder.prefix_length(queries[i].image is not None)
            values[i] = unchanged_share(next(own), after[i], TOP_K[role], prefix)
    return _named(frame.assign(expected=gold, answer="", value=values, strict=values))


PROTOCOLS = {"generated": generated, "teacher_forced": teacher_forced}


def _named(frame: pd.DataFrame) -> pd.DataFrame:
    frame["metric"] = frame["role"].map(METRICS)
    return frame.drop(columns="role")


def save_rows(rows: pd.DataFrame, path: Path) -> None:
    """Store per-record rows as parquet, whole or not at all."""
    write_whole(path, lambda p: rows.to_parquet(p, index=False, compression="zstd"))
