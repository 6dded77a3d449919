"""The edit memory on disk: a LanceDB table in which every change is one append, never rewritten.

A change is there as a whole or not at all: LanceDB links a finished manifest into place. Nothing is forced
to the disk at once, so it survives the death of the process, but not a power cut within seconds. What a memory
*is* follows from its changes in their order (:class:`mscke.memory.EditMemory`).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from mscke.benchmark.sample import Edit
from mscke.changes import Change
from mscke.models.decoding import in_batches

TABLE, LOCK, PICTURES = "edits", "writer.lock", "pictures"
FRAGMENTS = 256  # appends after which the small files are put together, for each append lists them all
AT_ONCE = 1000  # lost pictures that are looked for together
KEEP = timedelta(hours=1)  # that a reader has before files nobody newly opened needs are deleted


def table_schema(dim: int, fingerprint: str) -> pa.Schema:
    """A row an edit of a change; only those of an "add" carry the edit and its embedding."""
    columns = {
        "version": pa.int64(), "change": pa.string(), "id": pa.int64(), "time": pa.timestamp("us", tz="UTC"),
        "image": pa.string(), "picture": pa.large_binary(), "prompt": pa.string(), "answer": pa.string(),
        "embedding": pa.list_(pa.float32(), dim),
    }  # fmt: skip
    return pa.schema(columns.items(), metadata={"classifier": fingerprint})


class EditStore:
    """The table of one memory: one writer, for as long as it holds the lock, and any number of readers."""

    def __init__(self, path: str | Path, dim: int | None, fingerprint: str | None, read_only: bool):
        """Open the table in folder ``path``; a writer that gives ``dim`` makes it where there is none.

        Raises FileNotFoundError without a table to open, BlockingIOError while another writes, ValueError
        if another width or another classifier than ``fingerprint`` was given.
        """
        self.path, self._lock, self._process = Path(path), None, os.getpid()
        if not read_only and (dim is not None or self.path.is_dir()):
            self._lock = _lock(self.path)
        try:
            self._table = self._open(dim, fingerprint)
            self.dim = self._table.schema.field("embedding").type.list_size
            self.fingerprint = self._table.schema.metadata[b"classifier"].decode()
            self._check(dim, fingerprint)
        except BaseException:
            self.close()
            raise
        self._appends = len(list((self.path / f"{TABLE}.lance" / "data").glob("*")))

    def _open(self, dim: int | None, fingerprint: str | None):
        import lancedb  # a second to import, and few need a table

        if any(self.path.glob(f"{TABLE}.lance/_versions/*.manifest")):
            return lancedb.connect(self.path).open_table(TABLE)
        if not self._lock or dim is None:
            raise FileNotFoundError(
                f"no memory at {self.path}; to begin one, open it for writing and give dim="
            )
        # who was killed while making one may have left a table without a version, which cannot be opened
        mode = "overwrite" if (self.path / f"{TABLE}.lance").exists() else "create"
        schema = table_schema(dim, fingerprint or "")
        return lancedb.connect(self.path).create_table(TABLE, schema=schema, mode=mode)

    def _check(self, dim: int | None, fingerprint: str | None) -> None:
        if fingerprint is not None and fingerprint != self.fingerprint:
            raise ValueError(
                f"{self.path} was written by classifier {self.fingerprint}, not {fingerprint}: embed its edits "
                f"again with EditMemory.open({str(self.path)!r}).embed_again(classifier, another_path)"
            )
        if dim is not None and dim != self.dim:
            raise ValueError(f"{self.path} holds embeddings of width {self.dim}, not {dim}; leave dim out")

    def append(self, change: Change, edits: Sequence[Edit], embeddings: Tensor | None) -> None:
        """Commit one change; when this returns it outlives the process. If it raises, :meth:`read` says if it is there.

        Raises PermissionError when opened for reading, FileNotFoundError for an edit without its image.
        """
        if self._lock is None:
            raise PermissionError(
                f"{self.path} was opened for reading or is closed; open it without read_only to change it"
            )
        n, none = len(change.ids), [None] * len(change.ids)
        texts = [[getattr(e, name) for e in edits] or none for name in ("image", "prompt", "answer")]
        picture = {image: _picture(image) for image in dict.fromkeys(e.image for e in edits)}
        pictures = [picture[e.image] for e in edits] or none
        rows = none if embeddings is None else _vectors(embeddings)
        version, kind, time = [change.version] * n, [change.change] * n, [change.time] * n
        columns = [version, kind, change.ids, time, texts[0], pictures, *texts[1:], rows]
        self._table.add(pa.table(columns, schema=self._table.schema))
        self._appends += 1
        if self._appends % FRAGMENTS == 0:
            self._tidy()

    def _tidy(self) -> None:
        try:
            self._table.optimize(cleanup_older_than=KEEP)
        except Exception as error:  # the change is committed, whatever becomes of this
            warnings.warn(f"{self.path}: its small files could not be put together ({error})", stacklevel=3)

    def read(self) -> tuple[list[Edit], Tensor, list[Change]]:
        """All that was ever added, by id, its embeddings (N, dim) float32, and the changes in order.

        Raises ValueError if ids or versions do not count up from their first: the table is damaged then.
        """
        names = [name for name in self._table.schema.names if name != "picture"]
        rows = _sorted(self._table.search().select(names).limit(None).to_arrow(), "version")
        adds = pa.compute.equal(rows["change"], "add")
        added = _sorted(rows if pa.compute.all(adds).as_py() else rows.filter(adds), "id")
        changes = _changes(rows)
        if not _counts_up(added["id"], 0) or not _counts_up([c.version for c in changes], 1):
            raise ValueError(
                f"{self.path} is damaged: its ids or versions repeat or leave some out; use a copy of it"
            )
        edits = list(map(Edit, *(added[name].to_pylist() for name in ("image", "prompt", "answer"))))
        flat = added["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return self._with_images(edits), torch.tensor(flat).view(-1, self.dim), changes

    def _with_images(self, edits: list[Edit]) -> list[Edit]:
        """The edits; where an image is no longer at its path, it is written out from the table."""
        first = {e.image: i for i, e in reversed(list(enumerate(edits)))}  # the first edit on each image
        gone = {i: image for image, i in first.items() if not os.path.exists(image)}
        found = {}
        for some in in_batches(len(gone), AT_ONCE):
            ids = ", ".join(map(str, list(gone)[some]))
            rows = self._table.search().where(f"id IN ({ids}) AND change = 'add'").select(["id", "picture"])
            for row in rows.limit(None).to_arrow().to_pylist():
                image = gone[row["id"]]
                path = _write_picture(self.path / PICTURES, row["picture"], Path(image).suffix)
                found[image] = str(path)
        return [replace(e, image=found[e.image]) if e.image in found else e for e in edits]

    def close(self) -> None:
        """Let another writer in."""
        if self._lock is not None:
            if (
                os.getpid() == self._process
            ):  # a fork has the file, too: it does not hold the lock, nor does it let go
                fcntl.flock(self._lock, fcntl.LOCK_UN)
            self._lock.close()
            self._lock = None


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Within it SIGINT waits: LanceDB, interrupted, does not say whether it will commit."""
    before, main = signal.getsignal(signal.SIGINT), threading.main_thread()
    if threading.current_thread() is not main or before is None:  # it interrupts no other; None: not Python's
        yield
        return
    asked = []
    signal.signal(signal.SIGINT, lambda *_: asked.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        signal.raise_signal(signal.SIGINT)


def _lock(folder: Path):
    """The folder's lock, held until the file is closed: by the kernel when its process is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / LOCK, "a")  # noqa: SIM115 (stays open)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise BlockingIOError(
            f"{folder} is being written by another; close that one, or open this one with read_only=True"
        ) from None
    return file


def _sorted(rows: pa.Table, column: str) -> pa.Table:
    """The rows by this column; they mostly are already, and a million take seconds to move."""
    return rows if (np.diff(rows[column].to_numpy()) >= 0).all() else rows.sort_by(column)


def _counts_up(numbers: Sequence[int], first: int) -> bool:
    return np.array_equal(numbers, np.arange(first, first + len(numbers)))


def _changes(rows: pa.Table) -> list[Change]:
    """A change is the rows of one version and time: two of one version are two."""
    versions, ids, kinds, times = (
        rows["version"].to_numpy(),
        rows["id"].to_numpy(),
        rows["change"],
        rows["time"],
    )
    starts = np.flatnonzero(
        np.diff(versions, prepend=-1) | np.diff(times.cast("int64").to_numpy(), prepend=-1)
    )
    parts = np.split(ids, starts[1:]) if len(starts) else []
    return [
        Change(int(versions[i]), kinds[i].as_py(), tuple(part.tolist()), times[i].as_py())
        for i, part in zip(starts.tolist(), parts, strict=True)
    ]


def _vectors(embeddings: Tensor) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(embeddings.numpy().ravel()), embeddings.shape[1])


def _picture(image: str) -> bytes:
    try:
        return Path(image).read_bytes()
    except OSError as error:
        raise FileNotFoundError(f"an edit's image {image} cannot be read; nothing was stored") from error


def _write_picture(folder: Path, picture: bytes, suffix: str) -> Path:
    """Named by what it shows, so that readers may write it at the same time."""
    folder.mkdir(exist_ok=True)
    path = folder / (hashlib.sha256(picture).hexdigest()[:16] + suffix)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_bytes(picture)
    os.replace(temporary, path)
    return path
