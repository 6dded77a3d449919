"""The parts of a dry run of the paper track: its work at its real sizes, on random weights, on a few records.

Every method takes a few training steps, edits and answers the records; an edit of nothing must read 100; the benches
run. A part that fails is told of, and the next one begins. :mod:`mscke.report.dry_run` is the command.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch

from mscke.classifier import ScopeClassifier
from mscke.config import Track
from mscke.cost import bench
from mscke.cost.components import components, counts, latency
from mscke.cost.watch import Log, Steps
from mscke.editors import build
from mscke.editors.finetune import FineTune
from mscke.editors.grid import load_clip
from mscke.editors.ike import IKE, largest_k
from mscke.editors.mend import MEND, MendNetworks
from mscke.editors.mend_training import mend_loss
from mscke.editors.mscke import MSCKE
from mscke.editors.null import null_edits
from mscke.editors.serac import MiniLMEncoder
from mscke.evaluation.many_edits import ask_sequences
from mscke.evaluation.outcomes import own_scores
from mscke.evaluation.protocol import evaluate
from mscke.fetching.track import Benchmark
from mscke.models.mllm import MLLM
from mscke.models.sources import device_of, make_counterfactual
from mscke.training.scope import FINE_GRAINED, encode_records, scope_loss

DEMONSTRATIONS = 32  # of IKE's longest context
STEPS, WARM = {"cuda": 20, "cpu": 2}, {"cuda": 5, "cpu": 1}  # of each training, timed and before
# what hours are reckoned from: names of parts
IMAGES, COUNTERFACTUAL, MENDING, SCOPE, EVALUATION = (
    "images", "counterfactual: training", "MEND: training", "scope classifier: training", ": evaluation",
)  # fmt: skip


def shared_parts(log: Log, track: Track, data: Benchmark) -> tuple[ScopeClassifier, ScopeClassifier] | None:
    """The parts that no backbone changes: both CLIPs, MiniLM, the scope classifier's steps and its search."""
    few, found = data.test, None
    images = sorted({r.edit.image for r in [*few, *data.train]})
    for clip in track.clips:
        encoder = log.part("", f"{clip}: load", lambda clip=clip: load_clip(track, clip), "model")
        if encoder is None:
            return None
        encode = lambda encoder=encoder: encoder.images(images) is None  # noqa: E731
        warm = lambda encoder=encoder: encoder.images(images[:1])  # noqa: E731
        log.part("", f"{clip}: {IMAGES}", encode, "image", len(images) - 1, warm)
        if clip == track.clip:
            found = encoder
    classifier = ScopeClassifier(track.clip, encoder=found).to(device_of(track))
    rows = torch.arange(len(data.train))

    def loss(_: int) -> torch.Tensor:
        edits, queries = encode_records(classifier, data.train)
        return scope_loss(classifier, edits.select(rows), queries, FINE_GRAINED, 1.0)[0]

    log.part("", "words of the records", lambda: encode_records(classifier, data.train) and "", "record", len(data.train))  # fmt: skip
    steps, warm = (n[device_of(track).type] for n in (STEPS, WARM))
    training = Steps(classifier, loss)
    log.part("", SCOPE, lambda: training(steps), f"step of {len(rows)} records", steps, lambda: training(warm))
    classifier = classifier.eval()
    sentences = ScopeClassifier("MiniLM", fusion="text", encoder=MiniLMEncoder()).to(device_of(track)).eval()
    look = lambda: bench.route(classifier, few, sizes=(1, 100), patience=track.patience) and ""  # noqa: E731
    log.part("", "bench: lookups among 1 and 100 edits", look)
    return classifier, sentences


def backbone_parts(
    log: Log, track: Track, data: Benchmark, backbone: str, scope: tuple[ScopeClassifier, ScopeClassifier]
) -> None:
    """Every part that a base model has a share in: training steps, all methods, the null edits, the benches."""
    run = lambda *about, **kw: log.part(backbone, *about, **kw)  # noqa: E731
    base = run("load", lambda: build.load_base(track, backbone), "model")
    if base is None:
        return
    few, train = data.test, data.train
    steps, warm = (n[base.model.device.type] for n in (STEPS, WARM))
    images = sorted({r.edit.image for r in [*few, *train]})
    look = lambda: base.images(images) is None  # noqa: E731
    run(IMAGES, look, "image", len(images) - 1, lambda: base.images(images[:1]))
    in_scope = run("counterfactual: load", lambda: make_counterfactual(track, base), "model")
    mend = run("MEND: measure on edits", lambda: measured(track, base, train), "edit", len(train))
    if in_scope:
        batch = track.recipe("counterfactual", backbone).get("batch_size", 64)
        roles = ("reliability", "generality", "in_scope")

        def of(step: int) -> torch.Tensor:
            some = [train[(step * batch + i) % len(train)] for i in range(min(batch, len(train)))]
            asked = [(r.queries[role], r.edit, r.answers[role]) for r in some for role in roles]
            return in_scope.loss(*map(list, zip(*asked, strict=True)))

        training = Steps(in_scope, of)
        run(COUNTERFACTUAL, lambda: training(steps), f"step of {batch} records", steps, lambda: training(warm))
        in_scope.eval()
    if mend:
        part = lambda step: mend_loss(mend, [train[step % len(train)]])  # noqa: E731
        mending = Steps(mend.networks, part)
        run(MENDING, lambda: mending(steps), "record of a step", steps, lambda: mending(warm))
        mend.networks.eval()
    half = float(np.median(own_scores(scope[0], few)))  # of untrained scores: so either side answers
    text = float(np.median(own_scores(scope[1], few)))
    k = min(DEMONSTRATIONS, largest_k(base, train))
    methods = {
        "FT-LLM": lambda: FineTune(base, at_once=track.edits_at_once),
        f"IKE, {k} demonstrations": lambda: IKE(base, train, MiniLMEncoder(), k),
        "MEND": lambda: mend,
        "SERAC": lambda: MSCKE(base, in_scope, scope[1], "SERAC", text),
        "MSCKE": lambda: MSCKE(base, in_scope, scope[0], "MSCKE", half),
        "MSCKE-MEND": lambda: MSCKE(base, mend, scope[0], "MSCKE-MEND", half),
    }
    for name, make in methods.items():
        ask = lambda some, make=make: evaluate(make(), base, some, track.name) is None  # noqa: E731
        run(f"{name}{EVALUATION}", partial(ask, few), "record", len(few), partial(ask, few[:1]))
    for null in null_edits(base, scope[0], track.edits_at_once):
        run(f"an edit of nothing, {null.name}", lambda null=null: unchanged(null, base, few), "record", len(few))  # fmt: skip
    if in_scope:
        editor = MSCKE(base, in_scope, scope[0], "MSCKE", half)
        run("bench: evaluation three ways", lambda: bench.evaluation(editor, base, few[:4], track.name, 0) and "")
        memory = bench.memory_of(scope[0], few, 100)
        costs = lambda: components_cost(base, in_scope, scope[0], memory, few[:4]).empty  # noqa: E731
        run("bench: parts counted and timed", costs)
    for name, editor in {"FT-LLM": FineTune(base), "MEND": mend}.items():
        chain = lambda editor=editor: ask_sequences(editor, base, few[:2], (1, 2)) is None  # noqa: E731
        run(f"{name}: two edits in a row", chain, "edit", 2)
    tune = lambda: bench.fine_tuning(FineTune(base), few[:2], track.edits_at_once, 0) and ""  # noqa: E731
    run("bench: fine-tuning two ways", tune)


def components_cost(*parts) -> pd.DataFrame:
    """What each component takes: counted, and timed in a batch of four, as the notebook on costs does."""
    made = components(*parts)
    return counts(made).merge(latency(made, batch=len(parts[-1]), repeats=2), on="component")


def measured(track: Track, base: MLLM, train: Sequence) -> MEND:
    """MEND beside ``base``, its pairs' statistics taken from the gradients of ``train``'s edits."""
    rank = track.recipe("mend").get("rank", 128)
    mend = MEND(base, MendNetworks.beside(base, rank=rank).to(base.model.device))
    mend.networks.measure(mend.gradients([r.edit for r in train[: base.batch_size]]))
    return mend


def unchanged(null, base: MLLM, records: Sequence) -> str:
    """What a null edit reads in M_out and Locality, under both protocols; ArithmeticError if not 100."""
    rows = evaluate(null, base, records, "dry")
    stays = rows[rows["metric"].isin(["m_out", "locality"])]
    read = 100 * stays.groupby(["protocol", "metric"])["value"].mean()
    told = ", ".join(f"{value:.2f}" for value in read)
    if (read < 100).any():
        raise ArithmeticError(f"an edit of nothing reads {told}")
    return f"reads {told}"
