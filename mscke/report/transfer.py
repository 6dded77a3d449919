"""What grows or falls along an axis, as lines with 95 % bands; and scope scores, own edit against rivals."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mscke.report.figures import IN, METHOD_COLOURS, OUT, metric_label
from mscke.report.tables import summarise

DASHES = ((0, (4, 3)), (0, (1, 2)))
MARKERS = "osD^vPX"


def summarise_by(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """:func:`mscke.report.tables.summarise` at each value of ``column``, which the result keeps."""
    parts = [summarise(part).assign(**{column: value}) for value, part in rows.groupby(column)]
    return pd.concat(parts, ignore_index=True)


def plot_trends(
    table: pd.DataFrame,
    x: str,
    xlabel: str,
    hue: str,
    panel: str,
    logx: bool = False,
    marks: Mapping[str, float] | None = None,
    label: str = "per cent",
) -> Figure:
    """Lines of ``value`` with bands from ``lo`` to ``hi``: a panel a level of ``panel``, both axes shared.

    Levels stand as they appear. ``marks``: places on ``x`` to be marked, by what the legend calls them.
    """
    panels, hues, marks = table[panel].unique(), table[hue].unique(), marks or {}
    colours = [METHOD_COLOURS.get(name, f"C{k}") for k, name in enumerate(hues)]
    columns = len(panels) if len(panels) <= 4 else 3
    rows = -(-len(panels) // columns)
    size = (max(2.2 * columns, 5.4) + 0.6, 1.7 * rows + 0.7)
    fig, axes = plt.subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, level in zip(axes.flat, panels, strict=False):
        for name, colour, marker in zip(hues, colours, MARKERS, strict=False):
            line = table[(table[panel] == level) & (table[hue] == name)].sort_values(x)
            ax.fill_between(line[x], line["lo"], line["hi"], color=colour, alpha=0.18, lw=0)
            ax.plot(line[x], line["value"], color=colour, marker=marker, ms=3.5, lw=1.4)
        for place, dash in zip(marks.values(), DASHES, strict=False):
            ax.axvline(place, color="#222222", lw=1, ls=dash)
        ax.set_title(metric_label(level))
        ax.grid(axis="y")
    if logx:
        _log_ticks(axes, sorted(table[x].unique()))
    fig.supxlabel(xlabel, fontsize=9)
    fig.supylabel(label, fontsize=9)
    style = {"ms": 3.5, "lw": 1.4}
    handles = [
        Line2D([], [], color=c, marker=m, label=str(n), **style)
        for n, c, m in zip(hues, colours, MARKERS, strict=False)
    ]
    handles += [Line2D([], [], color="#222222", lw=1, ls=d, label=m) for m, d in zip(marks, DASHES, strict=False)]
    fig.legend(handles=handles, loc="outside upper right", ncols=min(5, len(handles)))
    return fig


def plot_rivals(asked: pd.DataFrame, threshold: float = 0.5) -> Figure:
    """ρ of each query's own edit and of the best of all others, on a log scale: a panel a role.

    ``asked``: rows of :func:`mscke.evaluation.many_edits.ask_among` at one size. Per panel, in per cent:
    the queries whose best rival is above ``threshold``.
    """
    roles = asked["role"].unique()
    fig, axes = plt.subplots(len(roles), 1, figsize=(5.4, 1.0 * len(roles) + 0.7), sharex=True, sharey=True)
    edges = np.linspace(0, 1, 41)
    for ax, role in zip(axes, roles, strict=True):
        part = asked[asked["role"] == role]
        for column, colour in (("own", IN), ("rival", OUT)):
            share = 100 * np.histogram(part[column], edges)[0] / len(part)
            ax.stairs(share, edges, color=colour, fill=True, alpha=0.25)
            ax.stairs(share, edges, color=colour, lw=1.2)
        ax.axvline(threshold, color="#222222", lw=1, ls=DASHES[0])
        above = 100 * (part["rival"] >= threshold).mean()
        ax.set_title(f"{role.replace('_', ' ')}: a rival above {threshold:g} for {above:.1f} %")
    axes[0].set(yscale="log", xlim=(0, 1), ylim=(0.02, 130))
    axes[-1].set_xlabel("scope score ρ")
    fig.supylabel("share of queries (%)", fontsize=9)
    marks = [
        Line2D([], [], color=c, lw=4, alpha=0.6, label=n) for n, c in (("its own edit", IN), ("best other edit", OUT))
    ]
    fig.legend(handles=marks, loc="outside upper right", ncols=2)
    return fig


def _log_ticks(axes: np.ndarray, places: list[int]) -> None:
    """A logarithmic axis, shared by all panels, with ticks at these places alone."""
    axes[0, 0].set_xscale("log")
    axes[0, 0].set_xticks(places, [f"{v / 1000:.2g}k" if v >= 1000 else f"{v:,}" for v in places])
    for ax in axes.flat:
        ax.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
