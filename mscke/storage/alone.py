"""Who changes a memory does so alone: one process has its folder, one thread its object, and no interrupt comes between."""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType

LOCK = "writer.lock"


class FolderLock:
    """A folder's lock, held by this process until it is released: by the kernel when the process is killed.

    Raises BlockingIOError while another has it, OSError where nothing can be written.
    """

    def __init__(self, folder: Path):
        self._process, self._path = os.getpid(), folder / LOCK
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (stays open)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            reason = f"{folder} cannot be written ({error.strerror}); to read it give read_only=True"
            raise OSError(error.errno, reason) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise BlockingIOError(
                f"{folder} is being written by another; close that one, or open this one with read_only=True"
            ) from None

    @property
    def _ours(self) -> bool:
        return not self._file.closed and os.getpid() == self._process

    @property
    def held(self) -> bool:
        """Whether this process has the lock of what is at the path now: a fork has the file, too, but neither holds the
        lock nor lets go of it; and a folder that was moved or removed is no longer the one that was locked."""
        if not self._ours:
            return False
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path))
        except OSError:
            return False

    def release(self) -> None:
        """Let another have it."""
        if self._ours:  # wherever its folder went
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()


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


def in_turn(*but: str) -> Callable[[type], type]:
    """Let threads into an object one at a time: its public methods and properties, ``but`` those named, take turns.

    What one of them returns is of the object between two changes; between two calls there may be a change.
    """

    def begin(init: Callable) -> Callable:
        @functools.wraps(init)
        def with_turn(self, *args, **options):
            self._turn = threading.RLock()
            init(self, *args, **options)

        return with_turn

    def wait(method: Callable) -> Callable:
        @functools.wraps(method)
        def alone(self, *args, **options):
            with self._turn:
                return method(self, *args, **options)

        return alone

    def decorate(cls: type) -> type:
        for name, member in list(vars(cls).items()):
            if name == "__init__":
                setattr(cls, name, begin(member))
            elif name in but or (name.startswith("_") and name not in ("__len__", "__getitem__")):
                continue
            elif isinstance(member, FunctionType):
                setattr(cls, name, wait(member))
            elif isinstance(member, property):
                setattr(cls, name, property(wait(member.fget)))
        return cls

    return decorate
