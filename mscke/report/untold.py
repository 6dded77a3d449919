"""Benchmarks tell more or less of their records: a notebook's cell that needs more than it gets says so.

FGVEdit-Scenes tells of each record the scene, the kind of reference, the attribute that is asked (``meta``);
FGVEdit does not. A cell that begins ``# needs of its records: scene`` is run where all records tell their
scene; elsewhere it prints that they do not, and the notebook goes on.
"""

from __future__ import annotations

from collections.abc import Sequence

from IPython import get_ipython

from mscke.benchmark.sample import EditRecord

MARK = "# needs of its records: "


def skip_untold(records: Sequence[EditRecord]) -> None:
    """From the next cell on, in this kernel; outside a notebook nothing is done."""
    if shell := get_ipython():
        told = set.intersection(*(set(record.meta) for record in records))
        shell.input_transformers_cleanup.append(lambda lines: where_told(lines, told))


def where_told(lines: list[str], told: set[str]) -> list[str]:
    """A cell's ``lines``, or one that says in a sentence which of its needs are not ``told``."""
    if not lines or not lines[0].startswith(MARK):
        return lines
    needed = lines[0].removeprefix(MARK).strip().split(", ")
    lacking = ", ".join(key for key in needed if key not in told)
    said = f"This benchmark does not tell the {lacking} of its records: nothing to show."
    return [f"print({said!r})\n"] if lacking else lines
