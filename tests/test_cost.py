"""Counts against formulas worked out by hand; timed work against the work that is really done."""

import mmap
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from mscke.cost import bench, peak
from mscke.cost import components as cost
from mscke.editors.mscke import MSCKE
from mscke.models.counterfactual import CounterfactualModel
from mscke.models.mllm import MLLM
from mscke.report import cost as costs
from mscke.report.paper import reported_cost
from mscke.system.workers import in_processes

pytest_plugins = ["tiny"]


@pytest.fixture(scope="module")
def in_scope(mllm):
    torch.manual_seed(9)
    return CounterfactualModel.beside(mllm).eval()


@pytest.fixture(scope="module")
def memory(classifier, records):
    return bench.memory_of(classifier, records, len(records))


@pytest.fixture(scope="module")
def parts(mllm, in_scope, classifier, memory, records):
    return {c.name: c for c in cost.components(mllm, in_scope, classifier, memory, records)}


# ------------------------------------------------------------------------------- counts


def block(length, width, inner):
    """FLOPs of a transformer layer: four projections, attention, two layers of an MLP."""
    return 2 * length * width * (4 * width + 2 * inner) + 4 * length * length * width


def test_flops_by_hand():
    linear, conv = nn.Linear(8, 4), nn.Conv2d(3, 5, 2, stride=2)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    q, x = torch.randn(1, 2, 5, 4), torch.randn(1, 5, 8)
    assert cost.flops(lambda: linear(torch.randn(3, 8))) == 2 * 3 * 8 * 4
    assert cost.flops(lambda: conv(torch.randn(1, 3, 6, 6))) == 2 * 9 * 5 * 3 * 4
    assert cost.flops(lambda: nn.functional.scaled_dot_product_attention(q, q, q)) == 2 * 2 * 2 * 5 * 5 * 4
    by_hand = 2 * 5 * 8 * 8 * 4 + 2 * 2 * 5 * 5 * 8
    for fast in (True, False):  # torch's fused path would count as nothing
        torch.backends.mha.set_fastpath_enabled(fast)
        try:
            assert cost.flops(lambda: attention(x, x, x, need_weights=False)) == by_hand
            assert torch.backends.mha.get_fastpath_enabled() == fast
        finally:
            torch.backends.mha.set_fastpath_enabled(True)


def test_flops_of_clip_by_hand(parts, encoder):
    clip = encoder.model
    length, width = clip.context_length, clip.ln_final.weight.numel()
    layers = clip.transformer.layers * block(length, width, 4 * width)
    assert cost.flops(lambda: parts["CLIP text"].run(1)) == layers + 2 * width * encoder.dim

    tower = clip.visual
    out, rgb, side, _ = tower.conv1.weight.shape
    patches = (tower.image_size[0] // side) ** 2
    layers = tower.transformer.layers * block(patches + 1, out, 4 * out)
    stem = 2 * patches * out * rgb * side * side
    assert cost.flops(lambda: parts["CLIP image"].run(1)) == stem + layers + 2 * out * encoder.dim


def test_every_parameter_is_counted_once(parts, mllm, in_scope, classifier, encoder, memory):
    table = cost.counts(list(parts.values())).set_index("component")
    size = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    parameters = table["parameters"]
    assert parameters[list(cost.PARTS["base model"])].sum() == size(mllm.model)
    assert parameters[["CLIP text", "CLIP image"]].sum() == size(encoder.model) - 1  # its training's scale
    assert parameters["classifier head"] == size(classifier)
    assert parameters["counterfactual language model"] == size(in_scope)
    assert parameters["memory lookup"] == len(memory) * classifier.dim
    assert (table["bytes"] == 4 * parameters).all()


def test_no_flop_of_the_vision_is_the_language_models(mllm, in_scope, records):
    fresh = MLLM(mllm.model, mllm.tokenizer, "fresh")  # has seen no image
    first = cost.base_components(fresh, [records[0].in_scope])[1]
    once, again = cost.flops(lambda: first.run(1)), cost.flops(lambda: first.run(1))
    assert once == again > 0
    fresh = CounterfactualModel.beside(MLLM(mllm.model, mllm.tokenizer, "fresh"))
    part = cost.counterfactual_component(fresh, records[:1])
    assert cost.flops(lambda: part.run(1)) == cost.flops(lambda: part.run(1)) > 0


def test_bytes_follow_the_type_of_number():
    weights = list(nn.Linear(3, 3).half().parameters())
    part = cost.Component("half", weights, lambda n: None)
    assert cost.counts([part]).loc[0, ["parameters", "bytes", "flops"]].tolist() == [12, 24, 0]


def test_parts_share_vision_and_name_components_that_exist(parts):
    assert {name for names in cost.PARTS.values() for name in names} == set(parts)
    values = pd.Series({name: 10.0**i for i, name in enumerate(parts)})
    assert cost.by_part(values).tolist() == [1111.0, 110000.0, 1010000.0]


# ------------------------------------------------------------------------------- what is timed


def test_components_do_the_real_work_and_keep_nothing(parts, mllm, in_scope, classifier, memory, records):
    queries, edits = [r.in_scope for r in records], [r.edit for r in records]
    features, tables = classifier.encoder(queries), (classifier.encoder.texts, classifier.encoder.images)
    held, z = [len(t.rows) for t in tables], classifier.embed(queries)
    run = {name: part.run(3) for name, part in parts.items()}
    near = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(run["CLIP text"][0], features.text[:3], **near)
    torch.testing.assert_close(run["CLIP image"][0], features.pooled[features.image[:3]], **near)
    torch.testing.assert_close(run["classifier head"], z[:3], **near)
    assert torch.equal(run["memory lookup"][1], memory.nearest(z[:3])[1])
    seen = mllm.features([q.image for q in queries[:3]])
    torch.testing.assert_close(run["vision and Q-Former"][0], seen, **near)
    assert run["language model"] == mllm.answer(queries[:3])
    assert run["counterfactual language model"] == in_scope.answer(queries[:3], edits[:3])
    assert [len(t.rows) for t in tables] == held


def test_calls_take_turns_and_the_first_round_warms_up():
    order = []
    taken = cost.in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3)
    assert order == ["a", "b"] * 4
    assert {name: len(seconds) for name, seconds in taken.items()} == {"a": 3, "b": 3}


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for who sleeps by it."""

    class Clock:
        now = 0.0

        def sleep(self, seconds):
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(cost, "perf_counter", lambda: clock.now)
    return clock


def test_seconds_are_seconds_and_the_budget_ends_the_rounds(clock):
    calls = {"long": lambda: clock.sleep(0.125), "short": lambda: clock.sleep(0.0625)}
    assert {k: v.tolist() for k, v in cost.in_turns(calls, 50, 0.5).items()} == {
        "long": [0.125] * 2,
        "short": [0.0625] * 2,
    }
    assert len(cost.in_turns(calls, 4)["long"]) == 4
    assert len(cost.in_turns({"a": lambda: None}, 50, budget=0.0)["a"]) == 1


def test_latency_is_that_of_one_query(clock):
    naps = iter([9.0, 0.25, 0.5, 1.0])  # the first round warms up
    part = cost.Component("sleeps", [], lambda n: clock.sleep(next(naps) * n))
    table = cost.latency([part], batch=4, repeats=3)
    assert table.columns.tolist() == ["component", "batch", "ms", "lo", "hi"]
    assert table.loc[0, ["ms", "lo", "hi"]].tolist() == [500, 375, 750]


def test_a_share_is_taken_round_by_round(monkeypatch):
    seconds = {"base": np.array([1.0, 2.0, 4.0]), "other": np.array([2.0, 2.0, 2.0])}
    monkeypatch.setattr(cost, "in_turns", lambda calls, rounds: {way: seconds[way] * rounds for way in calls})
    table = cost.side_by_side(dict.fromkeys(seconds), n=10, rounds=3).set_index("way")
    assert table.loc["other", ["ms", "lo", "hi"]].tolist() == [600, 600, 600]
    assert table.loc["base", ["ms", "lo", "hi"]].tolist() == [600, 450, 900]
    assert (table.loc["base", ["share", "share_lo", "share_hi"]] == 1).all()
    assert table.loc["other", ["share_lo", "share", "share_hi"]].tolist() == [0.75, 1, 1.5]  # of 2, 1 and 1/2


# ------------------------------------------------------------------------------- memory


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_held_rises_and_its_peak_stays():
    before = peak.held("VmRSS")
    block = mmap.mmap(-1, 64 * 2**20)  # an array may lie in memory that was held already
    for page in range(0, len(block), mmap.PAGESIZE):
        block[page] = 1
    assert peak.held("VmRSS") - before >= 60 * 2**20
    top = peak.held("VmHWM")
    block.close()
    assert abs(peak.held("VmHWM") - top) < 2**20 and top - peak.held("VmRSS") >= 60 * 2**20


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_fresh_process_does_not_start_at_its_parents_peak():
    block = np.ones(2**29 // 8)
    child, own = in_processes(peak.held, [("VmHWM",)], 1, fresh=True)[0], peak.held("VmHWM")
    assert child < own - block.nbytes / 2


# ------------------------------------------------------------------------------- bench


def test_both_ways_find_the_same_edit(classifier, records):
    n = len(records)
    ways = bench.lookups(classifier, records, n)
    z, edits = classifier.embed([records[0].in_scope]), bench.memory_of(classifier, records, n).embeddings
    assert ways["ours"]().tolist() == ways["baseline"]().tolist() == [int((z - edits).norm(dim=1).argmin())]


def test_encoding_is_the_classifiers_and_is_done_anew_each_time(classifier, records, monkeypatch):
    queries, answers = [r.queries["reliability"] for r in records], [r.edit.answer for r in records]
    clip, expected, calls = classifier.encoder.model, classifier.embed(queries, answers), []
    tables = classifier.encoder.texts, classifier.encoder.images
    embed = bench.encoding(classifier, queries, answers)
    plain = clip.forward_intermediates
    monkeypatch.setattr(clip, "forward_intermediates", lambda **x: calls.append(len(x["text"])) or plain(**x))
    for _ in range(2):
        torch.testing.assert_close(embed(5), expected[:5], atol=1e-4, rtol=1e-4)
    assert calls == [5, 5]
    assert (classifier.encoder.texts, classifier.encoder.images) == tables


def test_the_released_way_encodes_the_whole_memory(classifier, records, monkeypatch):
    n, seen = 3 * len(records) + 2, []
    ways, clip = bench.lookups(classifier, records, n), classifier.encoder.model
    plain = clip.forward_intermediates
    monkeypatch.setattr(clip, "forward_intermediates", lambda **x: seen.append(len(x["text"])) or plain(**x))
    ways["ours"]()
    assert sum(seen) == 1
    seen.clear()
    ways["baseline"]()
    assert sum(seen) == n + 1


def test_drawn_embeddings_are_distributed_as_the_real_ones():
    torch.manual_seed(0)
    real = nn.functional.normalize(torch.randn(400, 4) * torch.tensor([0.4, 0.2, 0.2, 0.05]) + 1, dim=-1)
    drawn = bench.alike(real, 20_000)
    assert torch.equal(drawn[:400], real) and torch.equal(bench.alike(real, 7), real[:7])
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(20_000))
    torch.testing.assert_close(drawn.mean(0), real.mean(0), atol=0.01, rtol=0)
    torch.testing.assert_close(drawn.T.cov(), real.T.cov(), atol=0.005, rtol=0)


def test_routing_rows_stop_the_released_way_when_it_is_too_slow(classifier, records):
    table = pd.DataFrame(bench.route(classifier, records, sizes=(1, 20, 300), patience=0.0))
    assert table.columns.tolist() == ["name", "n", "ours", "baseline", "ratio", "unit"]
    assert table["n"].tolist() == [1, 20, 300] and (table["name"] == "route").all()
    assert table["baseline"].isna().tolist() == [False, True, True] and (table["ours"] > 0).all()
    np.testing.assert_allclose(table["ratio"][0], table["baseline"][0] / table["ours"][0])


def test_rows_are_seconds_of_one_and_named_by_the_way(clock):
    slow, fast = lambda: clock.sleep(4.0), lambda: clock.sleep(0.5)
    rows = bench.compare("x", 9, "edit", {"ours": fast, "baseline": slow, "other": slow}, per=2, repeats=3)
    expected = {"n": 9, "ours": 0.25, "baseline": 2.0, "ratio": 8.0, "unit": "s/edit"}
    assert rows == [{"name": "x"} | expected, {"name": "x_other"} | expected]


def test_a_forgetful_editor_answers_alike_and_shares_nothing_remembered(blip2, classifier, records):
    torch.manual_seed(9)
    editor = MSCKE(blip2, CounterfactualModel.beside(blip2).eval(), classifier)
    queries, few = [q for r in records[:3] for q in r.queries.values()], records[:3]
    expected, tables = editor.edit(few).answer(queries), (classifier.encoder.texts, blip2.images)
    fresh, base = bench.forgetful(editor, blip2)
    assert not base.images.rows and not fresh.classifier.encoder.texts.rows and fresh.base is base
    assert fresh.in_scope.base is base and editor.in_scope.base is blip2
    assert fresh.edit(few).answer(queries) == expected
    assert base.images.rows and (editor.classifier.encoder.texts, blip2.images) == tables


# ------------------------------------------------------------------------------- report


@pytest.fixture(scope="module")
def costed(parts):
    """(counts, latency) of two backbones; times made up: 1 + place ms one at a time, half of it in batches."""
    counted = cost.counts(list(parts.values()))
    times = [
        {"component": name, "batch": batch, "ms": ms, "lo": 0.9 * ms, "hi": 1.2 * ms}
        for i, name in enumerate(parts)
        for batch, ms in ((1, 1.0 + i), (8, (1.0 + i) / 2))
    ]
    both = ("A", "B")
    return tuple(pd.concat([pd.DataFrame(x).assign(backbone=b) for b in both]) for x in (counted, times))


def test_the_tables_say_what_was_measured(costed):
    table = costs.cost_table(*costed)
    assert len(table) == 14 and table.groupby("backbone").size().tolist() == [7, 7]
    head = table[(table.backbone == "B") & (table.component == "classifier head")].iloc[0]
    assert head.ms_1 == 3.0 and head.ms_8_lo == pytest.approx(1.35) and head.ms_8_hi == pytest.approx(1.8)
    assert head.mib == head.parameters * 4 / 2**20

    peaks = pd.DataFrame(
        [(part, batch, 10.0 * batch) for part in cost.PARTS for batch in (1, 8)], columns=["part", "batch", "mib"]
    )
    beside = costs.part_table(table[table.backbone == "A"], peaks).set_index("part")
    assert beside.loc["scope classifier", "ms_1"] == 1 + 2 + 3 + 4
    assert beside.loc["counterfactual model", "share_8"] == pytest.approx((5 + 7) / (5 + 6))
    assert beside["mib_8"].tolist() == [80.0] * 3
    paper = reported_cost().set_index("part")["milliseconds"]
    np.testing.assert_allclose(beside["reported_share"], paper / paper["base model"])


def test_figures_show_what_was_measured(costed):
    fig = costs.plot_latency(costed[1])
    labels = [label.get_text() for label in fig.axes[0].get_yticklabels()]
    assert len(fig.axes) == 2 and labels[0] == "CLIP text" and len(labels) == 7
    sizes, theirs = [1, 10, 1000, 10_000], [0.01, 0.02, 2.0, np.nan]
    rows = pd.DataFrame({"n": sizes, "ours": 0.01, "baseline": theirs})
    ax = costs.plot_route(rows.assign(ratio=rows.baseline / rows.ours)).axes[0]
    measured, extrapolated, ours = ax.get_lines()
    assert measured.get_xdata().tolist() == [1, 10, 1000] and ours.get_xdata().tolist() == sizes
    assert extrapolated.get_ydata().tolist() == [2.0, 20.0]
    assert "200 ×" in [text.get_text().strip() for text in ax.texts]
