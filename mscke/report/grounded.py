"""Where a scope classifier fails, by kind of question; what its readers read; failures before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from mscke.benchmark.pictures import open_image
from mscke.benchmark.sample import EditRecord
from mscke.evaluation.metrics import ROLES
from mscke.evaluation.outcomes import COLUMNS
from mscke.report.tables import bootstrap

FINE = ("in_scope", "out_of_scope")


def question_kinds(records: Sequence[EditRecord]) -> pd.DataFrame:
    """The kind of each record's in-scope and out-of-scope question: columns in_scope, out_of_scope (str).

    The kind of reference that it makes (colour, place, relation; presence where it makes none), but for
    out-of-scope questions in the edit's own wording, about another attribute of the edited entity or about its
    look-alike the name of that.
    """
    reference = pd.DataFrame([r.meta["reference"] for r in records])[list(FINE)].replace("none", "presence")
    hardness = pd.Series([r.meta["hardness"]["out_of_scope"] for r in records])
    reference["out_of_scope"] = reference["out_of_scope"].where(hardness == "other_entity", hardness)
    return reference


def right_by_kind(kinds: pd.DataFrame, rho: np.ndarray, threshold: float = 0.5) -> pd.DataFrame:
    """Share (%) of questions on the right side of the threshold: a row a role and kind, columns n, right.

    ``kinds`` is of :func:`question_kinds`, ``rho`` (R, 5) in (0, 1) the scores of the same records.
    """
    parts = []
    for role in FINE:
        right = (rho[:, ROLES.index(role)] >= threshold) == (role == "in_scope")
        by = pd.Series(100.0 * right).groupby(kinds[role].to_numpy()).agg(["size", "mean"])
        parts.append(by.set_axis(["n", "right"], axis=1).rename_axis("kind").reset_index().assign(role=role))
    return pd.concat(parts, ignore_index=True)[["role", "kind", "n", "right"]]


def slice_rows(found: np.ndarray, slices: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Each metric over each slice: columns slice, metric, value, lo, hi (per cent, bootstrap 95 %), n.

    ``found`` (R, 6) float in [0, 1], by :data:`mscke.evaluation.outcomes.COLUMNS`; a slice is a mask (R,) bool;
    one without records has no rows.
    """
    parts = []
    for name, mask in slices.items():
        if not mask.any():
            continue
        mean, lo, hi = (100 * v for v in bootstrap(found[mask]))
        columns = {"metric": COLUMNS, "value": mean, "lo": lo, "hi": hi, "n": int(mask.sum())}
        parts.append(pd.DataFrame({"slice": name} | columns))
    return pd.concat(parts, ignore_index=True)


def cards(records: Sequence[EditRecord]) -> list[dict]:
    """Pictures with their edit and its two fine-grained questions, for :func:`mscke.report.pictures.plot_failures`."""
    asked = lambda r: [f"in: {r.in_scope.question}", f"out: {r.out_of_scope.question}"]  # noqa: E731
    lines = [[f"{r.edit.prompt} → {r.edit.answer}", *asked(r)] for r in records]
    return [
        {"image": np.asarray(open_image(r.edit.image)), "lines": said} for r, said in zip(records, lines, strict=True)
    ]


def before_and_after(
    records: Sequence[EditRecord], before: np.ndarray, after: np.ndarray, each: int = 2, threshold: float = 0.5
) -> list[dict]:
    """The first ``each`` failures of every kind under ``before``, as cards with both scores.

    ``before`` and ``after`` are scores (R, 5) of the same records. For :func:`mscke.report.pictures.plot_failures`.
    """
    kinds, cases = question_kinds(records), []
    for role in FINE:
        column, inside = ROLES.index(role), role == "in_scope"
        wrong = (before[:, column] >= threshold) != inside
        for kind in kinds[role].unique():
            for i in np.flatnonzero(wrong & (kinds[role] == kind).to_numpy())[:each]:
                r, scores = records[i], f"ρ {before[i, column]:.2f} → {after[i, column]:.2f}"
                right = (after[i, column] >= threshold) == inside
                lines = [
                    f"{role.replace('_', ' ')}, {kind.replace('_', ' ')}",
                    f"{scores}, {'right now' if right else 'still wrong'}",
                    f"edit: {r.edit.prompt} → {r.edit.answer}",
                    f"asked: {r.queries[role].question}",
                ]
                cases.append({"image": np.asarray(open_image(r.edit.image)), "lines": lines})
    return cases


def plot_readers(texts: Sequence[Sequence[str]], weights: Sequence[np.ndarray]) -> Figure:
    """What each reader reads of each text: a row of words a text, a panel a text, a line a reader.

    ``texts``: words; ``weights``: (words, readers) for each text, columns that sum to 1;
    the greatest of all is the darkest.
    """
    readers = weights[0].shape[1]
    size = (8.2, (0.2 * readers + 0.42) * len(texts) + 0.3)
    fig, axes = plt.subplots(len(texts), 1, figsize=size, squeeze=False)
    longest, most = max(map(len, texts)), max(weight.max() for weight in weights)
    for ax, words, weight in zip(axes[:, 0], texts, weights, strict=True):
        ax.imshow(weight.T, "Blues", vmin=0, vmax=most, aspect="auto")
        ax.set_xticks(range(len(words)), words, fontsize=8.5)
        ax.set_yticks(range(readers), range(1, readers + 1), fontsize=7)
        ax.set_xlim(-0.5, longest - 0.5)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    fig.supylabel("reader", fontsize=9)
    return fig
