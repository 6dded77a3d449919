"""The multimodal edit memory (§3): edits beside their embeddings. What it can revise, undo and keep on disk is ours.

It lives in RAM, or is durable when opened on a path. Both answer and forget alike. A later edit of a fact takes the place
of an earlier one; :mod:`mscke.storage.revision` says when two edits state one fact::

    memory = EditMemory.of(classifier, "memory")    # begun there if there is none
    ids = memory.add(edits, embeddings)     # on disk when it returns
    memory.nearest(classifier.embed(queries))
    memory.undo()                           # as before; memory.at(version) and memory.log() look back
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from datetime import UTC, datetime
from operator import index
from pathlib import Path

import torch
from torch import Tensor

from mscke.benchmark.sample import Edit, Query
from mscke.storage.alone import in_turn, uninterrupted
from mscke.storage.changes import Change, Changes
from mscke.storage.revision import Facts
from mscke.storage.search import Index, checked
from mscke.storage.store import EditStore


@in_turn("embed_again")  # which takes minutes
class EditMemory:
    """Edits (image, prompt, answer) and a matrix of their embeddings, a row an edit.

    Each edit is embedded once, when it is written. Its id is its row, and is never used again. What is removed keeps
    its row, so that it can be brought back. ``within``: squared distance up to which two edits on one picture state
    the same fact; :meth:`of` takes it from a classifier. Threads may share a memory.
    """

    def __init__(self, dim: int, fingerprint: str = ""):
        self.dim, self.fingerprint, self.within = dim, fingerprint, 0.0
        self._store: EditStore | None = None
        self._recall([], [], torch.empty(0, dim), [])

    @classmethod
    def of(cls, classifier, path: str | Path | None = None) -> EditMemory:
        """The memory of this classifier: in RAM, or :meth:`open` for writing in folder ``path``, begun if there is none."""
        memory = cls.open(path, classifier.fingerprint(), classifier.dim) if path else cls(classifier.dim)
        memory.within = classifier.within
        return memory

    @classmethod
    def open(
        cls, path: str | Path, fingerprint: str | None = None, dim: int | None = None, read_only: bool = False
    ) -> EditMemory:
        """The memory kept in folder ``path``. With ``dim`` it is begun if there is none, else FileNotFoundError.

        One process writes at a time (else BlockingIOError). Any number read: they see it as it was when they opened it.
        It knows no classifier, so the same fact in other words is revised only in a memory of :meth:`of`. An edit shows
        the picture that it was stored with; a warning says if its file was overwritten since. A file that is
        overwritten while the memory is open is noticed when it is opened again.

        Raises ValueError if another classifier than ``fingerprint`` wrote it, or if it is damaged.
        """
        store = EditStore(path, dim, fingerprint, read_only)
        try:
            memory = cls(store.dim, store.fingerprint)
            memory._recall(*store.read())
        except BaseException:
            store.close()
            raise
        memory._store = store
        return memory

    def close(self) -> None:
        """Let another writer open the path."""
        if self._store:
            self._store.close()

    def __len__(self) -> int:
        return len(self._index.ids)

    def __getitem__(self, edit_id: int) -> Edit:
        self._require([index(edit_id)], self._changes.replaced)
        return self._edits[edit_id]

    def _require(self, ids: Iterable[int], also: Container[int] = ()) -> None:
        """Raise KeyError, with their numbers, for ids that are neither in memory nor among ``also``."""
        lacks = lambda i: not 0 <= i < len(self._edits) or not (self._index.here[i] or i in also)  # noqa: E731
        if missing := [i for i in set(ids) if lacks(i)]:
            raise KeyError(f"no edit with id {sorted(missing)} in memory")

    @property
    def ids(self) -> Tensor:
        """(N,) long, ascending."""
        return self._index.ids

    @property
    def embeddings(self) -> Tensor:
        """(N, dim) float32, in the order of :attr:`ids`."""
        return self._index.matrix[self._index.ids]

    def add(self, edits: Sequence[Edit], embeddings: Tensor) -> list[int]:
        """Store edits with their embeddings (N, dim); returns their ids.

        Earlier edits that one of them revises are no longer found. :meth:`log` says which; :meth:`undo` brings them
        back. Raises ValueError when the embeddings have another shape, or are not finite.
        """
        z = checked(embeddings, len(edits), self.dim)
        ids = range(n := len(self._edits), n + len(edits))
        replaced = self._facts.revise(edits, z, self._index.matrix, self._index.here, self.within)
        self._commit("add", ids, replaced, edits, z)
        return list(ids)

    def remove(self, ids: Iterable[int]) -> None:
        """Forget edits; what they replaced stays replaced. Raises KeyError for an id that is not there; then none goes."""
        self._require(gone := sorted({index(i) for i in ids}))
        self._commit("remove", gone)

    def undo(self) -> None:
        """Take back the last change that still stands. Raises ValueError when none does."""
        if not self._changes.standing:
            raise ValueError("nothing to undo: every change was taken back, or none was made")
        self._commit("undo", self._changes.standing[-1].ids)

    def log(self) -> list[Change]:
        """Every change (version, change, ids, time, replaced), the first one first; undone ones stay in it."""
        return list(self._changes.log)

    def at(self, version: int) -> EditMemory:
        """The memory after its first ``version`` changes: a copy in RAM; ValueError if it had fewer."""
        if not 0 <= version <= len(self._changes.log):
            raise ValueError(f"no version {version}: this memory has versions 0 to {len(self._changes.log)}")
        log, past = self._changes.log[:version], EditMemory(self.dim, self.fingerprint)
        past.within = self.within
        n = sum(len(c.ids) for c in log if c.change == "add")
        past._recall(self._edits[:n], self._facts.pictures[:n], self._index.matrix[:n], log)
        return past

    def distances(self, embeddings: Tensor, among: Tensor) -> Tensor:
        """Squared distance (B,) of each query to the one edit, or replaced one, that ``among`` names (else KeyError)."""
        self._require(among.tolist(), self._changes.replaced)
        return (embeddings.to(self._index.matrix) - self._index.matrix[among]).square().sum(-1)

    def nearest(self, embeddings: Tensor, k: int = 1, exact: bool = False) -> tuple[Tensor, Tensor]:
        """The k nearest edits of each query: (squared distances, ids), both (B, min(k, N)) on the CPU.

        Beyond :data:`mscke.storage.search.EXACT` edits compressed vectors are ranked first, unless the search is to be ``exact``.
        Raises ValueError for a query that is not finite or of another width, and for k below 1.
        """
        return self._index.nearest(embeddings.to(self._index.matrix), k, exact)

    def embed_again(self, classifier, path: str | Path) -> EditMemory:
        """These edits under another classifier, in a new memory at ``path``; ids count from 0 again.

        Raises FileExistsError if something was written there before.
        """
        ids = self.ids.tolist()
        edits = self._store.edits(ids) if self._store else [self._edits[i] for i in ids]
        z = classifier.embed([Query(e.prompt, e.image) for e in edits], [e.answer for e in edits])
        memory = EditMemory.open(path, classifier.fingerprint(), classifier.dim)
        if memory.log():
            memory.close()
            raise FileExistsError(f"there is a memory at {path} already; give a path where there is none")
        memory.add(edits, z)  # all of them: none revises another
        memory.within = classifier.within
        return memory

    @torch.inference_mode(False)  # begun while scoring, it can be added to at any time
    def _commit(self, change: str, ids: Sequence[int], replaced=(), edits=(), z: Tensor | None = None):
        """Make a change: on disk first, so that what is acknowledged is durable."""
        if not ids:
            return
        entry = Change(len(self._changes.log) + 1, change, tuple(ids), datetime.now(UTC), tuple(replaced))
        with uninterrupted():
            if self._store:
                self._write(entry, edits, z)
            if z is not None:
                self._index.add(z)
                self._edits += edits
            self._changes.enter(entry, self._index.here)
            self._index.look()

    def _write(self, entry: Change, edits: Sequence[Edit], z: Tensor | None) -> None:
        """Append to the disk; where that fails become what is there: the change may have been committed."""
        try:
            self._store.append(entry, edits, z)
        except BaseException as error:
            if not isinstance(error, PermissionError | FileNotFoundError):  # which come before the writing
                self._recall(*self._store.read())
            raise

    @torch.inference_mode(False)
    def _recall(self, edits: Sequence[Edit], pictures: Sequence[str], embeddings: Tensor, log) -> None:
        """Become what ``log`` makes of the edits (N) ever added, what they showed, and their embeddings (N, dim)."""
        self._edits, self._changes, self._facts = list(edits), Changes(), Facts(edits, pictures)
        self._index = Index(embeddings)
        for entry in log:
            self._changes.enter(entry, self._index.here)
        self._index.look()
