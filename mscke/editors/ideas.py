"""Other ways to ground a scope classifier: what was tried, each a few lines away from ``grounded``.

They are kept so that their numbers can be had again; none of them is used elsewhere::

    curve = try_idea("mini", "averaged words", seed=0)     # trained as all others, right_* on validation
"""

from __future__ import annotations

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mscke.classifier import ScopeClassifier
from mscke.config import get_track
from mscke.editors.grid import Shared, Spec, recipe
from mscke.models.attention import sum_patches
from mscke.models.clip import Features
from mscke.training.scope import train_classifier


class Averaged(ScopeClassifier):
    """The mean of a text's words, where ours has readers that choose among them."""

    def read(self, f: Features) -> tuple[Tensor, Tensor]:
        words = f.words[:]
        said = words.any(-1, keepdim=True)
        mean = (words.sum(1) / said.sum(1))[f.said]
        return mean.repeat(1, self.readers), said[f.said]


class OneReader(ScopeClassifier):
    """One reader of the words, where ours has four."""

    readers = 1


class TwoCodes(ScopeClassifier):
    """z in two halves, each a unit vector: in scope only what agrees with the edit in both."""

    def _unit(self, z: Tensor) -> Tensor:
        return F.normalize(z.unflatten(-1, (2, -1)), dim=-1).flatten(-2)


class SecondStep(ScopeClassifier):
    """A second step of attention that knows what the first has found: from a relation's anchor to its target."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        d_t, d_v = self.encoder.text_dim, self.encoder.patch_dim
        self.step = nn.Sequential(nn.LayerNorm(d_t + d_v), nn.Linear(d_t + d_v, d_v), nn.GELU(), nn.Linear(d_v, d_v))

    def attend(self, f: Features) -> tuple[Tensor, Tensor]:
        found, _ = super().attend(f)
        query = self.step(torch.cat([f.text, found], -1))
        weights = (f.tokens[f.image] @ query.unsqueeze(-1)).squeeze(-1).mul(query.shape[-1] ** -0.5).softmax(-1)
        return found + sum_patches(weights, f.tokens, f.image), weights


IDEAS = {
    "averaged words": Averaged,
    "one reader": OneReader,
    "two codes": TwoCodes,
    "a second step of attention": SecondStep,
}


def try_idea(track_name: str, name: str, seed: int = 0) -> pd.DataFrame:
    """Train one of :data:`IDEAS`, or read it; its curve. KeyError for a name that is none of them."""
    track, spec = get_track(track_name), Spec("grounded", seed=seed)
    shared = Shared.of(track)
    folder = track.outputs / "trained" / f"idea-{name.replace(' ', '-')}-{seed}"
    classifier = shared.fresh(spec, IDEAS[name])
    told = recipe(track, spec)
    return train_classifier(classifier, shared.bench.train, shared.bench.validation, folder, seed=seed, **told)
