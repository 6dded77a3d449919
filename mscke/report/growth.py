"""The growing memory, drawn: how long a query takes to find its edit among one to a million."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from mscke.report.figures import IN, OUT, TEXT


def plot_growth(rows: pd.DataFrame) -> Figure:
    """Milliseconds to route one query against the memory's size, on log scales; the classifier's pass a line.

    ``rows`` of :mod:`mscke.evaluation.bench_memory` (name, n, ours, baseline): the last ``memory_route``
    is by codes, all before it are exact.
    """
    route, exact = (rows[rows["name"] == name] for name in ("memory_route", "memory_route_exact"))
    sizes = [*route["n"][:-1], *exact["n"]]
    fig, ax = plt.subplots(figsize=(5.6, 3.2))
    one_pass = 1e3 * route["baseline"].median()
    for times, style in ((1.0, "-"), (1.5, ":")):
        ax.axhline(times * one_pass, color=TEXT, ls=style, lw=1)
        name = "one classifier pass" if times == 1 else f"{times} passes"
        place = {"xy": (1, times * one_pass), "xycoords": ("axes fraction", "data"), "xytext": (3, -3)}
        ax.annotate(name, **place, textcoords="offset points", fontsize=8, color=TEXT)
    ax.plot(
        sizes, 1e3 * pd.concat([route["ours"][:-1], exact["baseline"]]), "o-", color=IN, label="exact search"
    )
    ax.plot(route["n"][-1:], 1e3 * route["ours"][-1:], "D", color=OUT, label="by eight-bit codes")
    ax.set(xscale="log", yscale="log", xlabel="edits in memory", ylabel="milliseconds to route one query")
    ax.set_xticks(sizes, [f"{n:,}" for n in sizes])
    ax.tick_params(axis="x", which="minor", bottom=False)
    ax.grid(axis="both")
    ax.legend(loc="upper left")
    return fig
