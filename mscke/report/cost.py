"""What the parts cost, as tables and figures; the paper's costs beside ours."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from mscke.cost.components import by_part
from mscke.report.figures import IN, OUT
from mscke.report.paper import reported_cost

PAPER = "#555555"


def cost_table(counts: pd.DataFrame, latency: pd.DataFrame) -> pd.DataFrame:
    """A row a backbone and component: parameters, mib, mflop of one query, milliseconds a query by batch.

    From :func:`mscke.cost.components.counts` and :func:`~mscke.cost.components.latency`, with a column
    backbone each. ``ms_8`` is the median in batches of 8, ``ms_8_lo`` and ``ms_8_hi`` the quartiles.
    """
    table = counts.assign(mib=counts["bytes"] / 2**20, mflop=counts["flops"] / 1e6)
    table = table.drop(columns=["bytes", "flops"])
    for batch, part in latency.groupby("batch"):
        names = {"ms": f"ms_{batch}", "lo": f"ms_{batch}_lo", "hi": f"ms_{batch}_hi"}
        part = part.rename(columns=names).drop(columns="batch")
        table = table.merge(part, on=["backbone", "component"], validate="one_to_one")
    return table


def part_table(costs: pd.DataFrame, peaks: pd.DataFrame) -> pd.DataFrame:
    """A row a part of the paper's cost table, ours (one backbone of :func:`cost_table`) beside the paper's.

    Columns part, parameters, ms_* and share_* (of the base model's time) a batch, mib_* at the peak;
    reported_ms, reported_share, reported_memory ("G", as printed).
    """
    costs = costs.set_index("component")
    table = pd.DataFrame({"parameters": by_part(costs["parameters"])})
    for batch in sorted(peaks["batch"].unique()):
        ms = by_part(costs[f"ms_{batch}"])
        table[f"ms_{batch}"], table[f"share_{batch}"] = ms, ms / ms["base model"]
        table[f"mib_{batch}"] = peaks[peaks["batch"] == batch].set_index("part")["mib"]
    theirs = reported_cost().set_index("part")
    table["reported_ms"] = theirs["milliseconds"]
    table["reported_share"] = theirs["milliseconds"] / theirs.loc["base model", "milliseconds"]
    table["reported_memory"] = theirs["memory"]
    return table.rename_axis("part").reset_index()


def plot_latency(latency: pd.DataFrame) -> Figure:
    """Milliseconds a query of each component, medians with quartiles: a panel a backbone, a colour a batch."""
    backbones, names = latency["backbone"].unique(), list(latency["component"].unique())
    shape = {"ncols": len(backbones), "sharex": True, "sharey": True, "squeeze": False}
    fig, axes = plt.subplots(1, **shape, figsize=(3.0 * len(backbones) + 1.6, 0.3 * len(names) + 1.2))
    for ax, backbone in zip(axes[0], backbones, strict=True):
        ours = latency[latency["backbone"] == backbone]
        for (batch, part), colour, marker in zip(ours.groupby("batch"), (IN, OUT), "os", strict=True):
            rows = [names.index(name) for name in part["component"]]
            ax.hlines(rows, part["lo"], part["hi"], color=colour, lw=2)
            ax.plot(part["ms"], rows, marker, color=colour, mec="white", mew=0.6, label=_batches(batch))
        ax.set(title=backbone, xscale="log", ylim=(len(names) - 0.5, -0.5))
        ax.set_yticks(range(len(names)), names)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="both")
        ax.spines["left"].set_visible(False)
    fig.supxlabel("milliseconds a query", fontsize=9)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return fig


def plot_shares(parts: pd.DataFrame) -> Figure:
    """Time of each part as a share of the base model's, ours by batch and the paper's (:func:`part_table`)."""
    shares = [c for c in parts if c.startswith("share_")]
    labels = [f"ours, {_batches(int(c[6:]))}" for c in shares]
    fig, ax = plt.subplots(figsize=(5.6, 2.0))
    columns = zip([*shares, "reported_share"], [*labels, "the paper's"], (IN, OUT, PAPER), "osD", strict=True)
    for column, label, colour, marker in columns:
        ax.plot(100 * parts[column], range(len(parts)), marker, color=colour, label=label, mec="white", mew=0.6)
    ax.set_yticks(range(len(parts)), parts["part"])
    ax.set(xlabel="time, per cent of the base model's", ylim=(len(parts) - 0.5, -0.5), xlim=(0, None))
    ax.grid(axis="both")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return fig


def plot_route(rows: pd.DataFrame) -> Figure:
    """Seconds to route one query against the memory's size, both on log scales; the ratio at each size.

    ``rows``: the ``route`` rows of :mod:`mscke.cost.bench`. Where the released way was not measured
    it is drawn on, dashed, at the time an edit of its largest size.
    """
    known = rows.dropna(subset="baseline")
    last = known.iloc[-1]
    rest = rows[rows["n"] >= last["n"]]
    fig, ax = plt.subplots(figsize=(5.6, 3.2))
    ax.plot(known["n"], known["baseline"], "s-", color=OUT, label="memory encoded again (released)")
    ax.plot(rest["n"], rest["n"] * last["baseline"] / last["n"], ":", color=OUT, label="the same, extrapolated")
    ax.plot(rows["n"], rows["ours"], "o-", color=IN, label="embedded once, searched as a matrix (ours)")
    for row in known[known["ratio"] >= 3].itertuples():
        middle = np.sqrt(row.ours * row.baseline)
        ax.annotate(
            "",
            (row.n, row.ours * 1.15),
            (row.n, row.baseline / 1.15),
            arrowprops={"arrowstyle": "-", "color": "#BBBBBB"},
        )
        ax.annotate(f" {row.ratio:,.0f} ×", (row.n, middle), va="center", fontsize=8)
    ax.set(xscale="log", yscale="log", xlabel="edits in memory", ylabel="seconds to route one query")
    ax.set_xticks(rows["n"], [f"{n:,}" for n in rows["n"]])
    ax.tick_params(axis="x", which="minor", bottom=False)
    ax.grid(axis="both")
    ax.legend(loc="upper left")
    return fig


def _batches(size: int) -> str:
    return "one at a time" if size == 1 else f"in batches of {size}"
