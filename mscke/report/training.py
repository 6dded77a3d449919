"""Figures of 02_training: losses over steps, and scores in and out of scope."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mscke.report.figures import IN, OUT, TEXT, draw_scores


def plot_curves(curve: pd.DataFrame, panels: Mapping[str, Sequence[str]], x: str = "epoch") -> Figure:
    """Training curves: a panel an entry of ``panels`` (its label -> columns of ``curve``).

    Under a label that ends in "(%)" shares in [0, 1] are drawn as per cent.
    """
    fig, axes = plt.subplots(1, len(panels), figsize=(3.5 * len(panels), 2.7), squeeze=False)
    for ax, (label, columns) in zip(axes[0], panels.items(), strict=True):
        scale = 100 if label.endswith("(%)") else 1
        for column in columns:
            name = {"loss": "training loss"}.get(column, column.removeprefix("right_").replace("_", " "))
            known = curve[[x, column]].dropna()
            marker = {"marker": "o", "ms": 4, "mec": "white", "mew": 0.6} if len(known) <= 30 else {}
            ax.plot(known[x], scale * known[column], label=name, **marker)
        ax.set(xlabel=x, title=label)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(axis="y")
        if len(columns) > 1:
            ax.legend(fontsize=7.5)
    return fig


def plot_score_histogram(
    rho_in: np.ndarray, rho_out: np.ndarray, threshold: float = 0.5, rho_text: np.ndarray | None = None
) -> Figure:
    """How the scope scores ρ in [0, 1] of in-scope and out-of-scope queries fall about the threshold.

    ``rho_text``: those of the text-only queries (locality). Heights are shares of each group.
    """
    groups = [("in scope", rho_in, IN), ("out of scope", rho_out, OUT)]
    if rho_text is not None:
        groups.append(("text only", rho_text, TEXT))
    fig, axes = plt.subplots(len(groups), 1, figsize=(5.4, 1.1 * len(groups) + 0.5), sharex=True)
    for ax, (name, rho, colour) in zip(axes, groups, strict=True):
        draw_scores(ax, name, np.asarray(rho, float), colour, threshold)
    axes[-1].set(xlabel="scope score ρ", xlim=(0, 1))
    fig.supylabel("share of queries (%)", fontsize=9)
    return fig
