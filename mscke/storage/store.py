"""The edit memory on disk: a LanceDB table in which every change is one append, never rewritten.

A change is there as a whole or not at all: LanceDB links a finished manifest into place. Nothing is forced
to the disk at once, so it survives the death of the process, but not a power cut within seconds. What a memory
*is* follows from its changes in their order (:class:`mscke.memory.EditMemory`). An edit's picture is stored with
it, and is what it means: its path is only where the picture was (:mod:`mscke.storage.pictures`).
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from mscke.benchmark.sample import Edit
from mscke.models.decoding import in_batches
from mscke.storage.alone import FolderLock
from mscke.storage.changes import LATER, Change, in_order, table_schema, to_changes, to_rows, whole
from mscke.storage.pictures import scratch, shows, write_out

TABLE, PICTURES = "edits", "pictures"
FRAGMENTS = 256  # appends after which the small files are put together, for each append lists them all
AT_ONCE = 1000  # stored pictures that are written out together
KEEP = timedelta(hours=1)  # that a reader has before files nobody newly opened needs are deleted


class EditStore:
    """The table of one memory: one writer, for as long as it holds the lock, and any number of readers."""

    def __init__(self, path: str | Path, dim: int | None, fingerprint: str | None, read_only: bool):
        """Open the table in folder ``path``; a writer that gives ``dim`` makes it where there is none.

        Raises FileNotFoundError without a table to open, BlockingIOError while another writes, OSError where a
        writer may not write, ValueError if the table is damaged, or if another width or another classifier than
        ``fingerprint`` was given.
        """
        self.path, self._lock = folder_at(path), None
        self._pictures = None if read_only else self.path / PICTURES
        if not read_only and (dim is not None or self.path.is_dir()):
            self._lock = FolderLock(self.path)
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

        folder = self.path / f"{TABLE}.lance"
        if any(folder.glob("_versions/*.manifest")):
            with self._legible():
                return lancedb.connect(self.path).open_table(TABLE)
        # who is killed while making a table leaves no data
        if folder.is_file() or any(folder.glob("data/*")):
            raise ValueError(
                f"{self.path} is damaged: {folder} holds data, but lacks the manifests in _versions that say what "
                "they are; copy all of it once more. Nothing was begun over it"
            )
        if not self._lock or dim is None:
            raise FileNotFoundError(f"no memory at {self.path}; to begin one, open it for writing and give dim=")
        # who was killed while making one may have left a table without a version, which cannot be opened
        mode = "overwrite" if folder.exists() else "create"
        schema = table_schema(dim, fingerprint or "")
        return lancedb.connect(self.path).create_table(TABLE, schema=schema, mode=mode)

    @contextmanager
    def _legible(self) -> Iterator[None]:
        """LanceDB's errors in reading, with the memory's name."""
        try:
            yield
        except Exception as error:
            raise ValueError(
                f"{self.path} is damaged: files of its table are missing, cut off or barred ({error}); use a copy of it"
            ) from error

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
        if not self._lock or not self._lock.held:
            raise PermissionError(
                f"{self.path} was opened for reading or by another process, is closed, or was moved or removed since; "
                "open it without read_only to change it"
            )
        if lacking := self._lacking():
            self._table.add_columns(lacking)
        self._table.add(to_rows(change, edits, embeddings, self._table.schema))
        self._appends += 1
        if self._appends % FRAGMENTS == 0:
            self._tidy()

    def _lacking(self) -> dict[str, str]:
        """What a table of the first edition lacks."""
        return {name: sql for name, sql in LATER.items() if name not in self._table.schema.names}

    def _tidy(self) -> None:
        try:
            self._table.optimize(cleanup_older_than=KEEP)
        except Exception as error:  # the change is committed, whatever becomes of this
            warnings.warn(f"{self.path}: its small files could not be put together ({error})", stacklevel=3)

    def read(self, damaged: bool = False) -> tuple[list[Edit], list[str], Tensor, list[Change]]:
        """All that was ever added, by id: the edits, the SHA-256 (hex) of the picture each was stored with, their
        embeddings (N, dim) float32; and the changes in order.

        Raises ValueError if the table cannot be read, or if ids or versions do not count up from their first and
        it may not be ``damaged``: what was added is then in the order of the changes.
        """
        names = [name for name in self._table.schema.names if name != "picture"]
        columns = dict(zip(names, names, strict=True)) | self._lacking()
        with self._legible():
            rows = in_order(self._table.search().select(columns).limit(None).to_arrow())
        adds = pa.compute.equal(rows["change"], "add")
        added = rows if pa.compute.all(adds).as_py() else rows.filter(adds)
        changes = to_changes(rows)
        if not damaged and (n := whole(changes)) < len(changes):
            raise ValueError(
                f"{self.path} is damaged: its ids or versions repeat or leave some out. Of {len(changes)} changes the "
                f"first {n} are whole, and all {len(added)} edits that were ever added can be read: "
                f"mscke.storage.salvage.recover({str(self.path)!r}, another_path) puts what is left into a new memory"
            )
        edits = list(map(Edit, *(added[name].to_pylist() for name in ("image", "prompt", "answer"))))
        flat = added["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        pictures = [digest.hex() for digest in added["digest"].to_pylist()]
        return self._as_stored(edits, added), pictures, torch.tensor(flat).view(-1, self.dim), changes

    def edits(self, ids: Iterable[int]) -> list[Edit]:
        """These edits, with their pictures looked at anew."""
        edits = EditStore(self.path, None, None, read_only=True).read()[0]
        return [edits[i] for i in ids]

    def _as_stored(self, edits: list[Edit], rows: pa.Table) -> list[Edit]:
        """The edits, each on the picture of its row: written out from the table if its file shows it no longer."""
        kinds = rows.group_by(["image", "digest", "size", "mtime"]).aggregate([("id", "min")])
        lost, overwritten, found = {}, {}, {}
        for kind in kinds.to_pylist():
            still = shows(kind["image"], kind["digest"], kind["size"], kind["mtime"])
            if not still:
                lost[kind["image"], kind["digest"]] = kind["id_min"]
            if still is False:
                overwritten[kind["image"]] = kind["id_min"]
        for some in in_batches(len(lost), AT_ONCE):
            some = dict(list(lost.items())[some])
            with self._legible():
                pictures = self._stored(some.values())
                some = {(image, digest): pictures[digest] for image, digest in some}
            for (image, digest), picture in some.items():
                path = write_out(self._pictures or scratch(), picture, image)
                found[image, digest] = str(path)
        if overwritten:
            named = ", ".join(f"{image} (edit {i})" for image, i in list(overwritten.items())[:5])
            warnings.warn(
                f"{self.path}: {len(overwritten)} files show other pictures than when their edits were stored; "
                f"the edits keep the stored ones: {named}", stacklevel=4
            )  # fmt: skip
        if not found:
            return edits
        digests = rows["digest"].to_pylist()
        return [
            replace(e, image=found.get((e.image, digest), e.image)) for e, digest in zip(edits, digests, strict=True)
        ]

    def _stored(self, ids: Iterable[int]) -> dict[bytes, bytes]:
        """The pictures stored with these edits, by their digests."""
        rows = self._table.search().where(f"id IN ({', '.join(map(str, ids))}) AND change = 'add'")
        pictures = rows.select(["picture"]).limit(None).to_arrow()["picture"].to_pylist()
        return {hashlib.sha256(picture).digest(): picture for picture in pictures}

    def close(self) -> None:
        """Let another writer in."""
        if self._lock:
            self._lock.release()


def folder_at(path: str | os.PathLike) -> Path:
    """The folder that ``path`` names, whatever becomes of the working directory; ``~`` is the home.

    Raises NotADirectoryError for a file, ValueError for an address (``s3://…``), as the lock needs a folder, and for
    a name that LanceDB cannot read.
    """
    if re.match(r"[A-Za-z][\w+.-]+:/", text := os.fspath(path)):
        raise ValueError(f"{text} is an address; a memory lies in a folder of this machine")
    if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", text):
        raise ValueError(f"{text!r} has control characters or is not UTF-8; give the memory's folder another name")
    folder = Path(os.path.expanduser(text)).absolute()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; a memory lies in a folder")
    return folder
