"""A run's files, which are whole or not there; and what it needs to be stopped and to go on."""

from __future__ import annotations

import ast
import hashlib
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TypeVar

import pandas as pd
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

Kept = TypeVar("Kept")


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """``write`` to a temporary file that then takes ``path``'s place: nothing is ever half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # of this process: two may write the same
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:  # a full disk, say: leave nothing on it
        temporary.unlink(missing_ok=True)
        raise


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
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node) is not None
        ):
            node.body[0].value.value = ""
    text = "".join(map(ast.unparse, trees))  # ast.dump's depends on Python's version
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def read(folder: Path, made_of: dict) -> dict:
    """The checkpoint in ``folder``, empty if there is none; ValueError if it is of a run made of other things."""

    def load(path: Path) -> dict:  # mapped: of a run that is over, little is read
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)

    if not (saved := read_kept(folder / "checkpoint.pt", load)):
        return {}
    keys = made_of.keys() | saved["made_of"].keys()
    if other := sorted(k for k in keys if saved["made_of"].get(k) != made_of.get(k)):
        raise ValueError(f"{folder} holds a run with other {', '.join(other)}: delete it to train anew")
    return saved


def save(folder: Path, state: dict) -> None:
    """Replace the checkpoint in ``folder``."""
    write_whole(folder / "checkpoint.pt", lambda p: torch.save(state, p))


def published(folder: Path) -> int:
    """How many epochs what others read is of."""
    curve = read_kept(folder / "curve.csv", pd.read_csv)  # written last
    weights = read_kept(folder / "model.safetensors", lambda path: safe_open(path, "pt"))
    return 0 if curve is None or weights is None else len(curve)


def publish(folder: Path, weights: dict[str, Tensor], rows: list[dict]) -> None:
    """Write weights and curve for others to read."""
    weights = {k: v.clone() for k, v in weights.items()}  # tied ones too: safetensors shares nothing
    write_whole(folder / "model.safetensors", lambda p: save_file(weights, p))
    write_whole(folder / "curve.csv", lambda p: pd.DataFrame(rows).to_csv(p, index=False))


@contextmanager
def stop_asked(accelerator: Accelerator) -> Iterator[None]:
    """Within it SIGINT and SIGTERM set Accelerate's trigger, which all processes can check, and do no more.

    A second one acts as usual; not among several processes, whose launcher repeats the first. Nothing
    changes outside the main thread, where Python takes no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def asked(*_) -> None:
        accelerator.set_trigger()
        if accelerator.num_processes == 1:
            restore()

    before = {number: signal.signal(number, asked) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        restore()


def random_state() -> list[Tensor]:
    """The states of torch's generators: the processor's, and the current GPU's if one is in use."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(gpu) for gpu in gpus())]


def set_random_state(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for gpu, state in zip(gpus(), states[1:], strict=False):
        torch.cuda.set_rng_state(state, gpu)


def gpus() -> list[int]:
    """The GPU that this process uses, if it uses one."""
    return [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
