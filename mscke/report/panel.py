"""The ablation's panel: a picture and two tables under controls, bound to :mod:`mscke.report.ablation`.

Two layers above its pure functions: a figure made from what they say (:func:`plot_panel`, :class:`Picture`)
and a thin :class:`Panel` of widgets that only binds. A saved notebook shows the panel's picture at its
default state.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import io

import ipywidgets as widgets
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from mscke.evaluation.outcomes import COLUMNS
from mscke.report.ablation import ROLES_FINE, Reading, Scored, read
from mscke.report.figures import IN, OUT, TEXT, draw_interval, draw_rows, draw_scores
from mscke.report.tables import LABELS

SIDES = (("in scope", IN), ("out of scope", OUT), ("text only", TEXT))


def to_html(reading: Reading) -> str:
    """Both tables of a reading, side by side, looking as a notebook's tables do; two decimals, as in the CSV."""
    shown = reading.metrics.assign(metric=reading.metrics["metric"].map(LABELS))
    tables = (shown.set_index("metric"), reading.confusion)
    texts = (  # the index's name stands in the row of the columns' names, not in one of its own
        t.rename_axis(index=None, columns=t.index.name).to_html(border=0, float_format="{:.2f}".format) for t in tables
    )
    # the classes by which JupyterLab and the classic notebook style the tables of cells
    style = "display: flex; flex-wrap: wrap; gap: 0 3em; line-height: normal"
    return f'<div class="jp-RenderedHTMLCommon rendered_html" style="{style}">{"".join(texts)}</div>'


def plot_panel(scored: Scored, clip: str, fusion: str, seed: int, threshold: float = 0.5) -> Figure:
    """Metrics, scores and confusion by reference of one classifier at one threshold."""
    picture = Picture(scored.reference)
    picture.show(read(scored, clip, fusion, seed, threshold))
    return picture.figure


class Picture:
    """One figure for every state: made and laid out once, so that a change draws only what differs.

    ``reference`` (R, 5) str names the rows on the right, which are the same for every classifier.
    """

    def __init__(self, reference: np.ndarray, dpi: int = 80):
        self.figure = Figure(figsize=(10.5, 3.4), dpi=dpi)
        self.canvas = FigureCanvasAgg(self.figure)
        left, middle, right = self.figure.subfigures(1, 3, width_ratios=(1, 1.2, 1))
        self.left, self.middle, self.right = (left.subplots(), middle.subplots(3, sharex=True), right.subplots())

        draw_rows(self.left, [LABELS[metric] for metric in COLUMNS])
        self.left.tick_params(axis="y", pad=37)  # room for the numbers
        self.left.set(xlim=(-2, 102), xlabel="per cent, with 95 % intervals", title="metrics")
        for ax in self.middle:
            ax.set(xlim=(0, 1), ylim=(0, 100))  # the widest ticks that can come
        ax.set(xlabel="scope score ρ")
        kinds, counts = np.unique(reference[:, ROLES_FINE].astype(str), return_counts=True)
        draw_rows(self.right, [f"{kind}  ({n:,})" for kind, n in zip(kinds, counts, strict=True)])
        self.right.set(xlim=(-4, 104), xlabel="questions taken by the edit (%)", title="by reference")
        marks = [Line2D([], [], marker="o", ls="", color=c, label=side) for side, c in SIDES[:2]]
        self.right.legend(handles=marks, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2, fontsize=7.5)
        self.title = self.figure.suptitle("ρ")  # any text, to keep its room
        frames = [part for ax in self.middle for part in (ax.yaxis, ax.set_title("ρ"), *ax.spines.values())]
        self.figure.draw_without_rendering()
        self.figure.set_layout_engine("none")

        self.changing, self.drawn = [self.title, *frames], []
        self.still = self._without_changing()

    def _without_changing(self):
        """The pixels that are the same for every state."""
        shown = [artist for artist in self.changing if artist.get_visible()]
        for artist in shown:
            artist.set_visible(False)
        self.canvas.draw()
        for artist in shown:
            artist.set_visible(True)
        return self.canvas.copy_from_bbox(self.figure.bbox)

    def show(self, reading: Reading) -> None:
        """Put the reading's marks in place of those drawn before."""
        for artist in self.drawn:
            artist.remove()
        self.title.set_text(reading.title)
        self.drawn = []
        beside = {"textcoords": "offset points", "ha": "right", "va": "center_baseline", "fontsize": 8.5}
        found, axis = reading.metrics, self.left.get_yaxis_transform()
        self.drawn += draw_interval(self.left, range(len(found)), found["value"], found["lo"], found["hi"], IN)
        for y, value in enumerate(found["value"]):
            self.drawn.append(self.left.annotate(f"{value:.1f}", (0, y), (-5, 0), axis, **beside))
        for ax, (name, colour), own in zip(self.middle, SIDES, reading.rho.T[2:], strict=True):
            self.drawn += draw_scores(ax, name, own, colour, reading.threshold)
        for side, colour in SIDES[:2]:
            taken, left = reading.confusion[f"{side} taken"], reading.confusion[f"{side} left"]
            self.drawn += self.right.plot(100 * taken / (taken + left), range(len(taken)), "o", color=colour)

    def png(self) -> bytes:
        """What is shown, on the pixels that never change: as the whole figure drawn anew, in less time."""
        self.canvas.restore_region(self.still)
        for artist in sorted([*self.changing, *self.drawn], key=lambda artist: artist.get_zorder()):
            artist.draw(self.canvas.get_renderer())
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(self.canvas.buffer_rgba())).convert("RGB").save(buffer, "png")
        return buffer.getvalue()


class Panel(widgets.VBox):
    """Controls over a :class:`Picture` and the tables below it; nothing is computed here, nothing written.

    A state seen before is not computed again. ``reset`` goes back to the state that the panel began with.
    """

    def __init__(self, scored: Scored, clip: str, fusion: str = "dot", seed: int = 0, threshold: float = 0.5):
        self.scored, self.figure = scored, Picture(scored.reference)
        self.read = functools.cache(functools.partial(read, scored))
        clips, fusions, seeds = (list(dict.fromkeys(names)) for names in zip(*scored.rho, strict=True))
        self.controls = {
            name: widgets.ToggleButtons(options=options, value=value, style={"button_width": "9em"})
            for name, options, value in (("clip", clips, clip), ("fusion", fusions, fusion), ("seed", seeds, seed))
        }
        self.controls["threshold"] = widgets.FloatSlider(
            threshold, min=0, max=1, step=0.01, continuous_update=False, layout={"width": "36em"}
        )
        self.default, self.shown = self.state, None
        self.reset = widgets.Button(description="reset", tooltip="back to the state at the beginning")
        self.picture, self.table = widgets.Image(format="png"), widgets.HTML()
        names = {"clip": "CLIP", "threshold": "ρ ≥"}
        rows = [
            widgets.HBox([widgets.Label(names.get(name, name), layout={"width": "4em"}), control])
            for name, control in self.controls.items()
        ]
        rows[-1].children += (self.reset,)
        super().__init__([*rows, self.picture, self.table])
        for control in self.controls.values():
            control.observe(lambda _: self.update(), "value")
        self.reset.on_click(lambda _: self.go(**self.default))
        self.update()

    @property
    def state(self) -> dict:
        """What the controls say; the slider's steps are hundredths."""
        state = {name: control.value for name, control in self.controls.items()}
        return state | {"threshold": round(state["threshold"], 2)}

    def go(self, **state) -> None:
        """Set the controls named, then show what they say, once."""
        with contextlib.ExitStack() as held:
            for name, value in state.items():
                held.enter_context(self.controls[name].hold_trait_notifications())
                self.controls[name].value = value

    def update(self) -> None:
        """Show what the controls say, unless it is shown."""
        if self.state == self.shown:
            return
        self.shown = self.state
        reading = self.read(**self.shown)
        self.metrics, self.confusion = reading.metrics, reading.confusion
        self.figure.show(reading)
        self.picture.value, self.table.value = self.figure.png(), to_html(reading)

    def _repr_mimebundle_(self, **options) -> dict:
        """The live widget and, for a reader without a kernel, its picture."""
        picture = base64.b64encode(self.picture.value).decode()
        return super()._repr_mimebundle_(**options) | {"image/png": picture}
