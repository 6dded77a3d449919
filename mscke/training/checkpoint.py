"""A run's files, which are whole or not there; and what it needs to be stopped and to go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mscke.system.files import read_kept, replacing


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
    with replacing(folder / "checkpoint.pt") as path:
        torch.save(state, path)


def published(folder: Path) -> int:
    """How many epochs what others read is of."""
    curve = read_kept(folder / "curve.csv", pd.read_csv)  # written last
    weights = read_kept(folder / "model.safetensors", lambda path: safe_open(path, "pt"))
    return 0 if curve is None or weights is None else len(curve)


def publish(folder: Path, weights: dict[str, Tensor], rows: list[dict]) -> None:
    """Write weights and curve for others to read."""
    weights = {k: v.clone() for k, v in weights.items()}  # tied ones too: safetensors shares nothing
    with replacing(folder / "model.safetensors") as path:
        save_file(weights, path)
    with replacing(folder / "curve.csv") as path:
        pd.DataFrame(rows).to_csv(path, index=False)


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
