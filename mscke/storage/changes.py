"""A memory's changes: what stands of them, and how they are written as rows of a table.

The rows of one change are one append; what a memory is follows from its changes in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from torch import Tensor

from mscke.benchmark.sample import Edit
from mscke.storage.pictures import Picture, take

# columns that tables of the first edition lack, from those that they have: SQL
LATER = {
    "digest": "sha256(picture)", "size": "arrow_cast(null, 'Int64')", "mtime": "arrow_cast(null, 'Int64')",
    "replaced": "arrow_cast(null, 'List(Int64)')",
}  # fmt: skip


class Change(NamedTuple):
    """One entry of a memory's log: the ids that were added, removed, or by an undo set back.

    ``replaced``: the ids of earlier edits whose place the added ones take.
    """

    version: int
    change: str  # add, remove or undo
    ids: tuple[int, ...]
    time: datetime
    replaced: tuple[int, ...] = ()


class Changes:
    """The ``log`` of all changes, those of them that ``stand``, and the ids that are ``replaced`` now."""

    def __init__(self):
        self.log: list[Change] = []
        self.standing: list[Change] = []
        self.replaced: set[int] = set()

    def enter(self, change: Change, here: Tensor) -> None:
        """Enter a change, and make it in ``here`` (N,) bool by id; an undo takes the last one that stands off again."""
        self.log.append(change)
        if change.change == "undo":
            undone = self.standing.pop()
            here[list(undone.replaced)] = True  # first: an edit may replace one of the same change
            here[list(undone.ids)] = undone.change == "remove"
            self.replaced.difference_update(undone.replaced)
        else:
            self.standing.append(change)
            here[list(change.ids)] = change.change == "add"
            here[list(change.replaced)] = False
            self.replaced.update(change.replaced)


def table_schema(dim: int, fingerprint: str) -> pa.Schema:
    """A row an edit of a change; only those of an "add" carry the edit, its picture and its embedding.

    ``replaced`` stands in the first row of a change.
    """
    columns = {
        "version": pa.int64(), "change": pa.string(), "id": pa.int64(), "time": pa.timestamp("us", tz="UTC"),
        "image": pa.string(), "picture": pa.large_binary(), "prompt": pa.string(), "answer": pa.string(),
        "embedding": pa.list_(pa.float32(), dim), "digest": pa.binary(), "size": pa.int64(), "mtime": pa.int64(),
        "replaced": pa.list_(pa.int64()),
    }  # fmt: skip
    return pa.schema(columns.items(), metadata={"classifier": fingerprint})


def to_rows(change: Change, edits: Sequence[Edit], embeddings: Tensor | None, schema: pa.Schema) -> pa.Table:
    """The rows of one change. Raises FileNotFoundError for an edit without its image."""
    n, none = len(change.ids), [None] * len(change.ids)
    taken = {image: take(image) for image in dict.fromkeys(e.image for e in edits)}
    columns = {
        "version": [change.version] * n, "change": [change.change] * n, "id": change.ids, "time": [change.time] * n,
        "embedding": none if embeddings is None else _vectors(embeddings),
        "replaced": [list(change.replaced) or None, *none[1:]],
    }  # fmt: skip
    for name in ("image", "prompt", "answer"):
        columns[name] = [getattr(e, name) for e in edits] or none
    for name in Picture._fields:
        columns[name] = [getattr(taken[e.image], name) for e in edits] or none
    return pa.table([columns[name] for name in schema.names], schema=schema)


def in_order(rows: pa.Table) -> pa.Table:
    """The rows by change and id; they mostly are already, and a million take seconds to move."""
    keys = (rows["id"], rows["time"].cast("int64"), rows["version"])
    order = np.lexsort([key.to_numpy() for key in keys])
    return rows if (np.diff(order) == 1).all() else rows.take(order)


def to_changes(rows: pa.Table) -> list[Change]:
    """The changes that rows in order make. One is the rows of one version and time: two of one version are two."""
    version, time, ids = (rows[name].to_numpy() for name in ("version", "time", "id"))
    starts = np.flatnonzero(np.diff(version, prepend=-1) | np.diff(time.astype("int64"), prepend=-1))
    parts = np.split(ids, starts[1:]) if len(starts) else []
    first = rows.select(["version", "change", "time", "replaced"]).take(starts).to_pylist()
    return [
        Change(row["version"], row["change"], tuple(part.tolist()), row["time"], tuple(row["replaced"] or ()))
        for row, part in zip(first, parts, strict=True)
    ]


def whole(changes: Sequence[Change]) -> int:
    """How many changes, from the first on, have the version and give the ids that are due."""
    n = 0
    for done, change in enumerate(changes):
        new = len(change.ids) if change.change == "add" else 0
        if change.version != done + 1 or (new and change.ids != tuple(range(n, n + new))):
            return done
        n += new
    return len(changes)


def _vectors(embeddings: Tensor) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(embeddings.numpy().ravel()), embeddings.shape[1])
