"""Lines over an axis: what is drawn is what the table says."""

import numpy as np
import pandas as pd
import pytest

from mscke.report.tables import summarise
from mscke.report.transfer import plot_rivals, plot_trends, summarise_by


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        [(n, m, r) for n in (1, 10, 100) for m in ("m_in", "m_out") for r in range(20)],
        columns=["n_edits", "metric", "record"],
    )
    names = {"track": "mini", "backbone": "B", "method": "MSCKE", "protocol": "generated"}
    return frame.assign(value=rng.integers(0, 2, len(frame)).astype(float), **names)


def test_each_size_is_summarised_as_if_alone(rows):
    table = summarise_by(rows, "n_edits")
    assert table.n_edits.unique().tolist() == [1, 10, 100]
    alone = summarise(rows[rows.n_edits == 10]).assign(n_edits=10)
    pd.testing.assert_frame_equal(table[table.n_edits == 10].reset_index(drop=True), alone)


def test_a_line_a_hue_and_a_panel_a_metric(rows):
    table = summarise_by(rows, "n_edits")
    both = pd.concat([table, table.assign(method="SERAC", value=table.value / 2)])
    fig = plot_trends(both, "n_edits", "edits", "method", "metric", logx=True, marks={"here": 5.0})
    shown = [ax for ax in fig.axes if ax.get_visible()]
    assert len(shown) == both.metric.nunique() and shown[0].get_xscale() == "log"
    assert [tick.get_text() for tick in shown[0].get_xticklabels()] == ["1", "10", "100"]
    for ax, metric in zip(shown, both.metric.unique(), strict=True):
        drawn = [line.get_ydata() for line in ax.lines if len(line.get_xdata()) == 3]
        for line, method in zip(drawn, ("MSCKE", "SERAC"), strict=True):
            part = both[(both.metric == metric) & (both.method == method)].sort_values("n_edits")
            np.testing.assert_allclose(line, part.value)
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["MSCKE", "SERAC", "here"]


def test_rivals_counts_queries_above_the_threshold():
    asked = pd.DataFrame({
        "role": ["reliability"] * 4 + ["out_of_scope"] * 4,
        "own": [0.9] * 4 + [0.1] * 4,
        "rival": [0.2, 0.6, 0.7, 0.1, 0.1, 0.1, 0.1, 0.5],
    })  # fmt: skip
    fig = plot_rivals(asked)
    titles = [ax.get_title(loc="left") for ax in fig.axes]
    assert ["50.0 %" in titles[0], "25.0 %" in titles[1]] == [True, True]
