"""When a new edit revises an earlier one: both state the same fact, and only the later may answer.

Two edits state the same fact when they are about the same picture and their prompts ask the same:

* the same picture is a file of the same bytes, wherever it lies;
* the same prompt is one of the same words: case, blanks, the closing stop and Unicode's ways to write a letter apart;
* or, to a classifier that sees, one whose edit lies within :data:`SAME` of the way to the edge of the earlier's scope.

Limits. A picture that was saved anew is another picture. A thing that is called by another of its names ("on the red
card", "at the top left") is another fact, and so is what follows from one ("is it an animal?"): both edits stay, and
the nearer answers. Two questions that a classifier cannot tell apart are one fact to it. Notebook 07 measures all of these.
"""

from __future__ import annotations

import functools
import hashlib
import os
import unicodedata
from collections.abc import Iterator, Sequence

from torch import Tensor

from mscke.benchmark.sample import Edit

SAME = 1 / 8  # of the squared distance at which ρ is 0.5; chosen on training records


def wording(prompt: str) -> str:
    """The prompt without what does not change its meaning."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split()).rstrip(".?! ")


def picture_key(image: str) -> str:
    """SHA-256 of a picture's file, in hex; its path where there is no such file."""
    try:
        found = os.stat(image)
    except OSError:
        return image
    return _digest(image, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=100_000)
def _digest(image: str, size: int, time: int) -> str:
    with open(image, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Facts:
    """What the first ``n`` edits of a memory are about: finds those that a new one revises."""

    def __init__(self, edits: Sequence[Edit] = ()):
        self._last: dict[
            tuple[str, ...], int
        ] = {}  # the last edit in these words on this picture, and on it at all
        self._before: list[
            tuple[int, int]
        ] = []  # by id: the one before it of the same words, and on the same picture
        for edit in edits:
            self._enter(edit)

    @property
    def n(self) -> int:
        return len(self._before)

    def _enter(self, edit: Edit) -> None:
        """Give the edit the next id."""
        picture = picture_key(edit.image)
        keys = (picture, wording(edit.prompt)), (picture,)
        self._before.append(tuple(self._last.get(key, -1) for key in keys))
        self._last |= dict.fromkeys(keys, self.n - 1)

    def _earlier(self, i: int, by: int) -> Iterator[int]:
        """The ids before i, the last one first: of the same words (0) or on the same picture (1)."""
        while (i := self._before[i][by]) >= 0:
            yield i

    def revise(
        self, edits: Sequence[Edit], z: Tensor, matrix: Tensor, here: Tensor, within: float
    ) -> list[int]:
        """Give new edits the next ids, one after the other; the ids that they revise, ascending.

        ``z`` (N, dim): their embeddings; ``matrix`` (n, dim): those of the edits before them, of which some
        are ``here`` (n,) bool. ``within``: squared distance of two edits on one picture up to which they state the
        same fact, 0 for none. One of the new edits may revise another.
        """
        n, gone = self.n, set()
        stands = lambda i: i not in gone and (i >= n or bool(here[i]))  # noqa: E731
        vector = lambda i: z[i - n] if i >= n else matrix[i]  # noqa: E731
        for edit in edits:
            self._enter(edit)
            new = self.n - 1
            # of the same words no more than one stands: the last
            same = next(([i] for i in self._earlier(new, by=0) if stands(i)), [])
            if within:
                near = (i for i in self._earlier(new, by=1) if stands(i))
                same += [i for i in near if (vector(i) - vector(new)).square().sum() <= within]
            gone.update(same)
        return sorted(gone)
