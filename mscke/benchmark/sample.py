"""One FGVEdit record: an edit and the five queries that test it."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from mscke.benchmark.answers import is_text

FIELDS = ("src", "alt", "rephrase", "image", "fg_gen_q", "fg_gen_a", "fg_loc_q", "fg_loc_a", "loc", "loc_ans")
ANSWERS = ("alt", "fg_gen_a", "fg_loc_a", "loc_ans")
SHOWN = 5  # bad records that one error message spells out


class RecordError(ValueError):
    """A benchmark file cannot be used; the message names the record, the field and the fix."""


def listed(lines: Sequence[str]) -> list[str]:
    """The first of ``lines`` as an error message spells them out, and how many more there are."""
    more = [f"  … and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return [*lines[:SHOWN], *more]


@dataclass(frozen=True)
class Query:
    """A question about an image (absolute path), or text alone (``image=None``). Checked by :func:`_check`."""

    question: str
    image: str | None = None

    def __post_init__(self):
        _check(self, "question")


@dataclass(frozen=True)
class Edit:
    """(i_e, t_e, y_e): the image (absolute path), the edit prompt and the target answer. Checked by :func:`_check`."""

    image: str
    prompt: str
    answer: str

    def __post_init__(self):
        _check(self, "prompt", "answer")


def _check(part: Query | Edit, *texts: str) -> None:
    """Raise TypeError unless these fields are text and the image is a path or, in a query, None.

    ValueError for half a character (a lone surrogate) and for a path with a NUL. A path is kept as text.
    """
    for name in texts:
        if not isinstance(found := getattr(part, name), str):
            raise TypeError(f"{type(part).__name__}: {name} is {reprlib.repr(found)}; give text")
        if not found.isascii() and not is_text(found):
            raise ValueError(f"{type(part).__name__}: {name} is {found!a}, with half a character; write it anew")
    if (image := part.image) is None and isinstance(part, Query):
        return
    path = os.fspath(image) if isinstance(image, str | os.PathLike) else None
    if not isinstance(path, str):
        raise TypeError(f"{type(part).__name__}: image is {reprlib.repr(image)}; give the path of a file")
    if "\0" in path or not is_text(path):
        raise ValueError(f"{type(part).__name__}: image is {path!a}, no file's name in UTF-8; rename the file")
    object.__setattr__(part, "image", path)


@dataclass(frozen=True)
class EditRecord:
    """An edit with what tests it. ``id`` is the record's place in its file, counted from 0."""

    id: int
    edit: Edit
    rephrase: Query
    in_scope: Query
    in_scope_answer: str
    out_of_scope: Query
    out_of_scope_answer: str
    locality: Query
    locality_answer: str
    meta: dict = field(default_factory=dict, hash=False)

    @property
    def queries(self) -> dict[str, Query]:
        """The five queries, by what each of them tests."""
        return {
            "reliability": Query(self.edit.prompt, self.edit.image),
            "generality": self.rephrase,
            "in_scope": self.in_scope,
            "out_of_scope": self.out_of_scope,
            "locality": self.locality,
        }

    @property
    def answers(self) -> dict[str, str]:
        """What an ideal edited model answers to each of :attr:`queries`."""
        same = dict.fromkeys(("reliability", "generality"), self.edit.answer)
        scope = {"in_scope": self.in_scope_answer, "out_of_scope": self.out_of_scope_answer}
        return same | scope | {"locality": self.locality_answer}

    def told(self, what: str, role: str) -> str:
        """The ``reference``, ``attribute`` or ``hardness`` of a role's question: "unknown" if not told."""
        return self.meta.get(what, {}).get(role, "unknown")
