"""Many scope classifiers by specification, trained side by side in processes of one thread each::

    trained = train_grid(track, [Spec(fusion=f, seed=s) for f in FUSIONS for s in range(3)])
    trained[Spec(fusion="cross", seed=1)].embed(queries)

A classifier is trained once: what is in ``outputs/<track>/trained`` is read, what was interrupted goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch

from mscke.benchmark.sample import EditRecord, Query
from mscke.classifier import ScopeClassifier
from mscke.config import Track
from mscke.editors.serac import MiniLMEncoder
from mscke.fetching.track import load_benchmark
from mscke.models.clip import ClipEncoder, Features
from mscke.models.sources import device_of, find
from mscke.system.workers import in_processes
from mscke.training.checkpoint import published
from mscke.training.scope import AS_RELEASED, FINE_GRAINED, encode_records, train_classifier

SENTENCES = "MiniLM"
SUPERVISION = {  # what a classifier is shown: weights of the five roles, weight of other records' queries
    "released": {"weights": AS_RELEASED, "others": 0.0},
    "fine-grained": {"weights": FINE_GRAINED, "others": 1.0},
    "own-record": {"weights": FINE_GRAINED, "others": 0.0},
    "crowd": {"weights": FINE_GRAINED, "others": 3.0},  # for a memory of many: chosen on validation queries
}


@dataclass(frozen=True)
class Spec:
    """One scope classifier.

    ``encoder``: one of the track's CLIPs ("" for the track's own), ``MiniLM`` (text alone, as SERAC), or
    ``MiniLM+<clip>``: its text beside the CLIP's image. ``supervision``: a key of :data:`SUPERVISION`.
    ``subset``: (name, records) to train on instead of the train split.
    """

    fusion: str = "dot"
    similarity: str = "logistic"
    encoder: str = ""
    supervision: str = "fine-grained"
    subset: tuple[str, tuple[EditRecord, ...]] | None = None
    seed: int = 0

    def folder(self, track: Track) -> Path:
        """Where it is trained."""
        sees = ("mscke", self.fusion, self.similarity, self.encoder or track.clip)
        told = () if self.supervision == "fine-grained" else (self.supervision,)
        kind = ("serac", self.supervision) if self.encoder == SENTENCES else (*sees, *told)
        parts = (*kind, *(self.subset or ())[:1], self.seed)
        return track.outputs / "trained" / "-".join(map(str, parts))


def contenders(track: Track) -> dict[str, Spec]:
    """``paper``: ``dot`` over patches, as §3 describes it; ``grounded``: ours, on the light CLIP."""
    light = track.light or track.clip
    return {"paper": Spec("dot", encoder=track.clip), "grounded": Spec("grounded", encoder=light, supervision="crowd")}


def recipe(track: Track, spec: Spec) -> dict:
    """How the track trains this classifier: arguments of :func:`train_classifier`."""
    return {"epochs": track.classifier_epochs} | track.recipe("classifier", spec.fusion)


def load_clip(track: Track, clip: str, cache: Path | None = None) -> ClipEncoder:
    """The frozen CLIP that the track calls ``clip``, fetched if it has to be."""
    return ClipEncoder(find(track, track.clips[clip]), cache=cache, device=device_of(track), half=track.half_features)


class SentencePatchEncoder:
    """MiniLM's text beside a CLIP's image: switches the text encoder alone.

    The two share no space: ``cosine``, by which ``dot`` points at patches, is still that of the CLIP's text,
    and so are the words.
    """

    def __init__(self, sentences: MiniLMEncoder, clip: ClipEncoder):
        self.sentences, self.clip, self.model = sentences, clip, clip.model
        self.text_dim = sentences.text_dim
        self.dim, self.patch_dim, self.word_dim = clip.dim, clip.patch_dim, clip.word_dim

    def __call__(self, queries: Sequence[Query], answers: Sequence[str] | None = None) -> Features:
        return replace(self.clip(queries, answers), text=self.sentences(queries, answers).text)


class Shared:
    """What the classifiers of one track share within a process: its records and frozen encoders."""

    _known: dict[str, Shared] = {}  # noqa: RUF012

    def __init__(self, track: Track):
        self.track, self.bench, self.encoders = track, load_benchmark(track), {}

    @classmethod
    def of(cls, track: Track) -> Shared:
        if track.name not in cls._known:
            cls._known[track.name] = cls(track)
        return cls._known[track.name]

    def encoder(self, name: str):
        """The frozen encoder that a specification names."""
        name = name or self.track.clip
        if name not in self.encoders:
            first, _, clip = name.partition("+")
            if clip:
                self.encoders[name] = SentencePatchEncoder(self.encoder(first), self.encoder(clip))
            elif first == SENTENCES:
                self.encoders[name] = MiniLMEncoder(self.track.features)
            else:
                self.encoders[name] = load_clip(self.track, name, self.track.features)
        return self.encoders[name]

    def fresh(self, spec: Spec, kind: type[ScopeClassifier] = ScopeClassifier) -> ScopeClassifier:
        """The classifier before training."""
        clip, encoder = (spec.encoder or self.track.clip).rpartition("+")[2], self.encoder(spec.encoder)
        torch.manual_seed(spec.seed)  # once the encoder is there: loading it draws random numbers
        name = clip if clip in self.track.clips else "all-MiniLM-L6-v2"  # no path: it is saved
        classifier = kind(name, None, spec.fusion, spec.similarity, encoder=encoder)
        return classifier.to(device_of(self.track))

    def trained(self, spec: Spec) -> tuple[ScopeClassifier, pd.DataFrame]:
        """The classifier, trained or read, and its curve."""
        classifier, (_, records) = self.fresh(spec), spec.subset or ("", self.bench.train)
        told = SUPERVISION[spec.supervision]
        if spec.fusion == "text":  # other records use the same words: it would learn to reject its own edit
            told = told | {"others": 0.0}
        curve = train_classifier(
            classifier, records, self.bench.validation, spec.folder(self.track),
            seed=spec.seed, **told, **recipe(self.track, spec),
        )  # fmt: skip
        return classifier.eval(), curve


def train_grid(track: Track, specs: Iterable[Spec], workers: int | None = None) -> dict[Spec, ScopeClassifier]:
    """Train what is not trained yet, ``workers`` at a time (the track's, unless told); every classifier by its specification.

    The bytes written do not depend on ``workers``. Raises ValueError as :func:`train_classifier` does.
    """
    specs, shared = list(specs), Shared.of(track)
    missing = {spec.folder(track): spec for spec in specs if not _finished(spec, track)}
    # in this order a worker encodes the records once for all classifiers on one encoder
    by_encoder = sorted(missing.values(), key=lambda spec: spec.encoder or track.clip)
    for spec in {spec.encoder: spec for spec in by_encoder}.values():  # workers only read features
        for records in (shared.bench.train, shared.bench.validation):
            encode_records(shared.fresh(spec), records)
    if missing:
        in_processes(_train, [(track, spec) for spec in by_encoder], workers or track.workers, "scope classifiers")
    return {spec: shared.trained(spec)[0] for spec in specs}


def _train(track: Track, spec: Spec) -> None:
    Shared.of(track).trained(spec)


def _finished(spec: Spec, track: Track) -> bool:
    return published(spec.folder(track)) == recipe(track, spec)["epochs"]
