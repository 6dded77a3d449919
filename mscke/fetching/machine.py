"""What the paper track wants of this machine: packages, disk, driver and GPU.

Every function says in a few words what it found, or raises :class:`FetchError` that says what to do about it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import torch
from transformers.utils.versions import require_version

from mscke.config import Track
from mscke.fetching.lock import FetchError

CARDS = {1: 24e9, 2: 48e9}  # bytes of GPU memory, by the number of backbones (README: how that was counted)
NEARLY = 0.95  # of which a card of that size shows at least


@dataclass(frozen=True)
class Room:
    """What is still to come to ``folder``, in bytes, and what to do where its disk is too full."""

    what: str
    folder: Path
    size: float
    fix: str

    @property
    def there(self) -> Path:
        """The folder, or the one above that is there already."""
        return next(path for path in (self.folder, *self.folder.parents) if path.exists())


def by_disk(rooms: Iterable[Room]) -> list[list[Room]]:
    """Those that share a disk together."""
    found = {}
    for room in rooms:
        found.setdefault(room.there.stat().st_dev, []).append(room)
    return list(found.values())


def disk(rooms: list[Room]) -> str:
    """Of the one disk that all of ``rooms`` are on: what is free, and what is to come."""
    free, needed = shutil.disk_usage(rooms[0].there).free, sum(room.size for room in rooms)
    parts = "; ".join(f"{shown(room.size)} of {room.what} in {room.folder}" for room in rooms)
    said = f"{shown(free)} free; still to come, at most: {parts}"
    if free < needed:
        raise FetchError(f"{said}. {'; or '.join(room.fix for room in rooms)}")
    return said


def package(requirement: str) -> str:
    """``requirement`` as pip takes it, if what is installed meets it."""
    try:
        require_version(requirement)
    except ImportError as error:
        missing = isinstance(error, PackageNotFoundError)
        why = f"{requirement} is not installed" if missing else str(error).partition("\n")[0]
        raise FetchError(f"{why}: pip install -e '.[paper]', in the environment that make takes") from None
    return f"{requirement} is met"


def gpu(track: Track) -> str:
    """The GPU that ``track`` would compute on, if PyTorch can use it and both backbones fit."""
    if track.device == "cpu":
        return "none is wanted: MSCKE_CPU=1"
    if not torch.cuda.is_available():
        raise FetchError(f"{why_no_gpu()}. MSCKE_CPU=1 goes without, which may take months")
    name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    built = [int(found[1]) for arch in torch.cuda.get_arch_list() if (found := re.match(r"sm_(\d+)", arch))]
    major, minor = torch.cuda.get_device_capability()
    if built and 10 * major + minor < min(built):
        raise FetchError(
            f"{name} is of compute capability {major}.{minor}, and PyTorch {torch.__version__} is built for "
            f"{min(built) / 10} and newer: take a newer GPU"
        )
    said, wanted = f"{name}, {shown(memory)}", CARDS[len(track.backbones)]
    if memory < NEARLY * wanted and not track.eight_bit:
        smaller = f"PRESET=blip2 wants {shown(CARDS[1])}, " if len(track.backbones) > 1 else ""
        raise FetchError(
            f"{said}; by our count {shown(wanted)} are wanted for {' and '.join(track.backbones)}: take a larger GPU; "
            f"{smaller}MSCKE_8BIT=1 keeps the language models in 8 bits"
        )
    return said


def why_no_gpu() -> str:
    """Why PyTorch sees no GPU, as it says itself, and what to do about it."""
    why = "no CUDA device is visible"
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        why = str(error).strip().partition("\n")[0]
    return (
        f"PyTorch {torch.__version__}, built for CUDA {torch.version.cuda}, says: {why}. Run where there is a GPU and a "
        "driver for this CUDA, with the PyTorch of requirements.lock (make env), and look at CUDA_VISIBLE_DEVICES"
    )


def shown(count: float) -> str:
    """Bytes, as a reader takes them in."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
