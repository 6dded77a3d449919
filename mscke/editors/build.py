"""Trained editors of a track, by the names that tables call them. Training happens once and is resumed."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch

from mscke.benchmark import Benchmark
from mscke.benchmark.sample import EditRecord
from mscke.classifier import ClipEncoder, ScopeClassifier
from mscke.config import Track
from mscke.editors.mscke import MSCKE
from mscke.editors.serac import MiniLMEncoder, text_classifier
from mscke.models.counterfactual import CounterfactualModel
from mscke.models.mllm import MLLM
from mscke.training import AS_RELEASED, FINE_GRAINED, train_classifier, train_counterfactual

SUPERVISION = {
    "released": {"weights": AS_RELEASED, "others": 0.0},
    "fine-grained": {"weights": FINE_GRAINED, "others": 1.0},
}
METHODS = ("SERAC", "SERAC+fg", "MSCKE")


def load_base(track: Track, backbone: str) -> MLLM:
    """The frozen base model ``backbone`` of the track."""
    return MLLM.from_pretrained(track.backbones[backbone], backbone, cache=track.features)


def clip_encoder(track: Track, clip: str | None = None) -> ClipEncoder:
    """The frozen CLIP that MSCKE uses, or another of the track's."""
    return ClipEncoder(track.clips[clip or track.clip], cache=track.features)


def mscke_classifier(
    track: Track,
    bench: Benchmark,
    encoder: ClipEncoder,
    fusion: str = "dot",
    similarity: str = "logistic",
    clip: str | None = None,
    seed: int | None = None,
    fine_grained: bool = True,
    subset: tuple[str, Sequence[EditRecord]] | None = None,
) -> tuple[ScopeClassifier, pd.DataFrame]:
    """MSCKE's scope classifier, trained on the track's train split: (classifier, curve).

    ``fine_grained=False`` trains it as SERAC was released; ``subset`` (name, records) on other records.
    ``encoder`` must be the encoder of ``clip``.
    """
    seed, clip = track.seed if seed is None else seed, clip or track.clip
    tag, records = subset or ("", bench.train)
    torch.manual_seed(seed)
    classifier = ScopeClassifier(track.clips[clip], fusion=fusion, similarity=similarity, encoder=encoder)
    parts = [
        "mscke",
        fusion,
        similarity,
        clip,
        *(["released"] * (not fine_grained)),
        *([tag] if tag else []),
        seed,
    ]
    folder = track.outputs / "trained" / "-".join(map(str, parts))
    curve = train_classifier(
        classifier, records, bench.validation, folder, track.classifier_epochs, seed=seed,
        **(SUPERVISION["fine-grained" if fine_grained else "released"]),
    )  # fmt: skip
    return classifier.eval(), curve


def serac_classifier(
    track: Track, bench: Benchmark, encoder: MiniLMEncoder, fine_grained: bool, seed: int | None = None
) -> tuple[ScopeClassifier, pd.DataFrame]:
    """SERAC's, as released or with MSCKE's supervision: (classifier, curve)."""
    seed = track.seed if seed is None else seed
    torch.manual_seed(seed)
    classifier = text_classifier(encoder)
    supervision = "fine-grained" if fine_grained else "released"
    folder = track.outputs / "trained" / f"serac-{supervision}-{seed}"
    curve = train_classifier(
        classifier, bench.train, bench.validation, folder, track.classifier_epochs, seed=seed,
        **SUPERVISION[supervision],
    )  # fmt: skip
    return classifier.eval(), curve


def counterfactual(
    track: Track, bench: Benchmark, base: MLLM, seed: int | None = None
) -> tuple[CounterfactualModel, pd.DataFrame]:
    """The counterfactual model beside ``base``, which all routed methods share: (model, curve)."""
    seed = track.seed if seed is None else seed
    torch.manual_seed(seed)
    model = CounterfactualModel.beside(base)
    folder = track.outputs / "trained" / f"counterfactual-{base.name}-{seed}"
    curve = train_counterfactual(
        model, bench.train, bench.validation, folder, track.counterfactual_epochs, seed=seed
    )
    return model.eval(), curve


def classifiers(track: Track, bench: Benchmark) -> dict[str, tuple[ScopeClassifier, pd.DataFrame]]:
    """The scope classifier of each method with its curve. None depends on a backbone."""
    minilm, clip = MiniLMEncoder(track.features), clip_encoder(track)
    return {
        "SERAC": serac_classifier(track, bench, minilm, fine_grained=False),
        "SERAC+fg": serac_classifier(track, bench, minilm, fine_grained=True),
        "MSCKE": mscke_classifier(track, bench, clip),
    }


def editors(base: MLLM, in_scope: CounterfactualModel, scope: dict[str, ScopeClassifier]) -> Sequence[MSCKE]:
    """One editor a method: they differ in their scope classifier and in nothing else."""
    return [MSCKE(base, in_scope, classifier, name) for name, classifier in scope.items()]
