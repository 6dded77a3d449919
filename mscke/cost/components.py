"""What every part costs: parameters, bytes, FLOPs, latency. Counted or measured, never guessed.

    parts = components(base, in_scope, classifier, memory, records)
    counts(parts)                                   # parameters, bytes, FLOPs of one query
    latency(parts, batch=64)                        # milliseconds a query, in turns

A component's time includes what it takes from a query on disk to its output: reading the image, writing
the tokens. Peak memory has a module of its own, :mod:`mscke.cost.peak`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mscke.benchmark.sample import EditRecord, Query
from mscke.classifier import ScopeClassifier
from mscke.memory import EditMemory
from mscke.models.clip import side_texts
from mscke.models.counterfactual import CounterfactualModel
from mscke.models.decoding import generate
from mscke.models.mllm import MLLM
from mscke.storage.search import Index

PARTS = {  # the paper's parts -> what a query that reaches them passes through
    "scope classifier": ("CLIP text", "CLIP image", "classifier head", "memory lookup"),
    "base model": ("vision and Q-Former", "language model"),
    "counterfactual model": ("vision and Q-Former", "counterfactual language model"),
}


@dataclass(frozen=True)
class Component:
    """``run(n)`` does its work for the first n queries and returns what comes out; nothing is remembered.

    ``weights``: the tensors that it needs, each once.
    """

    name: str
    weights: Sequence[Tensor]
    run: Callable[[int], object]


def scope_components(classifier: ScopeClassifier, memory: EditMemory, queries: Sequence[Query]) -> list[Component]:
    """The router's parts: CLIP's two towers, the trained head, the search of ``memory``."""
    encoder, images = classifier.encoder, [q.image for q in queries]
    texts, features = side_texts(queries, None), encoder(queries)
    rows, z = torch.arange(len(queries)), classifier.embed(queries)
    text_tower = [p for n, p in encoder.model.named_parameters() if not n.startswith("visual.") and n != "logit_scale"]
    return [
        Component("CLIP text", text_tower, lambda n: encoder.texts.compute(texts[:n])),
        Component("CLIP image", _weights(encoder.model.visual), lambda n: encoder.images.compute(images[:n])),
        Component("classifier head", _weights(classifier), lambda n: classifier(features.select(rows[:n]))),
        Component("memory lookup", [memory.embeddings], lambda n: memory.nearest(z[:n])),
    ]


def base_components(base: MLLM, queries: Sequence[Query]) -> list[Component]:
    """The base model's two halves: image to Q-Former features; those and the question to an answer."""
    model, images = base.model, [q.image for q in queries]
    base.features(images)  # kept from here on, so that the language model's share holds no vision
    seeing = [*_weights(model.vision_model, model.qformer), model.query_tokens]

    def answer(n: int) -> list[str]:
        prompts, visual = base.prompts(queries[:n]), base.see(queries[:n])
        return generate(model.language_model, base.encoder, prompts, visual)

    return [
        Component("vision and Q-Former", seeing, lambda n: base.images.compute(images[:n])),
        Component("language model", _weights(model.language_projection, model.language_model), answer),
    ]


def counterfactual_component(in_scope: CounterfactualModel, records: Sequence[EditRecord]) -> Component:
    """The counterfactual model's own half; it sees through the base model's vision tower."""
    queries, edits = [r.in_scope for r in records], [r.edit for r in records]
    in_scope.base.features([q.image for q in queries])  # as above
    name = "counterfactual language model"
    return Component(name, _weights(in_scope), lambda n: in_scope.answer(queries[:n], edits[:n]))


def components(
    base: MLLM,
    in_scope: CounterfactualModel,
    classifier: ScopeClassifier,
    memory: EditMemory,
    records: Sequence[EditRecord],
) -> list[Component]:
    """Everything that the in-scope queries of ``records`` may pass through, in that order."""
    queries = [r.in_scope for r in records]
    scope, seen = scope_components(classifier, memory, queries), base_components(base, queries)
    return [*scope, *seen, counterfactual_component(in_scope, records)]


def _weights(*modules: torch.nn.Module) -> list[Tensor]:
    return [p for module in modules for p in module.parameters()]  # a tied one counts once


def counts(parts: Sequence[Component]) -> pd.DataFrame:
    """Exact counts, a row a component: parameters (numbers held), bytes, flops (of one query)."""
    rows = [
        {
            "component": part.name,
            "parameters": sum(w.numel() for w in part.weights),
            "bytes": sum(w.numel() * w.element_size() for w in part.weights),
            "flops": flops(lambda run=part.run: run(1)),
        }
        for part in parts
    ]
    return pd.DataFrame(rows)


def flops(call: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products, convolutions and attention in ``call``.

    A multiplication and an addition are two. torch's counter knows no fused attention on a CPU: it is
    made to be computed as the matrix products that it is. An exact search is the product of query and embeddings.
    """
    before = Index.flops
    with FlopCounterMode(display=False) as counter, torch.inference_mode(), _unfused():
        call()
    return counter.get_total_flops() + Index.flops - before


@contextmanager
def _unfused():
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def in_turns(
    calls: Mapping[str, Callable[[], object]], repeats: int = 15, budget: float = float("inf")
) -> dict[str, np.ndarray]:
    """Seconds (R,) that each call takes, round by round, so that a busy machine slows all alike.

    The first round warms up and does not count. Rounds end after ``repeats``, or when ``budget`` seconds
    are spent; R is at least 1, and where not even a second round fits, the first is what there is.
    """
    start, rounds = perf_counter(), []
    while len(rounds) <= repeats and (not rounds or perf_counter() - start < budget):
        rounds.append([_seconds(call) for call in calls.values()])
    taken = np.array(rounds[1:] or rounds)
    return dict(zip(calls, taken.T, strict=True))


def _seconds(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return perf_counter() - start


@torch.inference_mode()
def latency(parts: Sequence[Component], batch: int, repeats: int = 15) -> pd.DataFrame:
    """Milliseconds a query in batches of ``batch``: columns component, batch, ms (median), lo, hi (quartiles)."""
    taken = in_turns({part.name: lambda run=part.run: run(batch) for part in parts}, repeats)
    ms = {name: 1e3 * seconds / batch for name, seconds in taken.items()}
    rows = [
        {"component": name, "batch": batch, "ms": np.median(v)}
        | dict(zip(("lo", "hi"), np.percentile(v, (25, 75)), strict=True))
        for name, v in ms.items()
    ]
    return pd.DataFrame(rows)


@torch.inference_mode()
def side_by_side(calls: Mapping[str, Callable[[], object]], n: int, rounds: int) -> pd.DataFrame:
    """Milliseconds a query of calls that answer ``n`` each, in turns; and as a share of the first one's, round by round.

    Columns way, ms, lo, hi, share, share_lo, share_hi: medians and quartiles.
    """
    seconds, quartiles = pd.DataFrame(in_turns(calls, rounds)), [0.5, 0.25, 0.75]
    ms = (1e3 / n * seconds).quantile(quartiles).T.set_axis(["ms", "lo", "hi"], axis=1)
    share = seconds.div(seconds.iloc[:, 0], axis=0).quantile(quartiles).T
    return ms.join(share.set_axis(["share", "share_lo", "share_hi"], axis=1)).rename_axis("way").reset_index()


def by_part(values: pd.Series) -> pd.Series:
    """Component values summed over each of the paper's parts; the two models share vision and Q-Former."""
    return pd.Series({part: values[list(names)].sum() for part, names in PARTS.items()})
