"""What is frozen is computed once: a table of features by key, in memory or in a folder.

In a folder every row is written once and stays where it is: a file a column, appended to, and ``keys.jsonl``, a line a row.
A line is written after its row, so a row that was cut short has none. Rows are read where they lie, by the slices that
are asked for: the memory of a process does not grow with the table, and processes share it.
"""

from __future__ import annotations

import fcntl
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm


class Column:
    """One column of a table in a folder: ``column[rows]`` copies these rows from the disk, and lets go of its pages."""

    def __init__(self, path: Path, n: int, shape: Sequence[int], dtype: torch.dtype):
        self.path, self.shape, self.dtype = path, torch.Size([n, *shape]), dtype
        self._file = open(path, "rb")  # noqa: SIM115 (this very file, whatever takes its place)
        if os.fstat(self._file.fileno()).st_size < self.shape.numel() * dtype.itemsize:
            raise ValueError(f"{path.name} is cut short")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        mapped = np.memmap(self._file, _name(self.dtype), "r", shape=tuple(self.shape))
        return torch.from_numpy(np.array(mapped[rows if isinstance(rows, slice) else rows.numpy()]))


class FeatureTable:
    """Rows of features by key (a text, say), computed in batches when first asked for.

    ``compute`` maps a list of keys to a tuple of tensors, each (B, …), which are kept as ``dtype``. With a ``path`` the
    table lies in that folder, and what another process has put there is not computed again. :attr:`columns` are
    tensors, or :class:`Column` s in a folder.
    """

    def __init__(
        self,
        compute: Callable[[list[str]], tuple[Tensor, ...]],
        path: Path | None = None,
        batch_size: int = 256,
        dtype: torch.dtype = torch.float32,
    ):
        self.compute, self.path, self.batch_size, self.dtype = compute, path, batch_size, dtype
        self._forget()
        self._read()

    def _forget(self) -> None:
        self.rows: dict[str, int] = {}
        self.columns: tuple[Tensor | Column, ...] = ()
        self._n = 0  # rows in the folder
        self._read_to = self._inode = 0  # of keys.jsonl: bytes that were read, and of which file

    @property
    def _keys(self) -> Path:
        return self.path / "keys.jsonl"

    def _read(self) -> None:
        """Take up the rows that were put into the folder since it was read last."""
        if self.path is None or not self._keys.exists():
            return
        with open(self._keys, "rb") as file:
            if (inode := os.fstat(file.fileno()).st_ino) != self._inode:  # another process has made it anew
                self._forget()
                self._inode = inode
            file.seek(self._read_to)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]  # without a line that was cut short or is being written
        try:
            self._take(list(map(json.loads, text.splitlines())))
        except (ValueError, TypeError, KeyError, OSError) as error:
            warnings.warn(f"{self.path} is damaged and is made anew ({error})", stacklevel=3)
            self._forget()
        else:
            self._read_to += len(text)

    def _take(self, lines: list) -> None:
        """Lines of keys.jsonl: first what the columns are, then (key, stamp) of each row."""
        if not lines:
            return
        shapes = [column.shape[1:] for column in self.columns] or lines.pop(0)["shapes"]
        for key, stamp in lines:
            if key not in self.rows and stamp == self.stamp(key):
                self.rows[key] = self._n
            self._n += 1
        self._open(shapes)

    def _open(self, shapes: Sequence[Sequence[int]]) -> None:
        self.columns = tuple(Column(self._place(i), self._n, shape, self.dtype) for i, shape in enumerate(shapes))

    def _place(self, column: int) -> Path:
        return self.path / f"{column:02d}.{_name(self.dtype)}"

    def stamp(self, key: str) -> str:
        """What must stay as it was for a row in a folder to be good still; nothing by default."""
        return ""

    @torch.inference_mode()
    def __call__(self, keys: Sequence[str]) -> Tensor:
        """Row numbers (B,) of ``keys`` in :attr:`columns`, after computing those not there yet."""
        while new := [key for key in dict.fromkeys(keys) if key not in self.rows]:
            new.sort(key=len)  # texts of one length share a batch; the order of rows is of no consequence
            starts = range(0, len(new), self.batch_size)
            bar = tqdm(starts, desc="encoding", leave=False, disable=len(new) < 2000 or None)
            batches = (new[i : i + self.batch_size] for i in bar)
            if self.path is None:
                self._hold(batches)
            for batch in batches:
                self._add(batch)
        return torch.tensor([self.rows[key] for key in keys], dtype=torch.long)

    def _hold(self, batches: Iterable[list[str]]) -> None:
        """Put them into memory."""
        parts = [self.columns] if self.columns else []
        for batch in batches:
            parts.append(self._computed(batch))
            self.rows |= {key: len(self.rows) + i for i, key in enumerate(batch)}
        self.columns = tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def _computed(self, keys: list[str]) -> tuple[Tensor, ...]:
        return tuple(column.to("cpu", self.dtype) for column in self.compute(keys))

    def _add(self, keys: list[str]) -> None:
        """Put those of a batch that no process has put there yet into the folder."""
        with self._alone():
            self._read()
            keys = [key for key in keys if key not in self.rows]
            if not keys:
                return
            stamps = [self.stamp(key) for key in keys]  # taken before the images are read
            found = self._computed(keys)
            lines = [[key, stamp] for key, stamp in zip(keys, stamps, strict=True)]
            shapes = [list(column.shape[1:]) for column in found]
            if not self.columns:
                lines.insert(0, {"shapes": shapes})
                for old in self.path.glob("[0-9k]*"):  # of a damaged table; who reads it still can go on
                    old.unlink()
            for i, rows in enumerate(found):
                _append(self._place(i), self._n * rows[0].nbytes, rows.numpy().tobytes())
            text = "".join(json.dumps(line) + "\n" for line in lines).encode()
            _append(self._keys, self._read_to, text)
            self._read()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process adds to the folder meanwhile; the kernel lets go of the lock if this one is killed."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / "lock", "a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _append(path: Path, at: int, content: bytes) -> None:
    """Write at the end, which is ``at``: what lies beyond was cut short."""
    with open(path, "ab") as file:
        file.truncate(at)
        file.write(content)


class ImageTable(FeatureTable):
    """The keys are paths of images. In a folder the features of a file that was written anew since are void; within a
    process an image is taken to stay as it was when it was first asked for."""

    def stamp(self, key: str) -> str:
        try:
            found = os.stat(key)
        except OSError:
            return "not there"
        return f"{found.st_size} {found.st_mtime_ns}"
