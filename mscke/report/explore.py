"""The ablation to be explored: threshold, fusion, CLIP and seed act on cached scores, without any model.

Three layers: pure functions (:func:`metrics`, :func:`confusion`), a figure made from them
(:func:`plot_panel`), and a thin :class:`Panel` of widgets that only binds the two. A saved notebook shows
the panel's picture at its default state.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter

from mscke.evaluation.metrics import ROLES
from mscke.evaluation.outcomes import COLUMNS, answered
from mscke.evaluation.protocol import save_rows
from mscke.report.figures import IN, OUT, TEXT, draw_interval, draw_rows, draw_scores
from mscke.report.tables import LABELS, bootstrap

DPI = 80  # of the panel's picture: to be looked at, and quick to draw


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
    fine = [ROLES.index("in_scope"), ROLES.index("out_of_scope")]
    truth = np.broadcast_to(["in scope", "out of scope"], (len(rho), 2))
    route = np.where(rho[:, fine] >= threshold, "taken", "left")
    table = pd.crosstab(reference[:, fine].ravel(), [truth.ravel(), route.ravel()])
    columns = pd.MultiIndex.from_product([["in scope", "out of scope"], ["taken", "left"]])
    table = table.reindex(columns=columns, fill_value=0).rename_axis("reference")
    return table.set_axis([" ".join(c) for c in columns], axis=1)


def plot_panel(
    scored: Scored, clip: str, fusion: str, seed: int, threshold: float = 0.5, fig: Figure | None = None
) -> Figure:
    """Metrics, scores and confusion by reference of one classifier at one threshold.

    ``fig``: a figure that this made of the same records before. Its axes stay, which spares most of the time, and only
    what the controls move is drawn anew.
    """
    rho = scored.rho[clip, fusion, seed]
    found, asked = metrics(scored.values, rho, threshold), confusion(scored.reference, rho, threshold)
    fresh, fig = fig is None, fig or _frame(len(found), len(asked))
    left, *middle, right = fig.axes
    for ax in fig.axes:
        for artist in (*ax.lines, *ax.collections, *ax.patches):
            artist.remove()
    for place, row in enumerate(found.itertuples()):
        draw_interval(left, place, row.value, row.lo, row.hi, IN)
    left.yaxis.set_major_formatter(
        FixedFormatter([f"{LABELS[r.metric]}  {r.value:.1f}" for r in found.itertuples()])
    )
    sides = (("in scope", IN), ("out of scope", OUT), ("text only", TEXT))
    for ax, (name, colour), own in zip(middle, sides, rho.T[2:], strict=True):
        draw_scores(ax, name, own, colour, threshold)
        ax.relim()
        ax.autoscale_view(scalex=False)
    for side, colour in (("in scope", IN), ("out of scope", OUT)):  # far apart is good
        taken, left_alone = asked[f"{side} taken"], asked[f"{side} left"]
        right.plot(100 * taken / (taken + left_alone), range(len(asked)), "o", color=colour, label=side)
    right.yaxis.set_major_formatter(
        FixedFormatter([f"{name}  ({n:,})" for name, n in asked.sum(axis=1).items()])
    )
    if fresh:
        right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2, fontsize=7.5)
    fig.suptitle(f"{fusion} · {clip} · seed {seed} · ρ ≥ {threshold:.2f}", y=0.99)
    return fig


def _frame(n_metrics: int, n_kinds: int) -> Figure:
    """The figure with its five axes: all that no control moves."""
    fig = plt.figure(figsize=(10.5, 3.4), dpi=DPI)
    subfigures = fig.subfigures(1, 3, width_ratios=(1, 1.2, 1))
    left, middle, right = (
        subfigures[0].subplots(),
        subfigures[1].subplots(3, sharex=True),
        subfigures[2].subplots(),
    )
    draw_rows(left, [""] * n_metrics)
    left.set(xlim=(-2, 102), xlabel="per cent, with 95 % intervals", title="metrics")
    middle[-1].set(xlabel="scope score ρ", xlim=(0, 1))
    draw_rows(right, [""] * n_kinds)
    right.set(xlim=(-4, 104), xlabel="questions taken by the edit (%)", title="by reference")
    return fig


class Panel(widgets.VBox):
    """Controls over :func:`plot_panel` and the tables beside it; nothing is computed here, nothing written."""

    def __init__(self, scored: Scored, clip: str, fusion: str = "dot", seed: int = 0, threshold: float = 0.5):
        self.scored, self._figure = scored, None
        clips, fusions, seeds = (list(dict.fromkeys(names)) for names in zip(*scored.rho, strict=True))
        self.controls = {
            "clip": widgets.ToggleButtons(options=clips, value=clip, description="CLIP"),
            "fusion": widgets.ToggleButtons(options=fusions, value=fusion, description="fusion"),
            "seed": widgets.ToggleButtons(options=seeds, value=seed, description="seed"),
            "threshold": widgets.FloatSlider(
                threshold, min=0, max=1, step=0.01, description="ρ ≥", continuous_update=False,
                layout=widgets.Layout(width="42em"),
            ),
        }  # fmt: skip
        self.default, self._resetting = self.state, False
        self.reset = widgets.Button(description="reset", tooltip="Back to what the notebook shows")
        self.reset.on_click(lambda _: self.go_back())
        self.picture, self.table = widgets.Image(format="png"), widgets.HTML()
        super().__init__([*self.controls.values(), self.reset, self.picture, self.table])
        for control in self.controls.values():
            control.observe(lambda _: self._resetting or self.update(), "value")
        self.update()

    @property
    def state(self) -> dict:
        return {name: control.value for name, control in self.controls.items()}

    def go_back(self) -> None:
        """Set every control as it was at first."""
        self._resetting = True  # one picture, not one a control
        for name, value in self.default.items():
            self.controls[name].value = value
        self._resetting = False
        self.update()

    def update(self) -> None:
        """Show what the controls say."""
        state, scored = self.state, self.scored
        rho = scored.rho[state["clip"], state["fusion"], state["seed"]]
        self.metrics = metrics(scored.values, rho, state["threshold"])
        self.confusion = confusion(scored.reference, rho, state["threshold"])
        first, self._figure = self._figure is None, plot_panel(scored, **state, fig=self._figure)
        if first:  # the axes find their places, and stay there
            self._figure.draw_without_rendering()
            self._figure.set_layout_engine("none")
        self.picture.value = _png(self._figure)
        self.table.value = _html([self.metrics.round(1), self.confusion.reset_index()])

    def _repr_mimebundle_(self, **options) -> dict:
        """The live widget and, for a reader without a kernel, its picture."""
        picture = base64.b64encode(self.picture.value).decode()
        return super()._repr_mimebundle_(**options) | {"image/png": picture}


def _html(tables: list[pd.DataFrame]) -> str:
    """Tables as a notebook shows them: every header over its column, numbers to the right."""
    cell = "text-align: right; padding: 0.2em 0.8em; white-space: nowrap"
    styles = [
        {"selector": "th, td", "props": cell},
        {"selector": "thead", "props": "border-bottom: 1px solid"},
    ]
    styled = (t.style.hide(axis="index").format(precision=1).set_table_styles(styles) for t in tables)
    return "<div>" + "<br>".join(s.set_uuid(str(i)).to_html() for i, s in enumerate(styled)) + "</div>"


def _png(fig: Figure) -> bytes:
    """The figure as it stands: one drawing, where ``savefig`` makes two to trim its margins."""
    buffer = io.BytesIO()
    FigureCanvasAgg(fig).print_png(buffer, metadata={"Software": None})
    plt.close(fig)
    return buffer.getvalue()
