"""The edit memory from one edit to a million, as rows of ``bench.csv``.

* ``memory_route``: seconds to route one query, its embedding and the search, against its embedding alone.
  The search is exact up to :data:`mscke.storage.search.EXACT` edits, beyond them by FAISS's codes; ``memory_route_exact`` is
  the last size against exact search among as many;
* ``memory_bandwidth``: the bytes of the matrix that an exact search of one query gets through in a second,
  against those that summing it does;
* ``memory_recall``: the share of queries for which the codes find the edit that exact search finds, among
  those that an edit in memory is to answer; ``…_out_of_scope`` among those that none is, whose nearest
  edit is a stranger; ``memory_same_decision``: the share of all that are answered by the same edit, or none;
* ``memory_codes``: seconds to make the codes; ``memory_add``, ``memory_open``, ``memory_bytes``: what it costs
  to have the memory on disk.

Beyond the real edits the memory holds embeddings :func:`~mscke.cost.timing.alike` theirs. The
queries are the real edits' own, so the edit that each should find is among the n.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mscke.benchmark.sample import Edit, EditRecord
from mscke.classifier import ScopeClassifier
from mscke.cost.components import in_turns
from mscke.cost.timing import alike, compare, encoding, many
from mscke.memory import EditMemory
from mscke.storage.search import EXACT, coded

SIZES = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)
IN_SCOPE = ("reliability", "generality", "in_scope")
PART = 50_000  # edits written at once
ASKED = 250  # records whose queries measure recall
THRESHOLD = 0.5  # of the router


@torch.inference_mode()
def rows(classifier: ScopeClassifier, records: Sequence[EditRecord], folder: str | Path, sizes=SIZES) -> list[dict]:
    """All rows; ``folder`` receives a memory of the last of ``sizes`` (1.3 GB at a million edits)."""
    edits = [r.edit for r in records]
    real = classifier.embed([r.queries["reliability"] for r in records], [e.answer for e in edits])
    z, embed, found = alike(real, sizes[-1]), encoding(classifier, [records[0].in_scope]), []
    for n in sizes[:-1]:
        memory = EditMemory(classifier.dim)
        memory.add(many(edits, n), z[:n])
        found += routing(embed, memory)
    found += [bandwidth(memory, embed(1)), *on_disk(edits, real, Path(folder, "real"))[1]]
    Path(folder, "no picture").touch()
    bare = many([replace(e, image=str(Path(folder, "no picture"))) for e in edits], sizes[-1])
    memory, costs = on_disk(bare, z, Path(folder, "large"))
    return [
        *found, *costs,
        *routing(embed, memory, exact=True),
        *recall(classifier, memory, records[:ASKED]),
    ]  # fmt: skip


def routing(embed: Callable[[int], Tensor], memory: EditMemory, exact: bool = False) -> list[dict]:
    """Seconds from one query to its edit against those of its embedding, and if asked of exact search.

    Two comparisons, for an exact search of a gigabyte leaves nothing of the classifier in the cache.
    """
    ours, against = lambda: memory.nearest(embed(1)), {"baseline": lambda: embed(1)}
    if exact:
        against["exact"] = lambda: memory.nearest(embed(1), exact=True)
    found = []
    for name, other in against.items():
        found += compare("memory_route", len(memory), "query", {"ours": ours, name: other}, repeats=31)
    return found


def bandwidth(memory: EditMemory, query: Tensor) -> dict:
    """Gigabytes a second of an exact search for one query, and of a sum over the same matrix."""
    matrix = memory.embeddings
    ways = {"ours": lambda: memory.nearest(query, exact=True), "baseline": lambda: matrix.sum()}
    seconds = {way: float(np.median(taken)) for way, taken in in_turns(ways).items()}
    speed = {way: matrix.nbytes / 1e9 / s for way, s in seconds.items()}
    return row("bandwidth", len(memory), speed["ours"], "GB/s", speed["baseline"])


def on_disk(edits: Sequence[Edit], z: Tensor, path: Path) -> tuple[EditMemory, list[dict]]:
    """A memory of these edits on disk, written and opened again; and what each took."""
    begun, n = time.perf_counter(), len(edits)
    memory = EditMemory.open(path, dim=z.shape[1])
    for start in tqdm(range(0, n, PART), desc=f"writing {n:,} edits", mininterval=2):
        memory.add(edits[start : start + PART], z[start : start + PART])
    written, size = time.perf_counter(), sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    memory.close()
    memory = None  # a million edits are a gigabyte: not twice
    closed = time.perf_counter()
    memory = EditMemory.open(path, read_only=True)
    opened, found = time.perf_counter(), []
    if n > EXACT:
        coded(memory.embeddings)
        found = [row("codes", n, time.perf_counter() - opened, "s")]
    return memory, [
        row("add", n, (written - begun) / n, "s/edit"), row("bytes", n, size / n, "bytes/edit"),
        row("open", n, opened - closed, "s"), *found,
    ]  # fmt: skip


def recall(classifier: ScopeClassifier, memory: EditMemory, records: Sequence[EditRecord]) -> list[dict]:
    """How often the codes find what exact search finds, and how often the router then decides the same."""
    same, decided = {}, {}
    for role in (*IN_SCOPE, "out_of_scope"):
        queries = classifier.embed([r.queries[role] for r in records])
        parts = [memory.nearest(q, exact=True) for q in queries.split(50)]
        exact, ids = (torch.cat(column) for column in zip(*parts, strict=True))
        distance, found = memory.nearest(queries)
        left = (classifier.score(torch.cat([exact, distance], 1)) < THRESHOLD).all(1, keepdim=True)
        same[role] = (found == ids).float().mean().item()
        decided[role] = (left | (found == ids)).float().mean().item()
    shares = {
        "recall": np.mean([same[role] for role in IN_SCOPE]), "recall_out_of_scope": same["out_of_scope"],
        "same_decision": np.mean(list(decided.values())),
    }  # fmt: skip
    return [row(name, len(memory), float(share), "share", 1.0) for name, share in shares.items()]


def row(name: str, n: int, ours: float, unit: str, baseline: float = float("nan")) -> dict:
    """A row of ``bench.csv`` in which more is better, or that has nothing to be held against."""
    return {
        "name": f"memory_{name}", "n": n, "ours": ours, "baseline": baseline,
        "ratio": ours / baseline, "unit": unit,
    }  # fmt: skip
