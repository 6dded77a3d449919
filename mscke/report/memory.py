"""Of 09_memory: a writer that is killed, and how long a query takes to find its edit among one to a million."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from mscke.report.figures import IN, OUT, TEXT

WRITER = """
import sys, torch
from mscke.benchmark.sample import Edit
from mscke.memory import EditMemory
memory = EditMemory.open(sys.argv[1], "abc", 256)
while True:
    edit = Edit(sys.argv[2], f"prompt {len(memory)}", "answer")
    print(memory.add([edit], torch.full((1, 256), float(len(memory))))[0], flush=True)
"""


def killed_writer(folder: Path, image: str, after: int = 20) -> list[int]:
    """Let another process write edits into a memory at ``folder``, one by one, and kill it once it has been told of
    ``after``: the ids that it was told were stored."""
    command = [sys.executable, "-c", WRITER, folder, image]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        told = [writer.stdout.readline() for _ in range(after)]
        writer.kill()
        told += writer.stdout.readlines()
    return [int(line) for line in told if line.endswith("\n")]


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
