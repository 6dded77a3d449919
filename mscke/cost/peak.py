"""Peak memory of each of the paper's parts, each in a process of its own."""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch

from mscke.benchmark.sample import Edit, EditRecord
from mscke.classifier import ScopeClassifier
from mscke.config import Track, get_track
from mscke.cost.components import PARTS, Component, base_components, counterfactual_component, scope_components
from mscke.editors.grid import load_clip
from mscke.fetching.track import load_benchmark
from mscke.memory import EditMemory
from mscke.models.mllm import MLLM
from mscke.models.sources import device_of, load_mllm, make_counterfactual
from mscke.system.workers import in_processes

N_EDITS = 1000  # in the memory that is searched


def peak_memory(track: Track, backbone: str, batches: Sequence[int]) -> pd.DataFrame:
    """Columns part, batch, mib: what each part takes at its peak, weights included.

    The counterfactual model's is what it adds to a loaded base model, through whose vision it sees.
    """
    items = [(track.name, part, backbone, sorted(batches)) for part in PARTS]
    found = dict(zip(PARTS, in_processes(_peaks, items, track.workers, fresh=True), strict=True))
    rows = [
        (part, batch, peak / 2**20)
        for part, peaks in found.items()
        for batch, peak in zip(sorted(batches), peaks, strict=True)
    ]
    return pd.DataFrame(rows, columns=["part", "batch", "mib"])


def _peaks(track_name: str, part: str, backbone: str, batches: Sequence[int]) -> list[int]:
    """Bytes at each of ``batches``, which rise: a process's peak never falls. Weights are fresh ones."""
    track = get_track(track_name)
    records = load_benchmark(track).test
    base = load_mllm(track, backbone) if part.startswith("counter") else None
    if device_of(track).type == "cuda":
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats()
    start, peaks = held("VmRSS"), []
    make = _loaded(part, track, backbone, base)
    with torch.inference_mode():
        for batch in batches:
            for component in make(records[:batch]):
                component.run(batch)
            peaks.append(held("VmHWM") - start)
    return peaks


def _loaded(
    part: str, track: Track, backbone: str, base: MLLM | None
) -> Callable[[Sequence[EditRecord]], list[Component]]:
    """Load ``part``; its components for some records' in-scope queries."""
    if part == "scope classifier":
        classifier = ScopeClassifier(track.clip, encoder=load_clip(track, track.clip)).eval()
        classifier.to(device_of(track))
        memory = EditMemory(classifier.dim)
        edits = [Edit("", str(i), "") for i in range(N_EDITS)]
        memory.add(edits, torch.randn(N_EDITS, classifier.dim))
        return lambda records: scope_components(classifier, memory, [r.in_scope for r in records])
    if part == "base model":
        base = load_mllm(track, backbone)
        return lambda records: base_components(base, [r.in_scope for r in records])
    in_scope = make_counterfactual(track, base).eval()
    return lambda records: [
        base_components(base, [r.in_scope for r in records])[0],
        counterfactual_component(in_scope, records),
    ]


def held(field: str) -> int:
    """Memory of this process in bytes: ``VmRSS`` now, ``VmHWM`` at its peak; on a GPU torch's there."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() if field == "VmHWM" else torch.cuda.memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():  # macOS, in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # on Linux ru_maxrss starts at what the parent held, so that a child of a large process shows nothing
    line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])
