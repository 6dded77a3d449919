"""Figures of 01_data: what the texts alone give away."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from scipy.stats import mannwhitneyu

from mscke.report.figures import IN, OUT


def plot_text_similarity(sim_in: np.ndarray, sim_out: np.ndarray) -> Figure:
    """Cosine similarity of the edit prompt's text to that of in-scope and out-of-scope questions.

    AUC is the chance that the text of an in-scope question is the closer of the two: at 50 % text alone
    does not tell them apart.
    """
    auc = mannwhitneyu(sim_in, sim_out).statistic / (len(sim_in) * len(sim_out))
    fig, ax = plt.subplots(figsize=(5.4, 2.4))
    groups = {"in scope": np.asarray(sim_in, float), "out of scope": np.asarray(sim_out, float)}
    style = {"stat": "percent", "common_norm": False, "element": "step", "bins": 40, "alpha": 0.3}
    sns.histplot(groups, ax=ax, palette=[IN, OUT], **style)
    sns.move_legend(ax, "upper left", title=None)
    ax.set_title(f"text alone: AUC {100 * auc:.1f} %")
    ax.set(xlabel="cosine similarity to the edit prompt, text alone", ylabel="share of questions (%)")
    return fig
