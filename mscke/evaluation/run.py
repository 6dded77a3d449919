"""The main results as stage outputs: each method's rows are computed once and kept, backbones side by side."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pandas as pd

from mscke.benchmark import load_benchmark
from mscke.config import ASSETS, ROOT, Track, get_track
from mscke.editors import build
from mscke.evaluation.protocol import evaluate, save_rows
from mscke.workers import in_processes

ABOVE = ("report",)  # what rows do not depend on


def made_of() -> str:
    """Sixteen hex digits that name the code and the pretrained weights that rows come from.

    Records, trained weights and rows follow from these; rows of other code or weights are made anew.
    """
    sources = [
        p for p in (ROOT / "mscke").rglob("*.py") if p.relative_to(ROOT / "mscke").parts[0] not in ABOVE
    ]
    weights = [p for p in ASSETS.rglob("*.safetensors") if "trained" not in p.parts]
    parts = [hashlib.sha256(p.read_bytes()).digest() for p in sorted(sources) + sorted(weights)]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def run_backbone(track_name: str, backbone: str, key: str) -> Path:
    """Evaluate every editor on ``backbone``, each test record edited alone; the folder of the rows."""
    track = get_track(track_name)
    bench, base = load_benchmark(track), build.load_base(track, backbone)
    folder = track.outputs / "rows" / key / backbone
    for editor in build.editors(track, bench, base):
        path = folder / f"{editor.name}.parquet"
        if not path.exists():
            save_rows(evaluate(editor, base, bench.test, track.name), path)
    return folder


def run_track(track: Track) -> pd.DataFrame:
    """Rows of every editor on every backbone (columns: :func:`mscke.evaluation.protocol.evaluate`)."""
    key = made_of()
    folders = in_processes(
        run_backbone, [(track.name, b, key) for b in track.backbones], track.workers, "backbones"
    )
    files = [folder / f"{method}.parquet" for folder in folders for method in build.METHODS]
    return pd.concat([pd.read_parquet(path) for path in files], ignore_index=True)
