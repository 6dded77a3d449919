"""What the benches share: two ways timed in turns, a classifier's pass as it is, a memory drawn larger."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice

import numpy as np
import torch
from torch import Tensor

from mscke.benchmark.pictures import open_image
from mscke.benchmark.sample import Edit, Query
from mscke.classifier import ScopeClassifier
from mscke.cost.components import in_turns
from mscke.models.clip import side_texts
from mscke.models.features import FeatureTable


def compare(
    name: str, n: int, unit: str, ways: Mapping[str, Callable[[], object]], per: int = 1, **timing
) -> list[dict]:
    """Time ``ways`` in turns: a row for each of them but "ours", of seconds divided by ``per``.

    "baseline" goes by ``name``, any other by ``name``_way; with "ours" alone the baseline is missing.
    """
    taken = {way: float(np.median(seconds)) / per for way, seconds in in_turns(ways, **timing).items()}
    ours = taken.pop("ours")
    return [
        {
            "name": name if way == "baseline" else f"{name}_{way}", "n": n, "ours": ours,
            "baseline": seconds, "ratio": seconds / ours, "unit": f"s/{unit}",
        }
        for way, seconds in (taken or {"baseline": float("nan")}).items()
    ]  # fmt: skip


def encoding(
    classifier: ScopeClassifier, queries: Sequence[Query], answers: Sequence[str] | None = None
) -> Callable[[int], Tensor]:
    """The classifier's whole pass over the first n pairs, nothing kept from one call to the next.

    Images are read and texts tokenised beforehand: what is timed is the networks.
    """
    encoder, texts = copy.copy(classifier.encoder), side_texts(queries, answers)
    pixels = {q.image: encoder.preprocess(open_image(q.image)) for q in queries}
    tokens = dict(zip(texts, encoder.tokenizer(texts), strict=True))
    clip = encoder.model

    def embed(n: int) -> Tensor:
        stack = lambda known, keys: torch.stack([known[k] for k in keys]).to(encoder.device)  # noqa: E731
        encoder.texts = FeatureTable(lambda keys: encoder.read(stack(tokens, keys)))
        encoder.images = FeatureTable(lambda keys: clip.visual(stack(pixels, keys)), dtype=encoder.images.dtype)
        return classifier(encoder(queries[:n], answers and answers[:n]))

    return embed


def many(edits: Sequence[Edit], n: int) -> list[Edit]:
    """n edits: these, then again with their prompts numbered, for a memory keeps no fact twice."""
    some = enumerate(islice(cycle(edits), n))
    return [replace(e, prompt=f"{e.prompt} ({i})") if i >= len(edits) else e for i, e in some]


def alike(real: Tensor, n: int, seed: int = 0) -> Tensor:
    """n embeddings (n, d): the real ones first, then draws from a normal of their mean and covariance.

    What an exact search costs does not depend on the values.
    """
    values, vectors = torch.linalg.eigh(real.T.cov())
    found = torch.empty(n, real.shape[1])  # a million are a gigabyte: in place
    found[: len(real)] = real[:n]
    drawn = found[len(real) :]
    noise = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(seed))
    torch.addmm(real.mean(0), noise.mul_(values.clamp(min=0).sqrt()), vectors.T, out=drawn)
    drawn *= real.norm(dim=-1).mean() / drawn.norm(dim=-1, keepdim=True)
    return found
