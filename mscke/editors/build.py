"""Trained editors of a track, by the names that tables call them. Training happens once and is resumed.

``python -m mscke.editors.build --track …`` trains all of them two at a time; started by ``accelerate launch``,
one after the other, each on all processes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import pandas as pd
import torch

from mscke.classifier import ScopeClassifier
from mscke.config import Track, get_track
from mscke.editors.base import Editor
from mscke.editors.finetune import FineTune, choose_rate
from mscke.editors.grid import SENTENCES, Shared, Spec
from mscke.editors.ike import IKE, choose_k
from mscke.editors.mend import MEND, MendNetworks
from mscke.editors.mend_training import train_mend
from mscke.editors.mscke import MSCKE
from mscke.editors.serac import MiniLMEncoder
from mscke.fetching.track import Benchmark, load_benchmark
from mscke.models.clip import ClipEncoder
from mscke.models.counterfactual import CounterfactualModel
from mscke.models.mllm import MLLM
from mscke.models.names import fingerprint
from mscke.models.room import check_records
from mscke.models.sources import load_mllm, make_counterfactual
from mscke.system.files import code_of, read_kept, replacing
from mscke.system.workers import in_processes, one_thread, processes
from mscke.training.scope import digest, train_counterfactual

SCOPED = {  # the methods with a scope classifier of their own
    "SERAC": Spec("text", encoder=SENTENCES, supervision="released"),
    "SERAC+fg": Spec("text", encoder=SENTENCES),
    "MSCKE": Spec("dot"),
}
IN_SCOPE = {method: "counterfactual" for method in SCOPED} | {"MSCKE-MEND": "MEND"}  # who answers for whom
METHODS = ("FT-LLM", "IKE", "SERAC", "SERAC+fg", "MEND", "MSCKE", "MSCKE-MEND")


def load_base(track: Track, backbone: str) -> MLLM:
    """The frozen base model ``backbone`` of the track.

    Raises :class:`mscke.benchmark.sample.RecordError` for a record of the track that it has no room for.
    """
    base, bench = load_mllm(track, backbone, cache=track.features), load_benchmark(track)
    base.make_room(answer for r in (*bench.train, *bench.validation, *bench.test) for answer in r.answers.values())
    check_records(base, [*bench.train, *bench.validation, *bench.test])
    return base


def clip_encoder(track: Track, clip: str | None = None) -> ClipEncoder:
    """The frozen CLIP that MSCKE uses, or another of the track's."""
    return Shared.of(track).encoder(clip or "")


def counterfactual(
    track: Track, bench: Benchmark, base: MLLM, seed: int | None = None
) -> tuple[CounterfactualModel, pd.DataFrame]:
    """The counterfactual model beside ``base``, which all routed methods share: (model, curve)."""
    seed = track.seed if seed is None else seed
    torch.manual_seed(seed)
    model = make_counterfactual(track, base)
    folder = track.outputs / "trained" / f"counterfactual-{base.name}-{seed}"
    recipe = {"epochs": track.counterfactual_epochs, "seed": seed} | track.recipe("counterfactual", base.name)
    curve = train_counterfactual(model, bench.train, bench.validation, folder, **recipe)
    return model.eval(), curve


def classifier(track: Track, method: str) -> tuple[ScopeClassifier, pd.DataFrame]:
    """The scope classifier of one of :data:`SCOPED`, and its curve. None depends on a backbone."""
    return Shared.of(track).trained(replace(SCOPED[method], seed=track.seed))


def classifiers(track: Track) -> dict[str, tuple[ScopeClassifier, pd.DataFrame]]:
    """All of them by method."""
    return {method: classifier(track, method) for method in SCOPED}


def train_one(track_name: str, method: str, beside: str | None = None) -> None:
    """One step of :func:`train`, in a process of its own."""
    track = get_track(track_name)
    bench = load_benchmark(track)
    if method == "images":
        encode_images(track, bench, beside)
    elif beside is None:
        classifier(track, method)
    else:
        make = {
            "MEND": mend, "IKE": ike_choices, "FT-LLM": fine_tune_choices, "counterfactual": counterfactual,
        }[method]  # fmt: skip
        make(track, bench, load_base(track, beside))


def encode_images(track: Track, bench: Benchmark, eyes: str) -> None:
    """All images as a CLIP or a backbone of this name sees them."""
    encoder = clip_encoder(track, eyes) if eyes in track.clips else load_base(track, eyes)
    with processes().main_process_first():
        encoder.images(sorted({r.edit.image for r in [*bench.train, *bench.validation, *bench.test]}))


def _eyes(track: Track) -> list[str]:
    """The backbones whose images are encoded ahead: all, or one where those that are generated with look alike."""
    return list(track.backbones) if track.fetched else list(track.backbones)[:1]


def train(track: Track) -> None:
    """Train all that the main table needs, ``track.workers`` at a time; what is finished already is left."""
    with processes().main_process_first():
        load_benchmark(track)
    jobs = [(track.name, "images", eyes) for eyes in (*_eyes(track), *track.clips)]
    methods = ("MEND", "IKE", "FT-LLM", "counterfactual")
    jobs += [(track.name, method, b) for method in methods for b in track.backbones]
    jobs += [(track.name, method) for method in SCOPED]
    in_processes(train_one, jobs, track.workers, "trainings")


def mend(track: Track, bench: Benchmark, base: MLLM, seed: int | None = None) -> tuple[MendNetworks, pd.DataFrame]:
    """MEND's editor networks for ``base``: (networks, curve)."""
    seed = track.seed if seed is None else seed
    torch.manual_seed(seed)
    recipe = {"epochs": track.mend_epochs, "seed": seed} | track.recipe("mend", base.name)
    rank = {"rank": recipe.pop("rank")} if "rank" in recipe else {}
    networks = MendNetworks.beside(base, **rank).to(base.model.device)
    folder = track.outputs / "trained" / f"mend-{base.name}-{seed}"
    curve = train_mend(MEND(base, networks), bench.train, bench.validation[:250], folder, **recipe)
    return networks.eval(), curve


def _measured(
    track: Track, bench: Benchmark, base: MLLM, method: str, modules: tuple, measure: Callable
) -> pd.DataFrame:
    """The table that ``measure(validation records)`` makes of a method's choices; made once, and read later."""
    held = bench.validation[: track.ike_records]
    made_of = f"{fingerprint(base.model)[:8]}-{digest([*bench.train, *held])[:8]}-{code_of(*modules)}"
    path = track.outputs / "trained" / f"{method}-{base.name}-{made_of}" / "validation.csv"
    with processes().main_process_first():
        if read_kept(path, pd.read_csv) is None:
            _, table = measure(held)
            with replacing(path) as whole:
                table.to_csv(whole, index=False)
    return pd.read_csv(path)


def ike_choices(track: Track, bench: Benchmark, backbone: str | MLLM) -> pd.DataFrame:
    """How IKE does on validation records by its number k of demonstrations, in shares; measured once."""
    base = load_base(track, backbone) if isinstance(backbone, str) else backbone
    modules = ("mscke.editors.ike", "mscke.editors.choose", "mscke.benchmark.answers")
    choose = lambda held: choose_k(base, bench.train, MiniLMEncoder(track.features), held)  # noqa: E731
    return _measured(track, bench, base, "ike", modules, choose)


def fine_tune_choices(track: Track, bench: Benchmark, base: MLLM) -> pd.DataFrame:
    """How FT-LLM does on validation records by its rate and steps, where the track has some to choose from: in shares."""
    choices = track.recipe("finetune").get("choices", ())
    if not choices:
        return pd.DataFrame(columns=["lr", "steps"])
    modules = ("mscke.editors.finetune", "mscke.editors.choose", "mscke.benchmark.answers")
    choose = lambda held: choose_rate(base, held, choices, track.edits_at_once)  # noqa: E731
    return _measured(track, bench, base, "finetune", modules, choose)


def fine_tune(track: Track, bench: Benchmark, base: MLLM) -> FineTune:
    """FT-LLM, with the rate and steps that do best on validation where the track has some to choose from."""
    table, told = fine_tune_choices(track, bench, base), {}
    if len(table):
        best = table.loc[table["score"].idxmax()]
        told = {"lr": float(best["lr"]), "steps": int(best["steps"])}
    return FineTune(base, at_once=track.edits_at_once, **told)


def ike(track: Track, bench: Benchmark, base: MLLM) -> IKE:
    """IKE with the number of demonstrations that does best on validation."""
    choices = ike_choices(track, bench, base)
    return IKE(base, bench.train, MiniLMEncoder(track.features), int(choices.loc[choices["score"].idxmax(), "k"]))


def answerer(track: Track, bench: Benchmark, base: MLLM, name: str) -> CounterfactualModel | MEND:
    """What answers in scope: one of the values of :data:`IN_SCOPE`."""
    if name == "MEND":
        return MEND(base, mend(track, bench, base)[0])
    return counterfactual(track, bench, base)[0]


def routed(base: MLLM, in_scope: CounterfactualModel, scope: dict[str, ScopeClassifier]) -> list[MSCKE]:
    """SERAC's and MSCKE's editors: they differ in their scope classifier and in nothing else."""
    return [MSCKE(base, in_scope, classifier, name) for name, classifier in scope.items()]


def editor(track: Track, bench: Benchmark, base: MLLM, method: str) -> Editor:
    """The editor that tables call ``method``, one of :data:`METHODS`, trained."""
    if method == "FT-LLM":
        return fine_tune(track, bench, base)
    if method == "IKE":
        return ike(track, bench, base)
    if method == "MEND":
        return answerer(track, bench, base, "MEND")
    scope = classifier(track, "MSCKE" if method == "MSCKE-MEND" else method)[0]
    return MSCKE(base, answerer(track, bench, base, IN_SCOPE[method]), scope, method)


def trained_track(about: str) -> Track:
    """The track that the command line names, with all of it trained: a command's first step."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--track", help="its name; unless told what MSCKE_TRACK says, or mini")
    track = get_track(parser.parse_args().track)
    if processes().device.type == "cpu":
        one_thread()
    train(track)
    return track


if __name__ == "__main__":
    trained_track(__doc__)
    processes().destroy_process_group()
