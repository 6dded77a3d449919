"""Tracks, paths and seeds. Only this module knows how one track differs from another."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ASSETS = Path(__file__).resolve().parent / "assets"


@dataclass(frozen=True)
class Track:
    """Sizes, models and recipes of one way to run the notebooks."""

    name: str
    n_train: int
    n_test: int
    backbones: dict[str, str]  # table name -> folder of a saved Blip2ForConditionalGeneration
    clips: dict[str, str]  # short name -> what open_clip.create_model takes
    clip: str  # the one of ``clips`` that MSCKE uses in the main results
    classifier_epochs: int
    counterfactual_epochs: int
    mend_epochs: int
    ike_records: int = 60  # validation records on which IKE's number of demonstrations is chosen
    validation: float = 0.1  # share of train
    seed: int = 0

    @property
    def data(self) -> Path:
        """The benchmark: ``train_data.json``, ``test_data.json`` and the images they name."""
        return self.outputs / "data"

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
        """Figures and tables: the committed ones for ``mini``, beside the outputs otherwise."""
        return ROOT / "figures" if self.name == "mini" else self.outputs / "figures"


_MINI = {
    "backbones": {
        "BLIP-2-mini": str(ASSETS / "blip2-mini"),
        "MiniGPT-4-mini": str(ASSETS / "minigpt4-mini"),
    },
    "clips": {
        "mini-B": f"local-dir:{ASSETS / 'clip-mini-b'}",
        "mini-L": f"local-dir:{ASSETS / 'clip-mini-l'}",
    },
    "clip": "mini-L",
}

TRACKS = {
    "mini": Track("mini", 8334, 2778, **_MINI, classifier_epochs=5, counterfactual_epochs=2, mend_epochs=2),
    "smoke": Track("smoke", 96, 32, **_MINI, classifier_epochs=2, counterfactual_epochs=1, mend_epochs=1),
}


def get_track(name: str | None = None) -> Track:
    """The track ``name``; without a name the one that MSCKE_TRACK says, else ``mini``.

    Raises ValueError for a name that is no track.
    """
    name = name or os.environ.get("MSCKE_TRACK") or "mini"
    if name not in TRACKS:
        raise ValueError(
            f"no track {name!r}; MSCKE_TRACK or the notebook's `track` must be one of {sorted(TRACKS)}"
        )
    return TRACKS[name]
