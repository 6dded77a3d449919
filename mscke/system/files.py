"""Files that are whole or not there, and the code that made them, named."""

from __future__ import annotations

import ast
import hashlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TypeVar

Kept = TypeVar("Kept")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place if the block ends well, and vanishes if not.

    It is this thread's alone: two may write the same. Raises OSError with ``path``'s name where the disk is full, say.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.filename not in (None, str(temporary)) or error.errno is None:
            raise
        raise OSError(error.errno, f"{path} cannot be written ({error.strerror})") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_kept(path: Path, read: Callable[[Path], Kept]) -> Kept | None:
    """What ``read`` makes of a file that we keep; None where there is none, or where it is damaged (a full disk, a power
    cut): a warning then names it, and who asked makes it anew."""
    if not path.exists():
        return None
    try:
        return read(path)
    except Exception as error:  # each format has errors of its own
        reason = str(error).partition("\n")[0] or type(error).__name__
        warnings.warn(f"{path} is damaged and is made anew ({reason})", stacklevel=3)
        return None


def code_of(*modules: str) -> str:
    """Eight hex digits that name what these modules of ours do: comments, docstrings and layout do not count."""
    trees = [ast.parse(Path(import_module(m).__file__).read_bytes()) for m in modules]
    for node in (n for tree in trees for n in ast.walk(tree)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body[0].value.value = ""
    text = "".join(map(ast.unparse, trees))  # ast.dump's depends on Python's version
    return hashlib.sha256(text.encode()).hexdigest()[:8]
