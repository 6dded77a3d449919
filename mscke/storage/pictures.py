"""An edit means the picture that it was stored with: what is kept of it, and whether its file still shows it."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import stat
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

from mscke.system.files import replacing

SETTLED = 2 * 10**9  # nanoseconds: some file systems count time in steps of two seconds
_MAKING = threading.Lock()


class Picture(NamedTuple):
    """A file's bytes, their SHA-256, how many they are, and when it was last changed (None: just now)."""

    picture: bytes
    digest: bytes
    size: int
    mtime: int | None


def take(image: str) -> Picture:
    """What is stored of the picture at this path. Raises FileNotFoundError if it cannot be read."""
    try:
        if not is_file(image):
            raise OSError("no file")
        with open(image, "rb") as file:
            changed = os.fstat(file.fileno()).st_mtime_ns  # asked first: who changes it while it is read is noticed
            picture = file.read()
    except OSError as error:
        raise FileNotFoundError(f"an edit's image {image} cannot be read; nothing was stored") from error
    settled = changed < time.time_ns() - SETTLED  # else it could be changed once more without another time
    return Picture(picture, hashlib.sha256(picture).digest(), len(picture), changed if settled else None)


def is_file(image: str) -> bool:
    """Whether there is a file at the path: no folder, and nothing that would make who opens it wait."""
    try:
        return stat.S_ISREG(os.stat(image).st_mode)
    except OSError:
        return False


def shows(image: str, digest: bytes, size: int | None, mtime: int | None) -> bool | None:
    """Whether the file still shows what was stored; None where there is none to read.

    A file of this ``size`` and ``mtime`` is trusted, any other is read: a million need not be.
    """
    try:
        found = os.stat(image)
        if (found.st_size, found.st_mtime_ns) == (size, mtime):
            return True
        if not is_file(image):
            return None
        with open(image, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest() == digest
    except OSError:
        return None


def write_out(folder: Path, picture: bytes, image: str) -> Path:
    """The picture as a file in ``folder``, named by what it shows, so that several may write it at the same time; it
    ends as ``image`` does, where that is a file name's usual end."""
    folder.mkdir(exist_ok=True)
    suffix = Path(image).suffix
    usual = re.fullmatch(r"\.[A-Za-z0-9]{1,8}", suffix)
    path = folder / (hashlib.sha256(picture).hexdigest()[:16] + (suffix if usual else ""))
    if path.is_file() and path.read_bytes() == picture:
        return path
    with replacing(path) as whole:
        whole.write_bytes(picture)
    return path


def scratch() -> Path:
    """A folder for pictures that lives as long as this process."""
    with _MAKING:
        return Path(_scratch(os.getpid()).name)


@functools.cache
def _scratch(process: int) -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="mscke-pictures-")
