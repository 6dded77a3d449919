"""What was promised and what was kept: leaks over random cuts, their price, and reliability diagrams."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mscke.evaluation.calibration import BINS, bin_of, calibration_gaps, expected_error
from mscke.report.figures import IN, OUT, metric_label
from mscke.report.tables import resampled_means

GUIDE = {"color": "#222222", "lw": 1, "ls": (0, (4, 3))}


def error_interval(probability: np.ndarray, in_scope: np.ndarray) -> dict[str, float]:
    """ece, lo, hi: the expected calibration error and its bootstrap 95 % interval, over records.

    Both arrays are (R, …): the questions of one record are drawn together. A sum of absolute values is biased
    upwards, and drawing again adds the same bias once more. So the interval is the basic one, which takes that
    off again, not that of percentiles. Near 0 the estimate itself stays too high.
    """
    gaps = calibration_gaps(probability.ravel(), in_scope.ravel())
    gaps = gaps.reshape(len(probability), -1, BINS).mean(1)
    ece = float(expected_error(gaps))
    hi, lo = 2 * ece - np.percentile(np.abs(resampled_means(gaps)).sum(1), (2.5, 97.5))
    return {"ece": ece, "lo": max(0.0, float(lo)), "hi": max(ece, float(hi))}


def plot_cuts(cuts: pd.DataFrame) -> Figure:
    """Leak against α over random cuts: each cut a dot, the middle half a bar, a panel a rule; α the diagonal.

    ``cuts``: of :func:`mscke.evaluation.calibration.random_cuts`. Axes are logarithmic: cuts without a leak lie
    on the lower edge.
    """
    rules, alphas = cuts["rule"].unique(), np.sort(cuts["alpha"].unique())
    floor, ends = alphas[0] / 20, (60 * alphas[0], 170 * alphas[-1])
    jitter = np.random.default_rng(0)
    fig, axes = plt.subplots(1, len(rules), figsize=(3.3 * len(rules), 3.2), sharey=True, squeeze=False)
    for ax, rule, colour in zip(axes[0], rules, (IN, OUT), strict=False):
        ax.plot(ends, ends, **GUIDE)
        for alpha, part in cuts[cuts["rule"] == rule].groupby("alpha"):
            leak = 100 * part["leak"].clip(lower=floor)
            x = 100 * alpha * np.exp(jitter.uniform(-0.14, 0.14, len(part)))
            ax.plot(x, leak, "o", ms=2.5, mew=0, alpha=0.4, color=colour)
            ax.vlines(100 * alpha, *leak.quantile([0.25, 0.75]), color=colour, lw=4, zorder=3)
            kept = f"{100 * (part['leak'] <= alpha).mean():.0f} %"
            ax.annotate(kept, (100 * alpha, 1.03), xycoords=("data", "axes fraction"), ha="center", fontsize=8)
        ax.set_title(rule, pad=18)
        ax.set(xscale="log", yscale="log", ylim=(90 * floor, 400 * alphas[-1]))
        _plain_ticks(ax, 100 * alphas)
    fig.supxlabel("α: what may leak (%); above, the share of cuts that keep to it", fontsize=9)
    axes[0, 0].set_ylabel("what leaks (%)")
    return fig


def plot_price(price: pd.DataFrame) -> Figure:
    """What a guaranteed α leaves of M_in: a line a level of ``classifier``; columns alpha, value, lo, hi (shares)."""
    fig, ax = plt.subplots(figsize=(4.6, 2.9))
    for k, (name, line) in enumerate(price.groupby("classifier", sort=False)):
        x, (y, lo, hi) = 100 * line["alpha"], 100 * line[["value", "lo", "hi"]].to_numpy().T
        ax.fill_between(x, lo, hi, color=f"C{k}", alpha=0.18, lw=0)
        ax.plot(x, y, "o-", ms=3.5, lw=1.4, color=f"C{k}", label=name)
    ax.set(xscale="log", xlabel="α: guaranteed to leak at most (%)", ylim=(0, 101))
    ax.set_title(f"{metric_label('m_in')} (%)")
    _plain_ticks(ax, (100 * price["alpha"]).round(1).unique())
    ax.grid(axis="y")
    fig.legend(loc="outside right upper")
    return fig


def plot_reliability(scores: Mapping[str, np.ndarray], in_scope: np.ndarray) -> Figure:
    """Share in scope against what was predicted, a panel an entry of ``scores`` (n,); dots grow with their number.

    A calibrated score lies on the diagonal; the error of :func:`expected_error` is in the title.
    """
    fig, axes = plt.subplots(1, len(scores), figsize=(2.9 * len(scores), 3.1), sharey=True, squeeze=False)
    for ax, (name, probability) in zip(axes[0], scores.items(), strict=True):
        place, n = bin_of(probability), np.bincount(bin_of(probability), minlength=BINS)
        x, y = (np.bincount(place, weights=w, minlength=BINS)[n > 0] / n[n > 0] for w in (probability, in_scope))
        ax.plot([0, 1], [0, 1], **GUIDE)
        ax.vlines(x, x, y, color=OUT, lw=1.2)
        ax.scatter(x, y, s=8 + 160 * n[n > 0] / n.sum(), color=IN, zorder=3, edgecolor="white", lw=0.5)
        error = expected_error(calibration_gaps(probability, in_scope))
        ax.set(title=f"{name}: ECE {100 * error:.1f} %", xlim=(-0.04, 1.04), ylim=(-0.04, 1.04))
    fig.supxlabel("predicted P(in scope)", fontsize=9)
    axes[0, 0].set_ylabel("share in scope")
    return fig


def _plain_ticks(ax: Axes, places: np.ndarray) -> None:
    ax.set_xticks(places, [f"{p:g}" for p in places])
    ax.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    if ax.get_yscale() == "log":
        ax.set_yticks([0.1, 1, 10], ["0.1", "1", "10"])
        ax.grid(axis="y")
