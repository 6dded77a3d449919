"""The ablation to be explored: threshold, fusion, CLIP and seed act on cached scores, without any model.

Pure functions: :func:`metrics` and :func:`confusion`, together :func:`read`. The panel that shows what they
say is :mod:`mscke.report.panel`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from mscke.evaluation.metrics import ROLES
from mscke.evaluation.outcomes import COLUMNS, answered
from mscke.evaluation.protocol import save_rows
from mscke.report.tables import bootstrap

FINE = [ROLES.index("in_scope"), ROLES.index("out_of_scope")]


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
    kinds, kind = np.unique(reference[:, FINE].astype(str), return_inverse=True)
    columns = [f"{side} {route}" for side in ("in scope", "out of scope") for route in ("taken", "left")]
    counts = np.zeros((len(kinds), len(columns)), int)
    np.add.at(counts, (kind.reshape(-1, 2), [0, 2] + (rho[:, FINE] < threshold)), 1)
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
