"""Charts of results: data frames and arrays in, a matplotlib Figure out.

Call :func:`use_style` once a notebook; :func:`save_figure` writes what a plot function returns.
Pictures of scenes, attention and failures are in :mod:`mscke.report.pictures`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mscke.config import ASSETS
from mscke.report.registry import register
from mscke.report.tables import LABELS, bootstrap
from mscke.system.files import replacing

METHOD_COLOURS = {  # Okabe and Ito; grey stands in for their black
    "FT-LLM": "#8A8A8A",
    "IKE": "#56B4E9",
    "SERAC": "#E69F00",
    "SERAC+fg": "#D55E00",
    "MEND": "#CC79A7",
    "MSCKE": "#0072B2",
    "MSCKE-MEND": "#009E73",
}
IN, OUT, TEXT = "#0072B2", "#D55E00", "#8A8A8A"  # in scope, out of scope, text-only


def use_style() -> None:
    """Everything drawn from here on looks alike (``mscke/assets/mscke.mplstyle``)."""
    plt.style.use(ASSETS / "mscke.mplstyle")


def save_figure(fig: Figure, stem: str, folder: str | Path, caption: str | None = None, notebook: str = "") -> Path:
    """Write ``folder/stem`` as .png and .pdf, the same bytes each time; returns the PNG's path.

    With a ``caption`` the figure enters the folder's index (:mod:`mscke.report.registry`).
    """
    path = Path(folder) / f"{stem}.png"
    fig.draw_without_rendering()
    fig.set_layout_engine("none")  # settled: else every file would move it a little further
    for kind, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
        with replacing(path.with_suffix(f".{kind}")) as temporary:
            fig.savefig(temporary, format=kind, metadata=metadata)
    if caption:
        register(folder, stem, caption, notebook)
    return path


def plot_breakdown(
    frame: pd.DataFrame,
    by: str | Sequence[str],
    value: str = "value",
    hue: str | None = None,
    label: str = "Accuracy (%)",
) -> Figure:
    """Mean of ``value`` (shares in [0, 1], a row a record) at each level of each column of ``by``.

    With bootstrap 95 % intervals and, in brackets, the number of records; a panel a column of ``by``, a
    colour a level of ``hue``. Levels stand in their categorical order, else as they appear.
    """
    by = [by] if isinstance(by, str) else list(by)
    levels = {column: _levels(frame[column]) for column in by}
    hues = [None] if hue is None else _levels(frame[hue])
    colours = {name: METHOD_COLOURS.get(name, f"C{k}") for k, name in enumerate(hues)}
    heights = [len(levels[column]) for column in by]
    size = (4.6, sum(heights) * (0.15 + 0.11 * len(hues)) + 0.4 * len(by) + 0.6)
    shape = {"nrows": len(by), "squeeze": False, "height_ratios": heights}
    fig, axes = plt.subplots(**shape, figsize=size, sharex=True)
    for ax, column in zip(axes[:, 0], by, strict=True):
        names = []
        for row, level in enumerate(levels[column]):
            part = frame[frame[column] == level]
            groups = [part if hue is None else part[part[hue] == name] for name in hues]
            names.append(f"{level}  ({max(map(len, groups)):,})")
            for k, (name, group) in enumerate(zip(hues, groups, strict=True)):
                if len(group):
                    mean, lo, hi = (100 * float(v[0]) for v in bootstrap(group[[value]].to_numpy()))
                    draw_interval(ax, row + 0.22 * (k - (len(hues) - 1) / 2), mean, lo, hi, colours[name])
        draw_rows(ax, names)
        ax.set_title(column.replace("_", " "))
    axes[-1, 0].set_xlabel(label)
    if hue is not None:
        marks = [Line2D([], [], marker="o", color=c, label=n) for n, c in colours.items()]
        fig.legend(handles=marks, loc="outside upper right", ncols=len(hues))
    return fig


def draw_scores(ax: Axes, name: str, rho: np.ndarray, colour: str, threshold: float) -> list[Artist]:
    """Histogram of scores (n,) in [0, 1], those on the wrong side of the threshold pale; what was drawn."""
    heights, edges = np.histogram(rho, np.linspace(0, 1, 41))
    wrong, share = (edges[:-1] < threshold) == (name == "in scope"), 100 * heights / len(rho)
    drawn = [
        ax.stairs(np.where(part, share, 0), edges, fill=True, color=colour, alpha=alpha)
        for part, alpha in ((wrong, 0.45), (~wrong, 1.0))
    ]
    ax.set_ylim(0, 1.05 * share.max())
    right = np.mean(rho >= threshold if name == "in scope" else rho < threshold)
    ax.set_title(f"{name}: {100 * right:.1f} % on the right side", color=colour, fontsize=8.5, pad=4)
    return [*drawn, ax.axvline(threshold, color="#222222", lw=1, ls=(0, (4, 3)))]


def draw_interval(ax: Axes, y, value, lo, hi, colour: str | None) -> list[Artist]:
    """A dot at (value, y) with its interval from lo to hi, numbers or arrays of them; what was drawn."""
    line = ax.hlines(y, lo, hi, color=colour, lw=2, zorder=3)
    return [line, *ax.plot(value, y, "o", color=colour, ms=5.5, mec="white", mew=0.6, zorder=3.5)]


def draw_rows(ax: Axes, names: Sequence[str]) -> None:
    """Name the rows, the first on top, with a light line along each."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="both")
    ax.spines["left"].set_visible(False)


def _levels(column: pd.Series) -> list:
    """Categories in their order, methods in that of the tables, anything else as it appears."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        return [level for level in column.cat.categories if (column == level).any()]
    found = list(column.dropna().unique())
    rank = list(METHOD_COLOURS)
    return sorted(found, key=rank.index) if set(found) <= set(rank) else found


def metric_label(metric: str) -> str:
    name, _, index = LABELS.get(metric, metric).partition("_")
    return rf"$\mathbf{{{name}_{{{index}}}}}$" if index else name
