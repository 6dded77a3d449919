"""Many edits in force at once: the deployment that the paper does not measure.

A query that is asked of a memory of N edits may be *captured* by another record's edit, for its ρ is the
largest of N. Each record is therefore asked among N edits, of which its own is one (:func:`groups`).
What does not depend on N is computed once: the embeddings, and an answer under an edit. Methods that
change the model itself receive the same N edits one after another (:func:`ask_sequences`)::

    asked = ask_among(editor, base, records, sizes=(1, 10, 100))
    rows = as_rows(asked, records, {"method": editor.name}, threshold=0.5)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor

from mscke.benchmark.sample import EditRecord
from mscke.config import get_track
from mscke.editors import build
from mscke.editors.mscke import MSCKE, own_edits
from mscke.evaluation.metrics import CHANGES, METRICS, ROLES, exact_match
from mscke.evaluation.outcomes import outcomes
from mscke.evaluation.protocol import ask as ask_model
from mscke.evaluation.protocol import save_rows
from mscke.evaluation.run import both_ways
from mscke.fetching.track import load_benchmark
from mscke.memory import EditMemory
from mscke.models.mllm import MLLM
from mscke.system.files import read_kept


def groups(n_records: int, n_edits: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs (asked, in force) of records' places: each is asked once, among ``n_edits`` with its own.

    One seeded order is cut into pieces, so the first group of one size begins the first of the next.
    The last group is filled up from those before it. Raises ValueError when there are too few records.
    """
    if not 0 < n_edits <= n_records:
        raise ValueError(f"{n_edits} edits cannot be in force at once with {n_records} records")
    order = np.random.default_rng(seed).permutation(n_records)
    starts = range(0, n_records, n_edits)
    return [(order[i : i + n_edits], order[min(i, n_records - n_edits) :][:n_edits]) for i in starts]


def ask_among(
    editor: MSCKE,
    base: MLLM,
    records: Sequence[EditRecord],
    sizes: Iterable[int],
    seed: int = 0,
    alone: np.ndarray | None = None,
) -> pd.DataFrame:
    """Every query of every record asked of memories of each size: one row a size, record and role.

    ``alone`` (R, 5, 2): how right each query is, left to the base model and taken by its own edit, as
    :meth:`mscke.evaluation.outcomes.Outcomes.values` gives them; asked for unless given.

    Columns: n_edits, record and winner (places: the record asked, and the one whose edit scores
    highest), role, rho in (0, 1) (the winner's score), own (its own edit's), rival (the best of the
    others; NaN for a memory of one), left and taken (value in {0, 1} if the base model answers, and if
    the winner's edit does; ``taken`` is NaN below the editor's threshold, where nobody need ask).
    """
    alone = outcomes(base, editor.in_scope, records).values() if alone is None else alone
    table = _route(editor, records, sizes, seed)
    table["left"], own = alone[table["record"], table["role"].map(ROLES.index)].T
    taken, captured = table["rho"] >= editor.threshold, table["winner"] != table["record"]
    pairs = table.loc[taken & captured, ["record", "role", "winner"]].drop_duplicates()
    pairs["taken"] = _captured(editor, records, pairs)
    table = table.merge(pairs, how="left", on=["record", "role", "winner"])
    return table.assign(taken=table["taken"].where(captured, own).where(taken))


def _captured(editor: MSCKE, records: Sequence[EditRecord], pairs: pd.DataFrame) -> np.ndarray:
    """How right the records' queries in these roles are under the winners' edits, which are others'."""
    if pairs.empty:
        return np.empty(0)
    asked = [(records[i], role) for i, role in zip(pairs["record"], pairs["role"], strict=True)]
    queries = [r.queries[role] for r, role in asked]
    gold, edits = [r.answers[role] for r, role in asked], [records[i].edit for i in pairs["winner"]]
    answers, before = (who.answer(queries, edits) for who in (editor.in_scope, editor.in_scope.unedited()))
    return exact_match(answers, np.where(pairs["role"].isin(CHANGES), gold, before))


def _route(editor: MSCKE, records: Sequence[EditRecord], sizes: Iterable[int], seed: int) -> pd.DataFrame:
    """Who wins each query at each size, and by what score."""
    classifier, n_roles = editor.classifier, len(ROLES)
    matrix = classifier.embed([r.queries["reliability"] for r in records], [r.edit.answer for r in records])
    z = classifier.embed([r.queries[role] for r in records for role in ROLES])
    z = z.unflatten(0, (len(records), n_roles))
    own = classifier.score((matrix.unsqueeze(1) - z).square().sum(-1)).numpy()  # (R, 5)
    parts = []
    for n_edits in sizes:
        for asked, stored in groups(len(records), n_edits, seed):
            memory = EditMemory(matrix.shape[1])
            memory.add([records[i].edit for i in stored], matrix[stored])
            distance, place = memory.nearest(z[asked].flatten(0, 1), 2)
            rho, ranked = classifier.score(distance).numpy(), stored[place.numpy()]
            record = asked.repeat(n_roles)
            others = np.where(ranked == record[:, None], np.nan, rho)
            parts.append({
                "n_edits": np.full(len(record), n_edits), "record": record, "winner": ranked[:, 0],
                "role": np.tile(ROLES, len(asked)), "rho": rho[:, 0], "own": own[asked].ravel(),
                "rival": np.fmax.reduce(others, axis=1),
            })  # fmt: skip
    return pd.DataFrame({column: np.concatenate([p[column] for p in parts]) for column in parts[0]})


def as_rows(
    asked: pd.DataFrame, records: Sequence[EditRecord], names: dict[str, str], threshold: float
) -> pd.DataFrame:
    """Tidy rows at ``threshold``, as :func:`mscke.evaluation.protocol.evaluate` gives them, and n_edits.

    ``asked`` is of :func:`ask_among`, whose editor's threshold must not be above this one (ValueError);
    ``names`` are constant columns (track, backbone, method).
    """
    taken = asked["rho"] >= threshold
    if asked.loc[taken, "taken"].isna().any():
        raise ValueError(f"some queries above {threshold} were not asked: give the editor this threshold")
    columns = {
        "protocol": "generated", "n_edits": asked["n_edits"],
        "record": [records[i].id for i in asked["record"]], "metric": asked["role"].map(METRICS),
        "value": asked["taken"].where(taken, asked["left"]),
    }  # fmt: skip
    return pd.DataFrame(names | columns, index=asked.index)


def ask_sequences(
    editor, base: MLLM, records: Sequence[EditRecord], sizes: Iterable[int], n_asked: int = 300, seed: int = 0
) -> pd.DataFrame:
    """One model edited N times in a row, then asked about its edits: rows as :func:`as_rows` gives them.

    ``editor.sequence(records, checkpoints)`` yields (N, the model so far) at each checkpoint. About
    ``n_asked`` records are asked at each size: those of several short sequences, or of one long sequence
    records at even distances, so that early and late edits count alike.
    """
    sizes, order = sorted(sizes), np.random.default_rng(seed).permutation(len(records))
    n_asked, frames = min(n_asked, len(records)), []

    def ask(model, places: np.ndarray, n_edits: int, among: Tensor | None = None) -> None:
        rows = ask_model(model, base, [records[i] for i in places], among, ("generated",))
        frames.append(rows.assign(n_edits=n_edits))

    if sizes[0] == 1:  # each alone: one batch
        alone = order[:n_asked]
        ask(editor.edit([records[i] for i in alone]), alone, 1, own_edits(len(alone), len(ROLES)))
    longer = [n for n in sizes if n > 1]
    runs = [(0, longer)] + [(start, [n]) for n in longer for start in range(n, n_asked - n + 1, n)]
    for start, checkpoints in runs:
        members = order[start : start + checkpoints[-1]]
        for n_edits, model in editor.sequence([records[i] for i in members], checkpoints):
            ask(model, members[_evenly(n_edits, n_asked)], n_edits)
    return pd.concat(frames, ignore_index=True)


def run_sizes(track_name: str, backbone: str, method: str, sizes: Sequence[int], key: str) -> Path:
    """One method at all sizes on the test split: the parquet file of its rows, made once.

    The rows are of :func:`ask_among` for a method with a memory, else of :func:`ask_sequences`.
    """
    track = get_track(track_name)
    name = "-".join(map(str, [method, *sizes]))
    path = track.outputs / "rows" / key / backbone / f"{name}.parquet"
    if read_kept(path, pd.read_parquet) is None:
        bench, base = load_benchmark(track), build.load_base(track, backbone)
        editor = build.editor(track, bench, base, method)
        if isinstance(editor, MSCKE):
            alone = both_ways(track, bench, base, build.IN_SCOPE[method], key).values()
            rows = ask_among(editor, base, bench.test, sizes, alone=alone)
        else:
            rows = ask_sequences(editor, base, bench.test, sizes)
        save_rows(rows, path)
    return path


def _evenly(n: int, k: int) -> np.ndarray:
    """min(n, k) places among n at even distances, the last included."""
    return np.linspace(0, n - 1, min(n, k)).round().astype(int)
