"""Figures of the guarantee: what is drawn is what the table says; intervals draw whole records."""

import numpy as np
import pandas as pd
import pytest

from mscke.evaluation.calibration import calibration_gaps, expected_error, random_cuts
from mscke.report.guarantee import error_interval, plot_cuts, plot_price, plot_reliability
from mscke.report.tables import mean_interval, write_table


@pytest.fixture(scope="module")
def scored():
    """Two questions a record, scored too high: (probability, in scope), both (400, 2)."""
    rng = np.random.default_rng(0)
    chance = rng.random((400, 2))
    return np.sqrt(chance), (rng.random((400, 2)) < chance).astype(float)


def test_error_and_its_interval_are_those_of_all_questions(scored):
    found = error_interval(*scored)
    assert found["ece"] == pytest.approx(expected_error(calibration_gaps(*(x.ravel() for x in scored))))
    assert found["lo"] < found["ece"] < found["hi"]
    rng, drawn = np.random.default_rng(1), []
    for _ in range(300):  # whole records, one draw after another
        rows = rng.integers(0, 400, 400)
        drawn.append(expected_error(calibration_gaps(*(x[rows].ravel() for x in scored))))
    basic = 2 * found["ece"] - np.percentile(drawn, (97.5, 2.5))
    assert (found["lo"], found["hi"]) == pytest.approx(basic, abs=0.01)


def test_the_interval_of_an_error_that_is_chance_goes_down_and_not_up():
    """Drawing again adds the bias of a sum of absolute values once more; the interval takes it off."""
    rng = np.random.default_rng(0)
    chance = rng.random((200, 2))
    truth = (rng.random((200, 2)) < chance).astype(float)
    found, drawn = error_interval(chance, truth), []
    for rows in rng.integers(0, 200, (300, 200)):
        drawn.append(expected_error(calibration_gaps(chance[rows].ravel(), truth[rows].ravel())))
    lo, hi = 2 * found["ece"] - np.percentile(drawn, (97.5, 2.5))
    assert found["ece"] < np.median(drawn) and hi < np.percentile(drawn, 97.5) - 0.01
    assert found["lo"] == pytest.approx(max(0, lo), abs=0.01)
    assert found["hi"] == pytest.approx(max(found["ece"], hi), abs=0.01) and found["lo"] <= found["ece"] <= found["hi"]


def test_mean_interval_of_truths():
    found = mean_interval(np.array([True, False] * 200))
    assert found["value"] == 0.5 and found["lo"] == pytest.approx(0.451, abs=0.01)


def test_cuts_are_drawn_and_counted():
    cuts = random_cuts(np.random.default_rng(0).random(300), 100, [0.05, 0.1], n_cuts=20)
    fig = plot_cuts(cuts)
    for ax, (_, part) in zip(fig.axes, cuts.groupby("rule", sort=False), strict=True):
        dots = [line for line in ax.lines if len(line.get_xdata()) == 20]
        assert len(dots) == 2
        np.testing.assert_allclose(dots[1].get_ydata(), 100 * part[part.alpha == 0.1].leak.clip(lower=0.0025))
        kept = [(p.leak <= a).mean() for a, p in part.groupby("alpha")]
        assert [text.get_text() for text in ax.texts] == [f"{100 * k:.0f} %" for k in kept]


def test_price_has_a_line_a_classifier():
    price = pd.DataFrame({"classifier": ["a", "a", "b", "b"], "alpha": [0.01, 0.1] * 2})
    price = price.assign(value=[0.1, 0.9, 0.5, 1.0], lo=0.0, hi=1.0)
    ax = plot_price(price).axes[0]
    assert [line.get_ydata().tolist() for line in ax.lines] == [[10, 90], [50, 100]]


def test_reliability_dots_lie_where_the_bins_do(scored):
    probability, truth = (x.ravel() for x in scored)
    fig = plot_reliability({"before": probability, "right": np.full(800, 0.5)}, truth)
    error = expected_error(calibration_gaps(probability, truth))
    assert fig.axes[0].get_title(loc="left") == f"before: ECE {100 * error:.1f} %"
    assert fig.axes[1].collections[-1].get_offsets().data == pytest.approx(np.array([[0.5, truth.mean()]]))


def test_shares_keep_their_decimals(tmp_path):
    frame = pd.DataFrame({"alpha": [0.01], "leak": [0.00648]})
    text = write_table(frame, "shares", tmp_path, decimals=4).read_text()
    assert text == "alpha,leak\n0.0100,0.0065\n"
    assert write_table(frame, "plain", tmp_path).read_text() == "alpha,leak\n0.01,0.01\n"
