"""The growing memory, drawn: how long a query takes to find its edit among one to a million."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from mscke.report.figures import IN, OUT, TEXT


def plot_growth(rows: pd.DataFrame) -> Figure:
    """Milliseconds to route one query against the memory's size, on log scales, beside the classifier's pass alone.

    The two are timed in turns at each size, and from size to size a machine is faster or slower.

    ``rows`` of :mod:`mscke.cost.bench_memory` (name, n, ours, baseline): the last ``memory_route``
    is by codes, all before it are exact.
    """
    route, exact = (rows[rows["name"] == name] for name in ("memory_route", "memory_route_exact"))
    sizes = [*route["n"][:-1], *exact["n"]]
    fig, ax = plt.subplots(figsize=(5.6, 3.2))
    for times, style in ((1.0, "-"), (1.5, ":")):
        passes = 1e3 * times * route["baseline"]
        ax.plot(route["n"], passes, style, color=TEXT, lw=1)
        name = "one classifier pass" if times == 1 else f"{times} passes"
        place = {"xy": (route["n"].iloc[-1], passes.iloc[-1]), "xytext": (8, -3)}
        ax.annotate(name, **place, textcoords="offset points", fontsize=8, color=TEXT, annotation_clip=False)
    ax.plot(sizes, 1e3 * pd.concat([route["ours"][:-1], exact["baseline"]]), "o-", color=IN, label="exact search")
    ax.plot(route["n"][-1:], 1e3 * route["ours"][-1:], "D", color=OUT, label="by four-bit codes")
    ax.set(xscale="log", yscale="log", xlabel="edits in memory", ylabel="milliseconds to route one query")
    ax.set_xticks(sizes, [f"{n:,}" for n in sizes])
    ax.minorticks_off()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.grid(axis="both")
    ax.legend(loc="upper left")
    return fig
