"""The panel is bound to pure functions: what it shows is what a table says, and it survives the disk."""

import base64
import io
import re

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from mscke.evaluation.metrics import METRICS, ROLES
from mscke.evaluation.outcomes import COLUMNS
from mscke.report import ablation
from mscke.report import panel as binding
from mscke.report.ablation import Scored, confusion, metrics, read
from mscke.report.panel import Panel, Picture, plot_panel
from mscke.report.tables import LABELS, summarise

R = 60
RIGHT = np.array([[0, 1], [0, 1], [0.1, 0.9], [1, 0.3], [1, 0.2]])  # the chance to be right: left, taken


@pytest.fixture(scope="module")
def scored():
    rng = np.random.default_rng(0)
    values = (rng.random((R, 5, 2)) < RIGHT).astype(float)
    reference = np.full((R, 5), "", dtype="<U8")
    reference[:, 2:4] = rng.choice(["colour", "place", "relation"], (R, 2))
    keys = [(c, f, s) for c in ("mini-B", "mini-L") for f in ("text", "dot") for s in (0, 1)]
    return Scored(values, reference, {key: rng.random((R, 5)).astype("float32") for key in keys})


@pytest.fixture
def panel(scored):
    return Panel(scored, "mini-L")


def by_hand(scored, key, threshold):
    """The same numbers by the main table's way: a row a query, summarised."""
    rows = [
        {"record": i, "metric": METRICS[role], "value": scored.values[i, j, int(scored.rho[key][i, j] >= threshold)]}
        for i in range(R) for j, role in enumerate(ROLES)
    ]  # fmt: skip
    names = {"track": "tiny", "backbone": "b", "method": "m", "protocol": "generated"}
    return summarise(pd.DataFrame(rows).assign(**names)).set_index("metric")


@pytest.mark.parametrize("threshold", [0.0, 0.37, 0.5, 1.0])
def test_metrics_are_those_of_the_main_table(scored, threshold):
    for key, rho in scored.rho.items():
        found, expected = (metrics(scored.values, rho, threshold).set_index("metric"), by_hand(scored, key, threshold))
        assert list(found.index) == list(COLUMNS)
        for column in ("value", "lo", "hi", "n"):
            np.testing.assert_allclose(found[column], expected.loc[found.index, column], atol=1e-9)


def test_moving_the_controls_shows_the_grids_numbers(scored, panel):
    shown = set()
    for clip, fusion, seed, threshold in [
        ("mini-B", "dot", 1, 0.5),
        ("mini-L", "text", 0, 0.2),
        ("mini-B", "text", 1, 0.81),
    ]:
        for name, value in {"clip": clip, "fusion": fusion, "seed": seed, "threshold": threshold}.items():
            panel.controls[name].value = value
        expected = by_hand(scored, (clip, fusion, seed), threshold)
        np.testing.assert_allclose(panel.metrics["value"], expected.loc[list(COLUMNS), "value"], atol=1e-9)
        assert f"{expected.loc['specificity', 'value']:.2f}" in panel.table.value
        assert panel.confusion.equals(confusion(scored.reference, scored.rho[clip, fusion, seed], threshold))
        shown.add(panel.picture.value)
    assert len(shown) == 3  # another picture each time


def test_a_slider_computes_when_it_is_let_go(panel):
    assert panel.controls["threshold"].continuous_update is False


def test_confusion_counts_every_question_once(scored):
    rho = scored.rho["mini-L", "dot", 0]
    table = confusion(scored.reference, rho, 0.4)
    assert table.to_numpy().sum() == 2 * R
    for kind, row in table.iterrows():
        for j, side in ((2, "in scope"), (3, "out of scope")):
            own = scored.reference[:, j] == kind
            assert row[f"{side} taken"] == (rho[own, j] >= 0.4).sum()
            assert row[f"{side} left"] == (rho[own, j] < 0.4).sum()
    assert (confusion(scored.reference, rho, 0.0).filter(like="left") == 0).all().all()


def test_scores_survive_the_disk(scored, tmp_path):
    scored.save(tmp_path / "deep" / "scores.parquet")
    again = Scored.open(tmp_path / "deep" / "scores.parquet")
    assert np.array_equal(again.values, scored.values) and (again.reference == scored.reference).all()
    assert list(again.rho) == list(scored.rho)
    assert all(np.array_equal(again.rho[key], rho) for key, rho in scored.rho.items())


def test_without_a_kernel_the_panel_is_its_picture(panel):
    bundle = panel._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    picture = base64.b64decode(bundle["image/png"])
    assert picture == panel.picture.value
    assert Image.open(io.BytesIO(picture)).size[0] > 600


def test_the_panel_writes_nothing_and_leaves_no_figure_open(panel, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = plt.get_fignums()
    panel.controls["fusion"].value = "text"
    assert plt.get_fignums() == before and not list(tmp_path.iterdir())


def test_one_picture_a_state_whatever_was_shown_before(scored):
    def drawn(picture, *state):
        picture.show(read(scored, *state))
        return picture.png()

    picture = Picture(scored.reference)
    first, other = drawn(picture, "mini-L", "dot", 0, 0.5), drawn(picture, "mini-B", "text", 1, 0.83)
    assert other != first == drawn(picture, "mini-L", "dot", 0, 0.5)
    assert other == drawn(Picture(scored.reference), "mini-B", "text", 1, 0.83)


@pytest.mark.parametrize("state", [("mini-L", "dot", 0, 0.5), ("mini-B", "text", 1, 0.07)])
def test_drawing_what_changed_gives_the_pixels_of_the_whole_figure(scored, state):
    picture = Picture(scored.reference)
    picture.show(read(scored, "mini-B", "dot", 1, 0.9))
    picture.png()
    picture.show(read(scored, *state))
    pixels = np.asarray(Image.open(io.BytesIO(picture.png())))
    picture.canvas.draw()
    assert np.array_equal(pixels, np.asarray(picture.canvas.buffer_rgba())[..., :3])


def test_each_row_of_the_picture_bears_its_own_number(scored):
    ax = plot_panel(scored, "mini-L", "dot", 0, 0.37).axes[0]
    found = metrics(scored.values, scored.rho["mini-L", "dot", 0], 0.37).set_index("metric")["value"]
    names = [label.get_text() for label in ax.get_yticklabels()]
    places = ax.lines[0].get_xdata()
    for y, (metric, value) in enumerate(found.items()):
        text = next(t for t in ax.texts if t.xy[1] == y)
        assert (names[y], text.get_text(), places[y]) == (LABELS[metric], f"{value:.1f}", value)


def test_a_change_makes_no_figure_and_heaps_up_no_artist(panel, monkeypatch):
    made, start = [], Figure.__init__
    monkeypatch.setattr(Figure, "__init__", lambda self, *a, **k: (made.append(self), start(self, *a, **k))[1])
    before = len(panel.figure.figure.findobj())
    for threshold in (0.2, 0.9, 0.4):
        panel.controls["threshold"].value = threshold
    assert not made and len(panel.figure.figure.findobj()) == before


def test_a_state_is_computed_once_and_the_resamples_are_drawn_once(scored, monkeypatch):
    asked, drawn, rng = [], [], np.random.default_rng
    monkeypatch.setattr(binding, "read", lambda s, **state: (asked.append(state), read(s, **state))[1])
    monkeypatch.setattr(np.random, "default_rng", lambda seed: (drawn.append(seed), rng(seed))[1])
    panel = Panel(scored, "mini-L")
    for threshold in (0.2, 0.9, 0.2, 0.5, 0.9):
        panel.controls["threshold"].value = threshold
    assert [state["threshold"] for state in asked] == [0.5, 0.2, 0.9]
    assert len(drawn) <= 1  # none if a table of as many records was made before


def test_reset_goes_back_in_one_step(scored, monkeypatch):
    panel = Panel(scored, "mini-L", "text", 1, 0.3)
    first = panel.state, panel.picture.value, panel.table.value
    panel.go(clip="mini-B", fusion="dot", seed=0, threshold=0.81)
    assert panel.state == {"clip": "mini-B", "fusion": "dot", "seed": 0, "threshold": 0.81}
    assert panel.metrics.equals(metrics(scored.values, scored.rho["mini-B", "dot", 0], 0.81))
    shown = []
    monkeypatch.setattr(
        panel.figure, "show", lambda reading, show=panel.figure.show: (shown.append(reading), show(reading))
    )
    panel.reset.click()
    assert (panel.state, panel.picture.value, panel.table.value) == first and len(shown) == 1


def test_a_sliders_rounding_is_no_other_threshold(scored, panel):
    panel.controls["threshold"].value = 0.1 + 0.2  # 0.30000000000000004
    assert panel.state["threshold"] == 0.3


def cells(row):
    return re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)


def test_a_tables_header_stands_over_its_columns_and_its_numbers_are_the_csvs(scored, panel):
    tables = re.findall(r"<table.*?</table>", panel.table.value, re.DOTALL)
    frames = [panel.metrics.assign(metric=panel.metrics["metric"].map(LABELS)), panel.confusion.reset_index()]
    for table, frame in zip(tables, frames, strict=True):
        rows = [cells(row) for row in re.findall(r"<tr.*?</tr>", table, re.DOTALL)]
        written = frame.to_csv(index=False, float_format="%.2f", lineterminator="\n")
        assert rows == [line.split(",") for line in written.splitlines()]


# ------------------------------------------------------------------ several seeds


@pytest.fixture(scope="module")
def table(scored):
    parts = [metrics(scored.values, rho).assign(clip=c, fusion=f, seed=s) for (c, f, s), rho in scored.rho.items()]
    return pd.concat(parts, ignore_index=True)


def test_seeds_are_averaged_and_their_spread_kept(table):
    fine = table[table["metric"] == "specificity"]
    spread = ablation.over_seeds(fine, ["clip", "fusion"])
    for row in spread.itertuples():
        own = fine[(fine["clip"] == row.clip) & (fine["fusion"] == row.fusion)]["value"]
        assert (row.value, row.lo, row.hi) == pytest.approx((own.mean(), own.min(), own.max()))
    cells = ablation.spread_cells(fine, "fusion", "clip")
    assert list(cells.index) == ["text", "dot"] and list(cells.columns) == ["mini-B", "mini-L"]
    first = spread.iloc[0]
    assert cells.loc["text", "mini-B"] == f"{first.value:.1f} ({first.lo:.1f}–{first.hi:.1f})"


def test_a_difference_is_paired_by_record():
    rng = np.random.default_rng(1)
    a = rng.random((3, 200))
    shifted = ablation.difference(a + 0.1, a)
    assert shifted == pytest.approx({"points": 10, "lo": 10, "hi": 10})
    apart = ablation.difference(a, rng.permutation(a.T).T)
    assert apart["lo"] < 0 < apart["hi"]


def test_every_seed_and_the_papers_number_are_drawn(table):
    reported = pd.DataFrame({"fusion": ["dot"], "clip": ["mini-L"], "value": [64.85]})
    fig = ablation.plot_seeds(table, "fusion", "clip", reported)
    drawn = {tuple(np.round(line.get_xdata(), 6)) for line in fig.axes[0].lines}
    for clip in ("mini-B", "mini-L"):
        fine = table[(table["metric"] == "specificity") & (table["clip"] == clip)]
        assert tuple(np.round(fine["value"], 6)) in drawn
        assert tuple(np.round(fine.groupby("fusion", sort=False)["value"].mean(), 6)) in drawn
    assert (64.85,) in drawn
