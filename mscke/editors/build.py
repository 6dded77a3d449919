"""Trained editors of a track, by the names that tables call them. Training happens once and is resumed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pandas as pd
import torch

from mscke.benchmark import Benchmark, load_benchmark
from mscke.classifier import ScopeClassifier
from mscke.config import Track, get_track
from mscke.editors.base import Editor
from mscke.editors.finetune import FineTune
from mscke.editors.grid import SENTENCES, Shared, Spec
from mscke.editors.ike import IKE, choose_k
from mscke.editors.mend import MEND, MendNetworks, train_mend
from mscke.editors.mscke import MSCKE
from mscke.editors.serac import MiniLMEncoder
from mscke.models.clip import ClipEncoder
from mscke.models.counterfactual import CounterfactualModel
from mscke.models.features import fingerprint
from mscke.models.mllm import MLLM
from mscke.training import train_counterfactual, write_whole
from mscke.workers import in_processes

SCOPED = {  # the methods with a scope classifier of their own
    "SERAC": Spec("text", encoder=SENTENCES, supervision="released"),
    # without strangers: in the same words as another record's edit, text alone would reject its own
    "SERAC+fg": Spec("text", encoder=SENTENCES, supervision="own-record"),
    "MSCKE": Spec("dot"),
}
METHODS = ("FT-LLM", "IKE", "SERAC", "SERAC+fg", "MEND", "MSCKE", "MSCKE-MEND")


def load_base(track: Track, backbone: str) -> MLLM:
    """The frozen base model ``backbone`` of the track."""
    return MLLM.from_pretrained(track.backbones[backbone], backbone, cache=track.features)


def clip_encoder(track: Track, clip: str | None = None) -> ClipEncoder:
    """The frozen CLIP that MSCKE uses, or another of the track's."""
    return Shared.of(track).encoder(clip or "")


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


def classifier(track: Track, method: str) -> tuple[ScopeClassifier, pd.DataFrame]:
    """The scope classifier of one of :data:`SCOPED`, and its curve. None depends on a backbone."""
    return Shared.of(track).trained(replace(SCOPED[method], seed=track.seed))


def classifiers(track: Track) -> dict[str, tuple[ScopeClassifier, pd.DataFrame]]:
    """All of them by method."""
    return {method: classifier(track, method) for method in SCOPED}


def train_one(track_name: str, method: str, backbone: str | None = None) -> None:
    """One training of :func:`train`, in a process of its own."""
    track = get_track(track_name)
    bench = load_benchmark(track)
    if backbone is None:
        classifier(track, method)
    else:
        beside = {"MEND": mend, "IKE": ike_choices, "counterfactual": counterfactual}[method]
        beside(track, bench, load_base(track, backbone))


def train(track: Track) -> None:
    """Train all that the main table needs, two trainings at a time; what is finished already is left."""
    jobs = [(track.name, method, b) for method in ("MEND", "IKE", "counterfactual") for b in track.backbones]
    in_processes(train_one, [*jobs, *((track.name, method) for method in SCOPED)], desc="trainings")


def mend(
    track: Track, bench: Benchmark, base: MLLM, seed: int | None = None
) -> tuple[MendNetworks, pd.DataFrame]:
    """MEND's editor networks for ``base``: (networks, curve)."""
    seed = track.seed if seed is None else seed
    torch.manual_seed(seed)
    networks = MendNetworks.beside(base)
    folder = track.outputs / "trained" / f"mend-{base.name}-{seed}"
    curve = train_mend(
        MEND(base, networks), bench.train, bench.validation[:250], folder, track.mend_epochs, seed=seed
    )
    return networks.eval(), curve


def ike_choices(track: Track, bench: Benchmark, backbone: str | MLLM) -> pd.DataFrame:
    """How IKE does on validation records by its number k of demonstrations, in shares; measured once."""
    base = load_base(track, backbone) if isinstance(backbone, str) else backbone
    path = track.outputs / "trained" / f"ike-{base.name}-{fingerprint(base.model)[:8]}" / "validation.csv"
    if not path.exists():
        held = bench.validation[: track.ike_records]
        _, table = choose_k(base, bench.train, MiniLMEncoder(track.features), held)
        write_whole(path, lambda p: table.to_csv(p, index=False))
    return pd.read_csv(path)


def ike(track: Track, bench: Benchmark, base: MLLM) -> IKE:
    """IKE with the number of demonstrations that does best on validation."""
    choices = ike_choices(track, bench, base)
    return IKE(
        base, bench.train, MiniLMEncoder(track.features), int(choices.loc[choices["score"].idxmax(), "k"])
    )


def routed(base: MLLM, in_scope: CounterfactualModel, scope: dict[str, ScopeClassifier]) -> list[MSCKE]:
    """SERAC's and MSCKE's editors: they differ in their scope classifier and in nothing else."""
    return [MSCKE(base, in_scope, classifier, name) for name, classifier in scope.items()]


def editors(track: Track, bench: Benchmark, base: MLLM) -> Iterator[Editor]:
    """Every method of the main table on one backbone, in its order, made when it is reached."""
    yield FineTune(base)
    yield ike(track, bench, base)
    scope = {name: classifier for name, (classifier, _) in classifiers(track).items()}
    serac, fine_grained, mscke = routed(base, counterfactual(track, bench, base)[0], scope)
    yield from (serac, fine_grained)
    networks, _ = mend(track, bench, base)
    yield MEND(base, networks)
    yield mscke
    yield MSCKE(base, MEND(base, networks), scope["MSCKE"], "MSCKE-MEND")
