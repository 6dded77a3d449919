"""The main results as stage outputs: each method's rows are computed once and kept.

On a plain CPU the backbones are evaluated side by side. ``accelerate launch -m mscke.evaluation.run --track …``
shares out the records instead; both train first what is not trained yet, and give the same rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from mscke.benchmark.sample import EditRecord
from mscke.config import ASSETS, ROOT, Track, get_track
from mscke.editors import build
from mscke.evaluation.outcomes import Outcomes, ask_all, own_scores
from mscke.evaluation.protocol import PROTOCOLS, evaluate_shared, named, save_rows, shared
from mscke.fetching.track import Benchmark, load_benchmark
from mscke.models.mllm import MLLM
from mscke.models.sources import device_of
from mscke.system.files import read_kept
from mscke.system.workers import in_processes, processes

ABOVE = ("report",)  # what rows do not depend on


def made_of(track: Track) -> str:
    """Sixteen hex digits that name the code, the pretrained weights and the kind of device that rows come from.

    Records and rows follow from these, and trained weights, which their own runs hold to what they were made of
    (:mod:`mscke.training.checkpoint`); rows of other code or weights are made anew.
    """
    sources = [p for p in (ROOT / "mscke").rglob("*.py") if p.relative_to(ROOT / "mscke").parts[0] not in ABOVE]
    weights = [p for kind in ("*.safetensors", "*.json") for p in ASSETS.rglob(kind) if "trained" not in p.parts]
    parts = [hashlib.sha256(p.read_bytes()).digest() for p in sorted(sources) + sorted(weights)]
    fetched = track.lock.read_bytes() if track.fetched and track.lock.exists() else b""
    parts += [fetched, repr((track.eight_bit, device_of(track).type)).encode()]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def run_backbone(track_name: str, backbone: str, key: str) -> Path:
    """Evaluate every method on ``backbone``, each test record edited alone; the folder of the rows."""
    track = get_track(track_name)
    bench, base = load_benchmark(track), build.load_base(track, backbone)
    folder = rows_folder(track, base, key)
    for method in build.METHODS:
        _kept(folder / f"{method}.parquet", lambda method=method: _rows(track, bench, base, method, key))
    return folder


def _rows(track: Track, bench: Benchmark, base: MLLM, method: str, key: str) -> pd.DataFrame:
    """Rows of one method; a routed one's are looked up in the answers of both models it chooses from."""
    if method in build.IN_SCOPE:
        both = both_ways(track, bench, base, build.IN_SCOPE[method], key)
        editor = build.editor(track, bench, base, method)
        rows = both.rows(own_scores(editor.classifier, bench.test) >= editor.threshold)
    elif method == "MEND":  # MSCKE-MEND's answers in scope
        rows = both_ways(track, bench, base, method, key).taken
    else:
        return evaluate_shared(build.editor(track, bench, base, method), base, bench.test, track.name)
    return named(rows, track.name, base.name, method)


def both_ways(
    track: Track,
    bench: Benchmark,
    base: MLLM,
    answerer: str,
    key: str | None = None,
    others: tuple[str, Sequence[EditRecord]] | None = None,
) -> Outcomes:
    """Both answers to every test query, under both protocols, asked once and kept.

    ``answerer``, who answers in scope: one of the values of ``build.IN_SCOPE``. ``key``: of :func:`made_of`.
    ``others``: what to call other records than the test split's, and they; these are asked under ``generated`` alone.
    """
    name, records = others or ("", bench.test)
    protocols = ("generated",) if others else tuple(PROTOCOLS)
    folder = rows_folder(track, base, key or made_of(track)) / name

    def ask(who: str) -> pd.DataFrame:
        in_scope = None if who == "nobody" else build.answerer(track, bench, base, who)
        return shared(lambda part: ask_all(base, in_scope, part, protocols), records)

    sides = (_kept(folder / f"taken by {who}.parquet", lambda who=who: ask(who)) for who in ("nobody", answerer))
    return Outcomes(*sides)


def kept(track: Track, name: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """What ``make`` has measured with this code, once: a notebook that is run again times nothing."""
    return _kept(track.outputs / "rows" / made_of(track) / f"{name}.parquet", make)


def rows_folder(track: Track, base: MLLM, key: str) -> Path:
    """Where rows of one backbone are kept; ``key`` is :func:`made_of`'s."""
    return track.outputs / "rows" / key / base.name


def _kept(path: Path, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    if (rows := read_kept(path, pd.read_parquet)) is None:
        rows = make()
        if processes().is_main_process:
            save_rows(rows, path)
        processes().wait_for_everyone()
        rows = pd.read_parquet(path)
    return rows


def run_track(track: Track) -> pd.DataFrame:
    """Rows of every editor on every backbone (columns: :func:`mscke.evaluation.protocol.evaluate`)."""
    key = made_of(track)
    folders = in_processes(run_backbone, [(track.name, b, key) for b in track.backbones], track.workers, "backbones")
    files = [folder / f"{method}.parquet" for folder in folders for method in build.METHODS]
    return pd.concat([pd.read_parquet(path) for path in files], ignore_index=True)


if __name__ == "__main__":
    rows = run_track(build.trained_track(__doc__))
    if processes().is_main_process:
        means = rows.groupby(["backbone", "protocol", "method", "metric"], sort=False)["value"].mean()
        print((100 * means).unstack().round(2).to_string())
    processes().destroy_process_group()
