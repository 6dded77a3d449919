"""Ours against the released way of doing the same: ``python -m mscke.cost.bench`` (``make bench``).

Each row of ``figures/tables/bench.csv`` (name, n, ours, baseline, ratio, unit) is timed in one process, the
two ways in turns, as the median of the rounds:

* ``route``: one query against a memory of n edits. Ours embeds the query and searches a matrix; the
  released way encodes the whole memory again for each query;
* ``evaluate``: n records edited and asked, in one batch or one by one: as released (query after query,
  nothing kept), and as ``evaluate_records`` (record after record, what was computed is kept);
* ``finetune``: n edits fine-tuned at once, or in a loop;
* ``memory_…``: the memory up to a million edits, in RAM and on disk (:mod:`mscke.cost.bench_memory`).
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from mscke.benchmark.sample import EditRecord
from mscke.classifier import ScopeClassifier
from mscke.config import Track, get_track
from mscke.cost import bench_memory
from mscke.cost.timing import alike, compare, encoding, many
from mscke.editors import build
from mscke.editors.finetune import FineTune
from mscke.editors.grid import Shared, contenders
from mscke.editors.mscke import MSCKE
from mscke.evaluation.protocol import evaluate
from mscke.evaluation.run import made_of
from mscke.fetching.track import Benchmark, load_benchmark
from mscke.memory import EditMemory
from mscke.models.decoding import in_batches
from mscke.models.features import FeatureTable, ImageTable
from mscke.models.mllm import MLLM
from mscke.system.files import read_kept, replacing

SIZES = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)
POOL = 64  # edits that stand for all when a memory is encoded again; also the batch that they go in
N_RECORDS = 64  # that are evaluated and fine-tuned
PATIENCE = 5.0  # seconds a query, after which the released way is not measured further
BUDGET = 4  # times that for a comparison of records


def memory_of(classifier: ScopeClassifier, records: Sequence[EditRecord], n: int) -> EditMemory:
    """A memory of n edits: those of ``records``, and beyond them embeddings :func:`alike`."""
    queries, answers = [r.queries["reliability"] for r in records], [r.edit.answer for r in records]
    memory, edits = EditMemory(classifier.dim), [r.edit for r in records]
    memory.add(many(edits, n), alike(classifier.embed(queries, answers), n))
    return memory


def lookups(classifier: ScopeClassifier, records: Sequence[EditRecord], n: int) -> dict[str, Callable[[], Tensor]]:
    """Two ways from the first record's in-scope query to its nearest edit among n: "ours", "baseline".

    Beyond a pool of real edits the baseline encodes the pool again: the work is that of n.
    """
    pool, memory = records[:POOL], memory_of(classifier, records, n)
    query = encoding(classifier, [records[0].in_scope])
    edits = encoding(classifier, [r.queries["reliability"] for r in pool], [r.edit.answer for r in pool])

    def again() -> Tensor:
        z = torch.cat([edits(min(len(pool), n - start)) for start in range(0, n, len(pool))])
        return classifier.similarity(query(1), z).argmax(1)

    return {"ours": lambda: memory.nearest(query(1))[1][:, 0], "baseline": again}


@torch.inference_mode()
def route(
    classifier: ScopeClassifier, records: Sequence[EditRecord], sizes: Sequence[int] = SIZES, patience: float = PATIENCE
) -> list[dict]:
    """Seconds to find one query's edit among n, for each n; the released way while it is bearable."""
    rows, bearable = [], True
    for n in sizes:
        ways = lookups(classifier, records, n)
        if not bearable:
            del ways["baseline"]
        rows += compare("route", n, "query", ways, budget=patience)
        bearable = bearable and rows[-1]["baseline"] <= patience
    return rows


def evaluation(
    editor: MSCKE, base: MLLM, records: Sequence[EditRecord], track: str, patience: float = PATIENCE
) -> list[dict]:
    """Seconds a record, each edited alone and asked its five queries in both protocols.

    Ours in one batch. The baseline as released: query after query, nothing kept from one to the next.
    ``records``: record after record, its five queries together, features and answers kept.
    """

    def batched() -> None:
        evaluate(*forgetful(editor, base), records, track)

    def record_by_record() -> None:
        fresh = forgetful(editor, base)
        for record in records:
            evaluate(*fresh, [record], track)

    def query_by_query() -> None:
        for record in records:
            for role, query in record.queries.items():
                fresh, model = forgetful(editor, base)
                edited, gold = fresh.edit([record]), [record.answers[role]]
                model.answer([query]), edited.answer([query])
                model.force([query], gold), edited.force([query], gold)

    ways = {"ours": batched, "baseline": query_by_query, "records": record_by_record}
    budget = BUDGET * patience
    return compare("evaluate", len(records), "record", ways, len(records), repeats=3, budget=budget)


def forgetful(editor: MSCKE, base: MLLM) -> tuple[MSCKE, MLLM]:
    """The editor and its base model as if just loaded: the same weights, nothing encoded or answered yet."""
    fresh = MLLM(base.model, base.tokenizer, base.name, image_size=base.image_size, batch_size=base.batch_size)
    in_scope, classifier = copy.copy(editor.in_scope).attach(fresh), copy.copy(editor.classifier)
    encoder = copy.copy(classifier.encoder)
    encoder.texts = FeatureTable(encoder.texts.compute)
    encoder.images = ImageTable(encoder.images.compute, dtype=encoder.images.dtype)
    object.__setattr__(classifier, "encoder", encoder)  # as the classifier itself does
    return MSCKE(fresh, in_scope, classifier, editor.name, editor.threshold), fresh


def fine_tuning(
    editor: FineTune, records: Sequence[EditRecord], at_once: int | None, patience: float = PATIENCE
) -> list[dict]:
    """Seconds an edit: all (or ``at_once``), or each the plain way (one edit, torch's Adam, the whole model)."""
    parts = in_batches(len(records), at_once or len(records))

    def together() -> None:
        for part in parts:
            editor.edit(records[part])

    ways = {"ours": together, "baseline": lambda: [editor.one_by_one(r) for r in records]}
    budget = BUDGET * patience
    return compare("finetune", len(records), "edit", ways, len(records), repeats=3, budget=budget)


def editing(track: Track, bench: Benchmark) -> pd.DataFrame:
    """The rows of ``route``, ``evaluate`` and ``finetune``, on the track's first backbone."""
    base = build.load_base(track, next(iter(track.backbones)))
    in_scope, _ = build.counterfactual(track, bench, base)
    classifier, _ = build.classifier(track, "MSCKE")
    few = bench.test[:N_RECORDS]
    return pd.DataFrame([
        *route(classifier, bench.test, patience=track.patience),
        *evaluation(MSCKE(base, in_scope, classifier), base, few, track.name, track.patience),
        *fine_tuning(build.fine_tune(track, bench, base), few, track.edits_at_once, track.patience),
    ])  # fmt: skip


def memory(track: Track, bench: Benchmark) -> pd.DataFrame:
    """The rows of ``memory_…`` for the grounded classifier; to a thousand edits only where the track is a small one."""
    sizes = bench_memory.SIZES if len(bench.test) > 1000 else bench_memory.SIZES[:4]
    classifier, _ = Shared.of(track).trained(contenders(track)["grounded"])
    with tempfile.TemporaryDirectory(dir=track.outputs) as folder:
        return pd.DataFrame(bench_memory.rows(classifier, bench.test, folder, sizes))


PARTS = {"editing": editing, "memory": memory}


def measured(track: Track, bench: Benchmark, part: str, again: bool = False) -> pd.DataFrame:
    """The rows of a part, one of :data:`PARTS`; ``tables/bench.csv`` among the track's figures then holds all there are.

    Measured once with this code, so that a notebook that is run again times nothing, unless ``again``.
    """
    kept = {name: track.outputs / "rows" / made_of(track) / f"bench-{name}.csv" for name in PARTS}
    if again or read_kept(kept[part], pd.read_csv) is None:
        _write(PARTS[part](track, bench), kept[part])
    there = [read_kept(path, pd.read_csv) for path in kept.values()]
    _write(pd.concat(there), track.figures / "tables" / "bench.csv")
    return pd.read_csv(kept[part])


def _write(table: pd.DataFrame, path: Path) -> None:
    with replacing(path) as whole:
        table.to_csv(whole, index=False, float_format="%.4g", lineterminator="\n")


if __name__ == "__main__":
    found = get_track()
    for name in PARTS:
        rows = measured(found, load_benchmark(found), name, again=True)
        print(rows.to_string(index=False, float_format="%.4g"))
