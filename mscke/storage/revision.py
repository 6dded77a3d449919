"""When a new edit revises an earlier one: both state the same fact, and only the later may answer.

Two edits state the same fact when they are about the same picture and their prompts ask the same:

* the same picture is a file of the same bytes, wherever it lies;
* the same prompt is one of the same words, whatever their case and blanks, the stop at their end, characters that nobody
  sees, and which of Unicode's ways to write a letter was taken (NFKC);
* or, to a classifier that sees, one whose edit is no further from the earlier's, in squared distance, than the share
  :data:`SAME` of that at which ρ is 0.5.

Limits. A picture that was saved anew is another picture. Where a thing is called by another of its names ("on the red
card", "at the top left"), or something else is asked that follows ("is it an animal?"), the words do not show that it is
the same fact. A classifier may take it for one; else both edits stay, and the nearer answers. Two questions
that a classifier cannot tell apart are one fact to it. Notebook 09 measures all of these.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator, Sequence

from torch import Tensor

from mscke.benchmark.answers import fold
from mscke.benchmark.sample import Edit
from mscke.storage.pictures import is_file

STOPS = ".?! \u061f\u06d4\u3002\uff01\uff1f"  # and those of other scripts
SAME = 1 / 8  # of the squared distance at which ρ is 0.5; chosen on training records


def wording(prompt: str) -> str:
    """The prompt without what does not change its meaning."""
    return " ".join(fold(prompt).split()).rstrip(STOPS)


def picture_key(image: str) -> str:
    """SHA-256 of a picture's file, in hex; its path where there is no such file."""
    try:
        if is_file(image):
            found = os.stat(image)
            return _digest(image, found.st_size, found.st_mtime_ns)
    except OSError:  # it may not be read
        pass
    return image


@functools.lru_cache(maxsize=100_000)
def _digest(image: str, size: int, time: int) -> str:
    with open(image, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Facts:
    """What the edits of a memory are about, by id: finds those that a new one revises.

    ``pictures``: the :func:`picture_key` of each edit's image when it was added, whatever became of the file since.
    """

    def __init__(self, edits: Sequence[Edit] = (), pictures: Sequence[str] = ()):
        self._edits, self.pictures = list(edits), list(pictures)
        # the last edit in these words on this picture, and on it at all
        self._last: dict[tuple[str, ...], int] = {}
        # by id: the one before it of the same words, and on the same picture
        self._before: list[tuple[int, int]] = []

    def _enter(self) -> None:
        """Enter the edits that were not yet: a memory that is only read needs none."""
        for i in range(len(self._before), len(self._edits)):
            keys = self._keys(i)
            self._before.append(tuple(self._last.get(key, -1) for key in keys))
            self._last |= dict.fromkeys(keys, i)

    def _keys(self, i: int) -> tuple[tuple[str, ...], ...]:
        return (self.pictures[i], wording(self._edits[i].prompt)), (self.pictures[i],)

    def _forget(self, n: int) -> None:
        """Keep the first n: what came after them was not committed."""
        while len(self._before) > n:
            i = len(self._before) - 1
            for key, before in zip(self._keys(i), self._before.pop(), strict=True):
                self._last[key] = before
                if before < 0:
                    del self._last[key]
        del self._edits[n:], self.pictures[n:]

    def _earlier(self, i: int, by: int) -> Iterator[int]:
        """The ids before i, the last one first: of the same words (0) or on the same picture (1)."""
        while (i := self._before[i][by]) >= 0:
            yield i

    def revise(self, edits: Sequence[Edit], z: Tensor, matrix: Tensor, here: Tensor, within: float) -> list[int]:
        """Give new edits the next ids, one after the other; the ids that they revise, ascending.

        ``z`` (N, dim): their embeddings; ``matrix`` (n, dim): those of the edits before them, of which some
        are ``here`` (n,) bool. ``within``: squared distance of two edits on one picture up to which they state the
        same fact, 0 for none. One of the new edits may revise another.
        """
        self._forget(n := len(matrix))
        self._edits += edits
        self.pictures += [picture_key(edit.image) for edit in edits]
        self._enter()
        gone = set()
        stands = lambda i: i not in gone and (i >= n or bool(here[i]))  # noqa: E731
        vector = lambda i: z[i - n] if i >= n else matrix[i]  # noqa: E731
        for new in range(n, n + len(edits)):
            # of the same words no more than one stands: the last
            same = next(([i] for i in self._earlier(new, by=0) if stands(i)), [])
            if within:
                near = (i for i in self._earlier(new, by=1) if stands(i))
                same += [i for i in near if (vector(i) - vector(new)).square().sum() <= within]
            gone.update(same)
        return sorted(gone)
