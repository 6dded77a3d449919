"""Records and their images, written by as many processes as there are."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from mscke.benchmark.scenes import Scene, render
from mscke.system.files import read_kept, replacing
from mscke.system.workers import forks, in_processes

AT_ONCE = 250  # records that a process makes before it takes the next ones


def write_records(path: Path, size: int, make: Callable[[int], tuple[Scene, dict]]) -> Path:
    """Write records 0 … ``size`` − 1 of ``make`` to ``path`` and their images beside it.

    The JSON is written last, so its presence means that every image is there. What is there already is kept when its
    length and last record are those asked for. Processes share the work where they are forks: ``make`` must then be
    importable by name.
    """
    there = read_kept(path, lambda file: json.loads(file.read_text(encoding="utf-8")))
    if isinstance(there, list) and len(there) == size and there[-1] == json.loads(json.dumps(make(size - 1)[1])):
        return path
    path.unlink(missing_ok=True)  # its images are about to be replaced
    parts = [(path.parent, make, range(i, min(i + AT_ONCE, size))) for i in range(0, size, AT_ONCE)]
    desc = f"{path.stem.removesuffix('_data')} scenes"
    if len(parts) > 1 and forks():
        rows = in_processes(_paint, parts, desc=desc)
    else:
        rows = [_paint(*part) for part in tqdm(parts, desc=desc, mininterval=2)]
    with replacing(path) as whole:
        whole.write_text(json.dumps(list(chain.from_iterable(rows)), indent=1), encoding="utf-8")
    return path


def _paint(root: Path, make: Callable[[int], tuple[Scene, dict]], numbers: range) -> list[dict]:
    """Make these records, and write their images."""
    rows = []
    for scene, row in map(make, numbers):
        (root / row["image"]).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(render(scene)).save(root / row["image"], compress_level=1)
        rows.append(row)
    return rows
