"""Pretraining of the mini CLIPs: the light one's next-word loss, and that the shipped files are what the code makes."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from mscke.config import ASSETS
from mscke.pretraining import clip


def test_the_next_word_loss_is_the_mean_surprise_at_words_that_follow():
    rng = np.random.default_rng(0)
    words, embedding = rng.normal(size=(2, 4, 3)), rng.normal(size=(6, 3))
    tokens = np.array([[4, 5, 2, 1], [3, 2, 1, 1]])  # 1 pads
    surprise = []
    for state, row in zip(words, tokens, strict=True):
        for here, following in zip(state[:-1], row[1:], strict=True):
            if following != 1:
                odds = np.exp(embedding @ here)
                surprise.append(-np.log(odds[following] / odds.sum()))
    found = clip.next_word(*map(torch.tensor, (words, tokens, embedding)), pad=1)
    assert len(surprise) == 3
    assert found.item() == pytest.approx(np.mean(surprise))


@pytest.mark.parametrize("name", clip.SIZES)
def test_shipped_clips_have_the_sizes_of_the_code(name, tmp_path):
    clip.write_config(tmp_path, name)
    made, shipped = (json.loads((p / "open_clip_config.json").read_text()) for p in (tmp_path, ASSETS / name))
    assert made == shipped


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip-mini-b", "clip-mini-s"])
def test_pretraining_runs_and_only_the_light_clip_foretells_words(name, tmp_path, monkeypatch):
    monkeypatch.setitem(clip.SIZES, name, (16, 2, 1))
    model = clip.pretrain_clip(name, tmp_path / name, tmp_path, dense_steps=1, steps=2, seed=0)
    curve = pd.read_csv(tmp_path / f"{name}.csv")
    assert ("words" in curve) == (name in clip.NEXT_WORD)
    assert np.isfinite(curve.to_numpy()).all() and curve.step.iloc[-1] == 2
    assert all(p.isfinite().all() for p in model.parameters())
