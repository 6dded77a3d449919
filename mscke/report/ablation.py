"""Of 04_ablation: several trainings of one thing, their mean over seeds and its spread; and the ablation to be explored.

Threshold, fusion, CLIP and seed act on cached scores, without any model: :func:`metrics` and :func:`confusion`, together
:func:`read`. The panel that shows what they say is :mod:`mscke.report.panel`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mscke.evaluation.metrics import ROLES
from mscke.evaluation.outcomes import COLUMNS, answered
from mscke.evaluation.protocol import save_rows
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


ROLES_FINE = [ROLES.index("in_scope"), ROLES.index("out_of_scope")]


@dataclass(frozen=True)
class Scored:
    """R records under many classifiers.

    ``values`` (R, 5, 2) float: how right each query is, left or taken (:mod:`mscke.evaluation.outcomes`);
    ``reference`` (R, 5) str: the kind of reference that each question makes; ``rho``: scores (R, 5) in
    (0, 1) by (clip, fusion, seed).
    """

    values: np.ndarray
    reference: np.ndarray
    rho: dict[tuple[str, str, int], np.ndarray]

    def save(self, path: Path) -> None:
        """One parquet file: a row a query, a column a classifier."""
        columns = {"reference": self.reference.ravel(), "left": self.values[..., 0].ravel()}
        columns |= {"taken": self.values[..., 1].ravel()}
        columns |= {"|".join(map(str, key)): rho.ravel() for key, rho in self.rho.items()}
        save_rows(pd.DataFrame(columns), path)

    @classmethod
    def open(cls, path: Path) -> Scored:
        frame = pd.read_parquet(path)
        square = lambda column: frame[column].to_numpy().reshape(-1, len(ROLES))  # noqa: E731
        names = {tuple(name.split("|")): name for name in frame.columns[3:]}
        rho = {(clip, fusion, int(seed)): square(name) for (clip, fusion, seed), name in names.items()}
        return cls(np.stack([square("left"), square("taken")], -1), square("reference"), rho)


def metrics(values: np.ndarray, rho: np.ndarray, threshold: float = 0.5) -> pd.DataFrame:
    """Each metric in per cent with its bootstrap 95 % interval: columns metric, value, lo, hi, n."""
    table = answered(values, rho >= threshold)
    mean, lo, hi = (100 * v for v in bootstrap(table))
    return pd.DataFrame({"metric": COLUMNS, "value": mean, "lo": lo, "hi": hi, "n": len(table)})


def confusion(reference: np.ndarray, rho: np.ndarray, threshold: float = 0.5) -> pd.DataFrame:
    """How many fine-grained questions were taken and left, by kind of reference (one row each).

    Columns: in scope taken, in scope left, out of scope taken, out of scope left; the diagonal is right.
    """
    kinds, kind = np.unique(reference[:, ROLES_FINE].astype(str), return_inverse=True)
    columns = [f"{side} {route}" for side in ("in scope", "out of scope") for route in ("taken", "left")]
    counts = np.zeros((len(kinds), len(columns)), int)
    np.add.at(counts, (kind.reshape(-1, 2), [0, 2] + (rho[:, ROLES_FINE] < threshold)), 1)
    return pd.DataFrame(counts, pd.Index(kinds, name="reference"), columns)


@dataclass(frozen=True)
class Reading:
    """One classifier at one threshold: its scores (R, 5), and the tables of :func:`metrics` and :func:`confusion`."""

    title: str
    rho: np.ndarray
    threshold: float
    metrics: pd.DataFrame
    confusion: pd.DataFrame


def read(scored: Scored, clip: str, fusion: str, seed: int, threshold: float = 0.5) -> Reading:
    """All that the panel shows of one state. Raises KeyError for a classifier that ``scored`` lacks."""
    rho = scored.rho[clip, fusion, seed]
    return Reading(
        f"{fusion} · {clip} · seed {seed} · ρ ≥ {threshold:.2f}",
        rho,
        threshold,
        metrics(scored.values, rho, threshold),
        confusion(scored.reference, rho, threshold),
    )
