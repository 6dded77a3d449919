"""Of 03_main_results: every method beside every other, and does our order agree with the paper's?"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from scipy.stats import kendalltau

from mscke.report.figures import METHOD_COLOURS, draw_interval, draw_rows, metric_label
from mscke.report.paper import MAIN_METRICS, PAIRED, reported_main
from mscke.report.tables import by_record, resampled_means


def plot_main_results(
    summary: pd.DataFrame, protocol: str = "generated", metrics: Sequence[str] = MAIN_METRICS
) -> Figure:
    """Each method's mean and 95 % interval (per cent): a row of panels a backbone, a panel a metric.

    Each metric has its own scale, the same for both backbones. Hollow diamonds are the paper's numbers for the backbone that ours stands for: other models, images
    and protocol, so for their order and not for their level.
    """
    summary = summary[(summary["protocol"] == protocol) & summary["metric"].isin(metrics)]
    backbones, methods = summary["backbone"].unique(), list(summary["method"].unique())
    size = (1.6 * len(metrics) + 1.2, (0.27 * len(methods) + 0.5) * len(backbones) + 0.6)
    shape = {"nrows": len(backbones), "ncols": len(metrics), "squeeze": False}
    fig, axes = plt.subplots(**shape, figsize=size, sharex="col", sharey=True)
    reported = reported_main()
    for (i, j), ax in np.ndenumerate(axes):
        ours = summary[(summary["backbone"] == backbones[i]) & (summary["metric"] == metrics[j])]
        for row in ours.itertuples():
            place = methods.index(row.method)
            draw_interval(ax, place, row.value, row.lo, row.hi, METHOD_COLOURS.get(row.method))
        paired = reported["backbone"] == PAIRED.get(backbones[i], backbones[i])
        theirs = reported[paired & (reported["metric"] == metrics[j]) & reported["method"].isin(methods)]
        rows = [methods.index(method) + 0.3 for method in theirs["method"]]
        ax.plot(theirs["value"], rows, "D", mfc="white", mec="#555555", mew=0.9, ms=3.8, zorder=3)
        ax.set_title(metric_label(metrics[j]) if i == 0 else "")
        if j == 0:
            ax.set_ylabel(backbones[i], fontweight="bold", labelpad=8)
        draw_rows(ax, methods)
    for ax in axes[0]:
        low = ax.get_xlim()[0]
        ax.set_xlim(max(-3, 10 * (low // 10) - 3), 103)
        ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    fig.supxlabel(f"per cent, {protocol.replace('_', '-')} answers", fontsize=9)
    marks = [
        Line2D([], [], marker="o", color="#444444", label="ours, with 95 % interval"),
        Line2D(
            [], [], marker="D", mfc="white", mec="#555555", ls="", ms=4, label="the paper's (full-size models, FGVEdit)"
        ),
    ]
    fig.legend(handles=marks, loc="outside upper right", ncols=2)
    return fig


def specificities(rows: pd.DataFrame) -> pd.DataFrame:
    """Specificity in [0, 1] by record (rows) and method (columns), of one backbone and protocol."""
    tables = {method: by_record(group)["specificity"] for method, group in rows.groupby("method", sort=False)}
    return pd.DataFrame(tables)


def rank_agreement(rows: pd.DataFrame, n_boot: int = 2000, seed: int = 0) -> pd.DataFrame:
    """τ-b between the paper's Specificity column and ours: one row a backbone and protocol.

    ``rows``: per-record rows. Columns tau, lo, hi (bootstrap over our edits, 95 %; the paper gives no
    interval for its side), p (exact, two-sided, τ = 0) and n, the number of methods that both report.
    """
    reported = reported_main().query("metric == 'specificity'").set_index(["backbone", "method"])["value"]
    found = []
    for (backbone, protocol), group in rows.groupby(["backbone", "protocol"], sort=False):
        theirs = reported[PAIRED.get(backbone, backbone)]
        ours = specificities(group[group["method"].isin(theirs.index)])
        theirs = theirs[ours.columns]
        means = resampled_means(ours.to_numpy(), n_boot, seed)
        taus = [kendalltau(theirs, mean).statistic for mean in means]
        result = kendalltau(theirs, ours.mean())
        lo, hi = np.percentile(taus, (2.5, 97.5))
        found.append((backbone, protocol, result.statistic, lo, hi, result.pvalue, len(theirs)))
    return pd.DataFrame(found, columns=["backbone", "protocol", "tau", "lo", "hi", "p", "n"])


def disagreements(summary: pd.DataFrame, protocol: str = "generated") -> pd.DataFrame:
    """Pairs of methods whose Specificity we find in the other order than the paper, intervals apart.

    Columns backbone, higher_here, lower_here, ours (points between them), reported (the paper's).
    """
    reported = reported_main().query("metric == 'specificity'").set_index(["backbone", "method"])["value"]
    part, found = summary[(summary["protocol"] == protocol) & (summary["metric"] == "specificity")], []
    for backbone, group in part.groupby("backbone", sort=False):
        theirs = reported[PAIRED.get(backbone, backbone)]
        known = [r for r in group.itertuples() if r.method in theirs.index]
        for a in known:
            for b in known:
                if a.lo > b.hi and theirs[a.method] < theirs[b.method]:
                    there = theirs[a.method] - theirs[b.method]
                    found.append((backbone, a.method, b.method, a.value - b.value, there))
    return pd.DataFrame(found, columns=["backbone", "higher_here", "lower_here", "ours", "reported"])
