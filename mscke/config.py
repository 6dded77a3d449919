"""Tracks, paths and seeds. Only this module knows how one track differs from another."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ASSETS = Path(__file__).resolve().parent / "assets"


@dataclass(frozen=True)
class Track:
    """Sizes, models and recipes of one way to run the notebooks."""

    name: str
    n_train: int
    n_test: int
    backbones: dict[str, str]  # table name -> source (mscke.models.sources) of the MLLM
    clips: dict[str, str]  # short name -> source of an open_clip model
    clip: str  # the one of ``clips`` that MSCKE uses in the main results
    classifier_epochs: int
    counterfactual_epochs: int
    mend_epochs: int
    ike_records: int = 30  # validation records on which IKE's number of demonstrations is chosen
    light: str = ""  # the one that 07_grounded's classifier reads, left out of 04; "": ``clip``
    validation: float = 0.1  # share of train
    seed: int = 0
    fetched: bool = False  # data and models come through mscke.fetching.store; nothing is generated
    tiny: bool = False  # they come from folders that mscke.models.tiny has written, not from the user's
    counterfactuals: dict[str, str] = field(default_factory=dict)  # backbone -> source; fresh layers if none
    recipes: dict[str, dict] = field(default_factory=dict)  # what is trained -> arguments, if not the defaults
    image_size: int | None = None  # side of the images that an MLLM is shown, in pixels; None: its own
    device: str = "cpu"  # "cuda": a GPU or nothing; "auto": the GPU, if there is one
    half: bool = False  # base models in bfloat16 on a CPU too
    eight_bit: bool = False  # language models in 8-bit integers (bitsandbytes), on a GPU only
    batch_size: int = 128  # queries that an MLLM is asked at once; more of mini's leave the processor's cache
    edits_at_once: int | None = None  # that FT-LLM keeps copies of weights for; None: all
    half_features: bool = False  # CLIP's features kept in float16: an image of ViT-L/14 is 0.5 MB then
    # seconds: what takes longer for one query is not timed further (06_cost); 0 where times mean nothing
    patience: float = 5.0
    workers: int = 2  # processes that train or evaluate side by side, each with models of its own

    def recipe(self, trained: str, which: str = "") -> dict:
        """Arguments of the function that trains ``trained`` (``which`` of them), where they are not its own."""
        return self.recipes.get(trained, {}) | self.recipes.get(f"{trained} {which}", {})

    @property
    def data(self) -> Path:
        """The benchmark: ``train_data.json``, ``test_data.json`` and the images they name."""
        return self.store / "data"

    @property
    def benchmark(self) -> str:
        """What the data are called."""
        return "FGVEdit" if self.fetched else "FGVEdit-Scenes"

    @property
    def sizes(self) -> dict[str, int]:
        """Records of each split."""
        return {"train": self.n_train, "test": self.n_test}

    @property
    def models(self) -> Path:
        """Models that are composed of fetched ones."""
        return self.store / "models"

    @property
    def store(self) -> Path:
        """Where data and composed models lie; tracks that fetch the same share it."""
        return ROOT / "outputs" / "paper" if self.fetched and not self.tiny else self.outputs

    @property
    def fetches(self) -> set[str]:
        """The hub's repositories that the sources name (:mod:`mscke.models.sources`)."""
        named = [*self.backbones.values(), *self.clips.values(), *self.counterfactuals.values()]
        known = [source.partition(":") for source in named]
        return {repo for kind, _, what in known if kind in ("hub", "minigpt4") for repo in what.split("+")}

    @property
    def sources(self) -> dict[str, Path | None]:
        """Local folders that fetching reads first: those that MSCKE_DATA and MSCKE_MODELS name, or the tiny ones."""
        if self.tiny:
            return {name: self.outputs / "sources" / name for name in ("data", "models")}
        own = {name: os.environ.get(f"MSCKE_{name.upper()}") for name in ("data", "models")}
        return {name: Path(path).expanduser() if path else None for name, path in own.items()}

    @property
    def lock(self) -> Path:
        """What was fetched, by revision and SHA-256: to be committed for ``paper``."""
        return (self.outputs if self.tiny else ROOT) / "paper.lock.json"

    @property
    def outputs(self) -> Path:
        """Everything computed on the way; safe to delete."""
        return ROOT / "outputs" / self.name

    @property
    def features(self) -> Path:
        """Features of what is frozen, kept between processes."""
        return self.outputs / "features"

    @property
    def published(self) -> Path:
        """Trained weights: those of the committed results for ``mini``, beside the outputs otherwise."""
        return ASSETS / "trained" if self.name == "mini" else self.outputs / "published"

    @property
    def figures(self) -> Path:
        """Figures and tables: where MSCKE_FIGURES says, else the committed ones for ``mini``, else beside the outputs."""
        if told := os.environ.get("MSCKE_FIGURES"):
            return Path(told).expanduser()
        return ROOT / "figures" if self.name == "mini" else self.outputs / "figures"


_MINI = {
    "backbones": {"BLIP-2-mini": str(ASSETS / "blip2-mini"), "MiniGPT-4-mini": str(ASSETS / "minigpt4-mini")},
    "clips": {
        "mini-B": f"local-dir:{ASSETS / 'clip-mini-b'}",
        "mini-L": f"local-dir:{ASSETS / 'clip-mini-l'}",
        "mini-S": f"local-dir:{ASSETS / 'clip-mini-s'}",
    },
    "clip": "mini-L",
    "light": "mini-S",
}
# The counterfactual model infers the rephrasing from these two: as right on validation as taught all three.
_TAUGHT = {"counterfactual": {"roles": ("reliability", "in_scope")}}

# The paper's models, images and training (§5 and the authors' release), and where ours differ:
# * scope classifier: theirs trains all of CLIP with Adam at 1e-5, one record a step, 50k steps: 7 passes over
#   the records. Here CLIP stays frozen, so that images are encoded once, and the head, which starts from
#   nothing, keeps its own rate and batch; the passes are theirs.
# * counterfactual: theirs, but for AdamW with one cycle of the rate where they hold Adam's constant.
# * MEND: their rank, rates (1e-6; 1e-4 for the updates' own), batch (1, accumulated twice) and passes. The updates'
#   own rate α starts at ours (0.7): a pair keeps the gradient's units here, theirs is normalised and scaled by 1e-4.
# * the last epoch is kept, theirs is selected on test samples.
_PAPER = {
    "backbones": {
        "BLIP-2 OPT": "hub:Salesforce/blip2-opt-2.7b",
        "MiniGPT-4": "minigpt4:Salesforce/blip2-flan-t5-xxl+Vision-CAIR/vicuna-7b",
    },
    "clips": {
        "ViT-B-32": "hub:timm/vit_base_patch32_clip_224.openai",
        "ViT-L-14": "hub:timm/vit_large_patch14_clip_224.openai",
    },
    "clip": "ViT-L-14",
    "counterfactuals": {"BLIP-2 OPT": "hub:facebook/opt-125m", "MiniGPT-4": "last:1"},
    "fetched": True,
    "image_size": 364,
    "device": "cpu" if os.environ.get("MSCKE_CPU") == "1" else "cuda",  # on a CPU it may take months
    "eight_bit": os.environ.get("MSCKE_8BIT") == "1",
    "half_features": True,
    "workers": 1,  # a GPU holds one base model of each process
}
_ANY = "cpu" if os.environ.get("MSCKE_CPU") == "1" else "auto"  # where what a CPU can do computes
_RECIPES = {
    "counterfactual": {"lr": 1e-5, "batch_size": 1, "clip": 100.0},
    "counterfactual MiniGPT-4": {"epochs": 3},  # 20k steps
    # EasyEdit's FT takes 5e-4 and 25 steps; ours are chosen on validation
    "finetune": {"choices": ((1e-4, 25), (5e-4, 25), (5e-4, 50), (3e-3, 25))},
    "mend": {"lr": 1e-6, "rate_lr": 1e-4, "batch_size": 2, "accumulate": 2, "rank": 1920, "clip": 100.0},
}

TRACKS = {
    "mini": Track(
        "mini", 8334, 2778, **_MINI, classifier_epochs=4, counterfactual_epochs=2, mend_epochs=1,
        recipes=_TAUGHT,
    ),
    "smoke": Track(
        "smoke", 96, 32, **_MINI, classifier_epochs=2, counterfactual_epochs=1, mend_epochs=1, patience=0.0,
        recipes=_TAUGHT,
    ),
    "paper": Track(
        "paper", 8334, 2778, **_PAPER, classifier_epochs=7, counterfactual_epochs=7, mend_epochs=4,
        recipes=_RECIPES, batch_size=64, edits_at_once=2,
    ),
    # the same through the same doors, on models and data of mscke.models.tiny
    "paper-tiny": Track(
        "paper-tiny", 48, 16, **_PAPER | {"workers": 2, "device": _ANY}, classifier_epochs=1, counterfactual_epochs=1, mend_epochs=1,
        recipes={"mend": {"rank": 8}, "finetune": {"choices": ((5e-4, 2), (3e-3, 2))}}, tiny=True, half=True, patience=0.0, ike_records=4, batch_size=64, edits_at_once=4,
    ),
}  # fmt: skip
# BLIP-2 alone: for one GPU of 24 GB
TRACKS["paper-blip2"] = replace(
    TRACKS["paper"], name="paper-blip2", backbones={"BLIP-2 OPT": _PAPER["backbones"]["BLIP-2 OPT"]},
    counterfactuals={"BLIP-2 OPT": "hub:facebook/opt-125m"},
)  # fmt: skip
# The paper's models at their shapes with random weights, on a few records of FGVEdit-Scenes: what would the track take?
_DRY = {
    "n_train": 64, "n_test": 24, "fetched": False, "half": True, "patience": 0.0, "ike_records": 4,
    "clips": {"ViT-B-32": "ViT-B-32-quickgelu", "ViT-L-14": "ViT-L-14-quickgelu"}, "device": _ANY,
}  # fmt: skip
TRACKS["paper-dry"] = replace(
    TRACKS["paper"], **_DRY, name="paper-dry",
    backbones={"BLIP-2 OPT": "shape:opt-2.7b", "MiniGPT-4": "shape:vicuna-7b"},
    counterfactuals={"BLIP-2 OPT": "shape:opt-125m", "MiniGPT-4": "last:1"},
)  # fmt: skip
TRACKS["paper-dry-tiny"] = replace(
    TRACKS["paper-dry"], name="paper-dry-tiny", recipes={"mend": {"rank": 8}}, image_size=42,
    clips=_MINI["clips"], clip="mini-S",
    backbones={"BLIP-2 OPT": "shape:opt-tiny", "MiniGPT-4": "shape:vicuna-tiny"},
    counterfactuals={"BLIP-2 OPT": "shape:opt-tiny", "MiniGPT-4": "last:1"},
)  # fmt: skip


def get_track(name: str | None = None) -> Track:
    """The track ``name``; without a name the one that MSCKE_TRACK says, else ``mini``.

    Raises ValueError for a name that is no track.
    """
    name = name or os.environ.get("MSCKE_TRACK") or "mini"
    if name not in TRACKS:
        raise ValueError(f"no track {name!r}; MSCKE_TRACK or the notebook's `track` must be one of {sorted(TRACKS)}")
    return TRACKS[name]
