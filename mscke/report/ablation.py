"""Several trainings of one thing: the mean over seeds, their spread, and a figure that shows both."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mscke.report.figures import draw_rows, metric_label
from mscke.report.tables import LABELS, bootstrap

FINE = ("specificity", "m_in", "m_out")


def over_seeds(table: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Mean over seeds and their spread, in the order of ``table``: ``by`` and value, lo (least), hi (greatest)."""
    spread = table.groupby([*by], sort=False)["value"].agg(["mean", "min", "max"])
    return spread.set_axis(["value", "lo", "hi"], axis=1).reset_index()


def spread_cells(table: pd.DataFrame, row: str, column: str) -> pd.DataFrame:
    """To read: cells "93.1 (92.8–93.3)", the mean over seeds and their least and greatest."""
    spread = over_seeds(table, [row, column])
    cells = [f"{r.value:.1f} ({r.lo:.1f}–{r.hi:.1f})" for r in spread.itertuples()]
    wide = spread.assign(cell=cells).pivot(index=row, columns=column, values="cell")
    order = {"index": spread[row].drop_duplicates(), "columns": spread[column].drop_duplicates()}
    return wide.reindex(**order).rename_axis(columns=None)


def metric_cells(table: pd.DataFrame, row: str) -> pd.DataFrame:
    """:func:`spread_cells` of every metric, under the names that tables give them."""
    cells = spread_cells(table, row, "metric")
    return cells[[m for m in LABELS if m in cells]].rename(columns=LABELS).reset_index()


def difference(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Mean of a − b in points with its bootstrap 95 % interval, paired by record: arrays (seeds, R) of shares."""
    pairs = np.mean(a, 0) - np.mean(b, 0)
    return dict(zip(("points", "lo", "hi"), (100 * float(v[0]) for v in bootstrap(pairs[:, None])), strict=True))


def plot_seeds(
    table: pd.DataFrame, row: str, hue: str, reported: pd.DataFrame | None = None, metrics: Sequence[str] = FINE
) -> Figure:
    """A panel a metric (per cent), a line a level of ``row``: each seed pale, the mean of the seeds strong.

    ``reported`` (columns ``row``, ``hue``, value): the paper's Specificity, as hollow diamonds. Levels stand
    as they appear.
    """
    rows, hues = list(table[row].unique()), list(table[hue].unique())
    size = (2.3 * len(metrics) + 1.6, (0.16 + 0.13 * len(hues)) * len(rows) + 1.1)
    fig, axes = plt.subplots(1, len(metrics), figsize=size, sharey=True, squeeze=False)
    for ax, metric in zip(axes[0], metrics, strict=True):
        for k, name in enumerate(hues):
            part = table[(table["metric"] == metric) & (table[hue] == name)]
            shift = min(0.2, 0.75 / len(hues)) * (k - (len(hues) - 1) / 2)
            _dots(ax, part, row, rows, shift, f"C{k}")
            if reported is not None and metric == "specificity":
                theirs = reported[reported[hue] == name]
                places = [rows.index(level) + shift for level in theirs[row]]
                ax.plot(theirs["value"], places, "D", mfc="white", mec=f"C{k}", mew=0.9, ms=4, zorder=3)
        ax.set_title(metric_label(metric))
        draw_rows(ax, rows)
    fig.supxlabel("per cent: the mean over seeds, and each seed", fontsize=9)
    marks = [Line2D([], [], marker="o", ls="", color=f"C{k}", label=name) for k, name in enumerate(hues)]
    if reported is not None:
        style = {"marker": "D", "ls": "", "mfc": "white", "mec": "#555555", "ms": 4}
        marks.append(Line2D([], [], label="the paper's (full-size models, FGVEdit)", **style))
    if len(marks) > 1:
        fig.legend(handles=marks, loc="outside upper right", ncols=len(marks))
    return fig


def _dots(ax, part: pd.DataFrame, row: str, rows: list, shift: float, colour: str) -> None:
    places = part[row].map(rows.index) + shift
    ax.plot(part["value"], places, "o", color=colour, ms=3.2, alpha=0.45, mew=0)
    mean = part.groupby(row, sort=False)["value"].mean()
    ax.plot(mean, [rows.index(level) + shift for level in mean.index], "|", color=colour, ms=9, mew=2.2)
