"""What was done to a memory, in order: what it *is* follows from that."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from torch import Tensor


class Change(NamedTuple):
    """One change: the ids that were added, removed, or by an undo set back; and those of earlier edits that what was
    added has ``replaced``."""

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
