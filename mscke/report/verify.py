"""Do the regenerated main results agree with the committed ones? ``python -m mscke.report.verify``

Prints the paper's number, the committed and the regenerated one for every backbone, method and metric
(generated answers, per cent). Exits 1 if any moved further than its tolerance. Then says of each other table that is not
byte for byte the committed one where it differs most. Another processor moves last digits, of trained weights and of what
follows from them: then most tables differ a little. It only reads.
"""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from tabulate import tabulate

from mscke.config import ROOT
from mscke.report.paper import PAIRED, reported_main

TABLE = "figures/tables/main_results.csv"
# tables that no two runs share
TIMED = ("bench", "beyond_latency", "beyond_paper_seconds", "cost", "cost_beside_paper")
KEYS = ["backbone", "method", "metric"]
RULE = (
    "Generated answers, per cent. Tolerance: half the width of the committed 95 % interval, or one edit in n "
    "where that is more."
)


def committed_table(root: Path) -> tuple[pd.DataFrame | None, str]:
    """The table at HEAD of the repository ``root``, or None and why there is none."""
    try:
        shown = subprocess.run(["git", "show", f"HEAD:./{TABLE}"], cwd=root, capture_output=True, check=True)
    except FileNotFoundError:
        return None, "git is not installed: there is no committed table to compare with."
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode(errors="replace").strip()
        return None, f"No committed {TABLE} to compare with ({reason})."
    return pd.read_csv(io.BytesIO(shown.stdout)), ""


def other_tables(root: Path) -> str:
    """How many tables but the timed ones are byte for byte those of HEAD, and which are not."""

    def tables(*command: str) -> set[str]:
        found = subprocess.run(
            ["git", *command, "--", "figures/tables/*.csv"], cwd=root, capture_output=True, text=True, check=True
        )
        return {Path(line).stem for line in found.stdout.splitlines()} - set(TIMED)

    committed = tables("ls-files")
    changed = sorted(tables("diff", "--name-only", "--relative", "HEAD") & committed)
    counted = (
        f"{len(committed) - len(changed)} of {len(committed)} tables without timings are byte for byte as committed"
    )
    if not changed:
        return f"{counted}."
    lines = [f"  {name}: {largest_difference(root, name)}" for name in changed]
    return "\n".join([f"{counted} (another processor moves last digits). Where the others differ most:", *lines])


def largest_difference(root: Path, name: str) -> str:
    """Where the regenerated ``tables/name.csv`` is farthest from the committed one, in the column's own units."""
    path = f"figures/tables/{name}.csv"
    shown = subprocess.run(["git", "show", f"HEAD:./{path}"], cwd=root, capture_output=True, check=True)
    if not (root / path).exists():
        return "it is gone"
    old, new = pd.read_csv(io.BytesIO(shown.stdout)), pd.read_csv(root / path)
    if list(old.columns) != list(new.columns) or len(old) != len(new):
        return f"{len(old)} rows of {list(old.columns)} committed, {len(new)} of {list(new.columns)} regenerated"
    words = old.select_dtypes(exclude="number").columns
    if (other := (old[words].fillna("") != new[words].fillna(""))).any(axis=None):
        row, column = other.stack().idxmax()
        return f"row {row}, {column}: {old.loc[row, column]} committed, {new.loc[row, column]} regenerated"
    a, b = old.drop(columns=words), new.drop(columns=words)
    apart = (a - b).abs().mask(a.isna() != b.isna(), np.inf).fillna(0.0)
    if not (apart > 0).any(axis=None):
        return "the same numbers, written otherwise"
    row, column = apart.stack().idxmax()
    named = ", ".join(str(old.loc[row, word]) for word in words)
    values = f"{old.loc[row, column]:g} committed, {new.loc[row, column]:g} regenerated"
    return f"row {row} ({named}), {column}: {values}, {apart.loc[row, column]:.3g} apart"


def compare(committed: pd.DataFrame | None, regenerated: pd.DataFrame) -> pd.DataFrame:
    """One row a backbone, method and metric: paper, committed, regenerated, difference, tolerance, within.

    All in per cent. A number that only one of the two tables has is not within tolerance.
    """
    new = _generated(regenerated).rename(columns={"value": "regenerated"})[[*KEYS, "regenerated"]]
    old = _generated(regenerated.iloc[:0] if committed is None else committed)
    old = old.rename(columns={"value": "committed"})
    table = pd.concat([new[KEYS], old[KEYS]]).drop_duplicates()
    table["paired"] = table["backbone"].replace(PAIRED)
    theirs = reported_main().rename(columns={"backbone": "paired", "value": "paper"})
    table = table.merge(theirs, on=["paired", "method", "metric"], how="left")
    table = table.merge(old, on=KEYS, how="left").merge(new, on=KEYS, how="left")
    table["difference"] = (table["regenerated"] - table["committed"]).round(2)
    table["tolerance"] = np.maximum((table["hi"] - table["lo"]) / 2, 100 / table["n"]).round(2)
    table["within"] = table["difference"].abs() <= table["tolerance"]
    return table[[*KEYS, "paper", "committed", "regenerated", "difference", "tolerance", "within"]]


def verify(root: Path = ROOT) -> int:
    """Print the comparison in the repository ``root``; the exit status: 1 if a number moved, else 0."""
    if not (root / TABLE).exists():
        print(f"There is no {TABLE} yet: the notebook 03_main_results writes it.")
        return 1
    committed, reason = committed_table(root)
    table = compare(committed, pd.read_csv(root / TABLE))
    verdicts = "–" if committed is None else table["within"].map({True: "yes", False: "NOT"})
    options = {"headers": "keys", "tablefmt": "simple", "floatfmt": ".2f", "missingval": "–", "showindex": False}
    print(tabulate(table.assign(within=verdicts), **options))
    print()
    if committed is None:
        print(reason)
        return 0
    print(RULE)
    print(f"{table['within'].sum()} of {len(table)} numbers are within tolerance.")
    print(other_tables(root))
    return int(not table["within"].all())


def _generated(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["protocol"] == "generated"]


if __name__ == "__main__":
    sys.exit(verify())
