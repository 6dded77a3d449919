"""Per-record rows in, tables with 95 % intervals out; files as CSV, Markdown and LaTeX."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from tabulate import tabulate

from mscke.report.paper import MAIN_METRICS, PAIRED, reported_main
from mscke.report.registry import register
from mscke.system.files import replacing

METHODS = ("FT-LLM", "IKE", "SERAC", "SERAC+fg", "MEND", "MSCKE", "MSCKE-MEND")
PROTOCOLS = ("generated", "teacher_forced")
LABELS = {  # metric -> what tables call it
    "reliability": "Reliability",
    "generality": "Generality",
    "locality": "Locality",
    "m_in": "M_in",
    "m_out": "M_out",
    "specificity": "Specificity",
}
KEYS = ["track", "backbone", "method", "protocol"]


def summarise(rows: pd.DataFrame, n_boot: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Means and bootstrap 95 % intervals over edits, in per cent.

    ``rows``: one row a record, metric and protocol, as :func:`mscke.evaluation.protocol.evaluate` gives
    them, ``value`` in [0, 1]. Specificity = (M_in + M_out) / 2 is added, record by record. Columns of
    the result: track, backbone, method, protocol, metric, value, lo, hi, n (edits).

    Raises ValueError, naming a record, for a value that is missing, double or outside [0, 1].
    """
    parts = []
    for key, group in rows.groupby(KEYS, sort=False):
        table = by_record(group)
        mean, lo, hi = 100 * np.stack(bootstrap(table.to_numpy(), n_boot, seed))
        columns = {"metric": table.columns, "value": mean, "lo": lo, "hi": hi, "n": len(table)}
        parts.append(pd.DataFrame(dict(zip(KEYS, key, strict=True)) | columns))
    summary = pd.concat(parts, ignore_index=True)
    first = {"method": METHODS, "protocol": PROTOCOLS, "metric": tuple(LABELS)}

    def rank(column: pd.Series) -> pd.Series:
        """Known names in their fixed order, others as they appear."""
        names = dict.fromkeys([*first.get(column.name, ()), *column])
        return column.map({name: i for i, name in enumerate(names)})

    return summary.sort_values([*KEYS, "metric"], key=rank, ignore_index=True)


def bootstrap(values: np.ndarray, n_boot: int = 2000, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean, lo, hi), each (m,), of values (n, m): the 95 % percentile interval over resampled rows.

    Every table with the same n sees the same resamples, so intervals of methods are comparable.
    """
    values = np.asarray(values, float)
    means = resampled_means(values, n_boot, seed)
    lo, hi = np.percentile(means, (2.5, 97.5), axis=0)
    return values.mean(0), lo, hi


def mean_interval(values: np.ndarray) -> dict[str, float]:
    """value, lo, hi: the mean of values (n,) and its bootstrap 95 % interval."""
    return dict(zip(("value", "lo", "hi"), (float(v[0]) for v in bootstrap(values[:, None])), strict=True))


def interval(shares: Sequence[float]) -> dict[str, float]:
    """value, lo, hi, n: the mean of shares (n,) and its bootstrap 95 % interval, in per cent."""
    found = mean_interval(np.asarray(shares, float))
    return {key: 100 * value for key, value in found.items()} | {"n": len(shares)}


def resampled_means(values: np.ndarray, n_boot: int = 2000, seed: int = 0) -> np.ndarray:
    """Column means (n_boot, m) of ``values`` (n, m) over rows drawn with replacement."""
    return _counts(len(values), n_boot, seed) @ values / len(values)


def wide(summary: pd.DataFrame, protocol: str = "generated") -> pd.DataFrame:
    """To read: one row a (backbone, method), one column a metric, cells "97.3 [96.7, 97.9]"."""
    part = summary[summary["protocol"] == protocol]
    cells = [f"{r.value:.1f} [{r.lo:.1f}, {r.hi:.1f}]" for r in part.itertuples()]
    part = part.assign(cell=cells, metric=part["metric"].map(lambda m: LABELS.get(m, m)))
    index, columns = ["backbone", "method"], list(dict.fromkeys(part["metric"]))
    table = part.pivot(index=index, columns="metric", values="cell")
    table = table.reindex(index=pd.MultiIndex.from_frame(part[index].drop_duplicates()), columns=columns)
    return table.rename_axis(columns=None).reset_index()


def beside_paper(summary: pd.DataFrame) -> pd.DataFrame:
    """Ours under both protocols beside the paper's number, in per cent; nothing where it reports none.

    Columns backbone, method, metric, generated, teacher_forced, reported_backbone, reported. The
    backbones differ: a mini is set beside the full-size model it stands for.
    """
    part = summary[summary["metric"].isin(MAIN_METRICS)]
    index = ["backbone", "method", "metric"]
    ours = part.pivot(index=index, columns="protocol", values="value")
    ours = ours.reindex(index=pd.MultiIndex.from_frame(part[index].drop_duplicates()), columns=list(PROTOCOLS))
    ours = ours.rename_axis(columns=None).reset_index()
    ours["reported_backbone"] = ours["backbone"].replace(PAIRED)
    theirs = reported_main().rename(columns={"backbone": "reported_backbone", "value": "reported"})
    return ours.merge(theirs, on=["reported_backbone", "method", "metric"], how="left")


def beside_strict(rows: pd.DataFrame) -> pd.DataFrame:
    """What the comparison of generated answers decides: the field's and the strict one, and their difference.

    ``rows`` as :func:`summarise` takes them, and ``strict`` in [0, 1]. Columns: backbone, method, metric, field,
    strict, difference, in per cent.
    """
    told, keys = rows[rows["protocol"] == "generated"], ["backbone", "method", "metric"]
    field, strict = (summarise(told.assign(value=told[name])).set_index(keys)["value"] for name in ("value", "strict"))
    return pd.DataFrame({"field": field, "strict": strict, "difference": field - strict}).reset_index()


def write_table(
    frame: pd.DataFrame,
    stem: str,
    folder: str | Path,
    display: pd.DataFrame | None = None,
    caption: str | None = None,
    notebook: str = "",
    decimals: int = 2,
) -> Path:
    """Write ``folder/tables/stem`` as .csv, .md and .tex (booktabs); returns the CSV's path.

    Numbers have two decimals (shares need more). ``display`` is what .md and .tex show when the CSV's tidy rows are not
    for reading (:func:`wide`). With a ``caption`` the table enters the folder's index.
    """
    path = Path(folder) / "tables" / f"{stem}.csv"
    shown = frame if display is None else display
    escaped = shown.map(lambda cell: cell.replace("|", r"\|") if isinstance(cell, str) else cell)
    # None is what tabulate takes for missing
    shown, escaped = (table.astype(object).where(table.notna(), None) for table in (shown, escaped))
    options = {"headers": "keys", "showindex": False, "floatfmt": f".{decimals}f", "missingval": "–"}
    texts = {
        ".csv": frame.to_csv(index=False, float_format=f"%.{decimals}f", lineterminator="\n"),
        ".md": tabulate(escaped, tablefmt="github", **options) + "\n",
        ".tex": tabulate(shown, tablefmt="latex_booktabs", **options) + "\n",
    }
    for suffix, text in texts.items():
        with replacing(path.with_suffix(suffix)) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
    if caption:
        register(folder, f"tables/{stem}", caption, notebook)
    return path


def by_record(group: pd.DataFrame) -> pd.DataFrame:
    """One group of rows (one backbone, method, protocol) as (record × metric), every cell checked.

    Specificity is added. Raises ValueError as :func:`summarise` does.
    """
    where = ", ".join(str(v) for v in group[KEYS].iloc[0])
    double = group[group.duplicated(["record", "metric"])]
    if len(double):
        record, metric = double[["record", "metric"]].iloc[0]
        raise ValueError(f"{where}: record {record} has more than one {metric}")
    table = group.pivot(index="record", columns="metric", values="value")
    bad = ~((table >= 0) & (table <= 1)).stack()  # NaN included
    if bad.any():
        record, metric = bad.idxmax()
        found = table.loc[record, metric]
        raise ValueError(
            f"{where}: {bad.sum()} values are missing or outside [0, 1]; the first is record {record}, "
            f"{metric} = {found}"
        )
    if {"m_in", "m_out"} <= set(table):
        table["specificity"] = (table["m_in"] + table["m_out"]) / 2
    return table


@functools.lru_cache(maxsize=2)
def _counts(n: int, n_boot: int, seed: int) -> np.ndarray:
    """How often each of n rows is drawn in each of n_boot resamples: float (n_boot, n)."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_boot).astype(float)
