"""Counted at the paper's sizes: as a sum of two per weight and token says, and without a weight in memory."""

import pytest

from mscke.report.paper_sizes import OPT_2_7B, paper_sizes


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
    assert (
        large.gflops["base model"] > 2 * small.gflops["base model"]
        and large.gflops["dot"] == small.gflops["dot"]
    )
