"""Counted at the paper's sizes: as a sum of two per weight and token says, and without a weight in memory."""

import numpy as np
import pytest
import torch

from mscke.cost import paper_sizes as module
from mscke.cost.components import flops
from mscke.cost.paper_sizes import OPT_2_7B, paper_seconds, paper_sizes


def test_counts_are_two_flops_a_weight_and_token():
    """By hand, from published shapes: attention's products, which it leaves out, are a small part."""
    table = paper_sizes(side=224, tokens=20)
    vit_l, vit_g = 24 * 12 * 1024**2, 39 * (4 * 1408**2 + 2 * 1408 * 6144)
    text, opt = 12 * 12 * 768**2, 32 * 12 * 2560**2 + OPT_2_7B["vocab_size"] * 2560
    classifier = 2e-9 * (257 * vit_l + 77 * text)
    base = 2e-9 * (257 * vit_g + 52 * opt)
    assert table.gflops["dot"] == pytest.approx(classifier, rel=0.06)
    assert table.gflops["base model"] == pytest.approx(base, rel=0.06)
    assert table.share["grounded"] == table.gflops["grounded"] / table.gflops["base model"]
    assert 0 < table.gflops["grounded"] - table.gflops["dot"] < 0.05


def test_more_pixels_cost_the_base_model_alone():
    small, large = paper_sizes(side=224), paper_sizes(side=364)
    assert large.gflops["base model"] > 2 * small.gflops["base model"] and large.gflops["dot"] == small.gflops["dot"]


def test_what_is_timed_at_two_depths_is_what_is_counted(monkeypatch):
    """Work instead of time: extended from two depths to all layers it is that of the whole models."""
    count = lambda runs, repeats: {depth: np.full(repeats, flops(run)) for depth, run in runs.items()}  # noqa: E731
    monkeypatch.setattr(module, "in_turns", count)
    counted, whole = paper_seconds(side=224), paper_sizes(side=224)
    by_part = counted.groupby("part")["seconds"].sum() / 1e9
    assert by_part["base model"] == pytest.approx(whole.gflops["base model"], rel=0.02)
    assert by_part["classifier"] == pytest.approx(whole.gflops["dot"], rel=0.01)
    assert (counted.lo == counted.hi).all()


def test_seconds_are_extended_by_the_layers_left_out(monkeypatch):
    monkeypatch.setattr(module, "_stacks", lambda tokens, side: [("part", "stack", 10, lambda depth: depth)])
    monkeypatch.setattr(module, "in_turns", lambda runs, repeats: {2: np.array([1.0, 2.0]), 4: np.array([2.0, 2.0])})
    (row,) = paper_seconds().to_dict("records")
    assert (row["seconds"], row["lo"], row["hi"]) == (3.5, 2.0, 5.0)  # 1 + 8 · 0.5 and 2 + 8 · 0


def test_whole_models_are_timed_on_what_is_counted(monkeypatch):
    """Work instead of time, and shapes instead of the fifteen gigabytes."""
    counted = {}

    def count(ways, repeats):
        counted.update({name: flops(run) for name, run in ways.items()})
        return {name: np.array([1.0, 3.0, 2.0]) * work for name, work in counted.items()}

    monkeypatch.setattr(module, "in_turns", count)
    monkeypatch.setattr(module, "_constant", lambda model: model.requires_grad_(False))
    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda self, device: self)
    table = module.whole_seconds(side=224)
    whole = paper_sizes(side=224)
    assert counted["base model"] / 1e9 == whole.gflops["base model"]
    assert counted["classifier"] / 1e9 == pytest.approx(whole.gflops["grounded"])
    assert table.share["classifier"] == pytest.approx(whole.share["grounded"])
    assert (table.seconds == 2 * table.lo).all() and (table.hi == 3 * table.lo).all()
