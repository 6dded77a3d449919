"""What a damaged edit memory still holds, in a new one.

A memory whose ids or versions repeat or leave some out does not open: its log no longer says which edits its removals meant.
"""

from __future__ import annotations

import warnings
from os import PathLike

from mscke.memory import EditMemory
from mscke.storage.changes import whole
from mscke.storage.search import checked
from mscke.storage.store import EditStore


def recover(path: str | PathLike, to: str | PathLike) -> EditMemory:
    """The edits of the memory at ``path`` in a new one at ``to``, as one change; ids count from 0 again.

    They are those that stood after the last change before the damage, and every one that was added since. What
    was removed or undone since is among them, and none takes another's place, though they state one fact: a warning says
    how many changes were not repeated. Nothing is changed at ``path``. Raises FileExistsError if something was written at ``to`` before, and what
    :meth:`EditMemory.open` raises but for this damage.
    """
    store = EditStore(path, None, None, read_only=True)
    edits, pictures, embeddings, changes = store.read(damaged=True)
    sound = changes[: whole(changes)]
    n = sum(len(c.ids) for c in sound if c.change == "add")
    before = EditMemory(store.dim)
    before._recall(edits[:n], pictures[:n], embeddings[:n], sound)
    ids = [*before.ids.tolist(), *range(n, len(edits))]
    memory = EditMemory.open(to, store.fingerprint, store.dim)
    if memory.log():
        memory.close()
        raise FileExistsError(f"there is a memory at {to} already; give a path where there is none")
    some = [edits[i] for i in ids]
    memory._commit("add", range(len(ids)), (), some, checked(embeddings[ids], len(ids), store.dim))
    memory._recall(*memory._store.read())  # with what they show
    if lost := sum(c.change != "add" for c in changes[len(sound) :]):
        warnings.warn(
            f"{path}: {lost} removals or undos after its damage were not repeated at {to}; look through what is there",
            stacklevel=2,
        )
    return memory
