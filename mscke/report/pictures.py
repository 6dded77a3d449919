"""Scenes as pictures: with what is asked of them, what the classifier attends to, where it fails."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

# A veil that lifts where attention lies: the colours there, which questions refer to, stay true.
VEIL = LinearSegmentedColormap.from_list("veil", [(0.07, 0.08, 0.16, 0.78), (0.07, 0.08, 0.16, 0.0)])


def as_jpeg(fig: Figure) -> Image:
    """The figure for a notebook's page, as a JPEG: of scenes it has a third of a PNG's bytes. The figure is closed."""
    page = io.BytesIO()
    fig.savefig(page, format="jpeg", dpi=78, pil_kwargs={"quality": 70})
    plt.close(fig)
    return Image(page.getvalue(), format="jpeg")


def plot_scene(image: np.ndarray, ax: Axes | None = None, title: str = "") -> Figure:
    """An RGB image (H, W, 3) under its wrapped title."""
    fig, ax = _axes(ax)
    _show(ax, image)
    ax.set_title(textwrap.fill(title, 30), fontsize=8.5, fontweight="normal")
    return fig


def plot_attention(
    image: np.ndarray, weights: np.ndarray, text: str, ax: Axes | None = None, most: float | None = None
) -> Figure:
    """Attention of ``text`` over the patches of an RGB image (H, W, 3): what it leaves out is veiled.

    ``weights`` (P,), row by row on a square grid, sum to 1; ``most`` is the weight that
    lifts the veil entirely (this picture's largest, unless given).
    """
    fig, ax = _axes(ax)
    _show(ax, image)
    side = round(len(weights) ** 0.5)
    if side * side != len(weights):
        raise ValueError(f"{len(weights)} weights do not make a square of patches")
    grid = np.asarray(weights, float).reshape(side, side)
    height, width = image.shape[:2]
    scale = Normalize(0, grid.max() if most is None else most)
    ax.imshow(grid, VEIL, scale, extent=(0, width, height, 0), interpolation="nearest")
    ax.set_title(textwrap.fill(text, 26), fontsize=8.5, fontweight="normal")
    return fig


def plot_attention_grid(
    images: Sequence[np.ndarray], weights: Sequence[np.ndarray], texts: Sequence[str], columns: int = 4
) -> Figure:
    """Many of :func:`plot_attention` on one scale of weights, row by row."""
    fig, axes = _grid(len(images), columns, 1.95, 2.3)
    most = max(float(np.max(w)) for w in weights)
    for ax, image, weight, text in zip(axes, images, weights, texts, strict=True):
        plot_attention(image, weight, text, ax, most)
    bar = fig.colorbar(ScalarMappable(Normalize(0, most), VEIL), ax=axes, shrink=0.6, aspect=30)
    bar.set_label("attention weight of a patch")
    return fig


def plot_failures(cases: Sequence[Mapping], columns: int = 4) -> Figure:
    """Cases as cards: each a mapping with ``image`` (H, W, 3) and ``lines`` of text, the first its title."""
    tallest = max(len(_wrap(case["lines"][1:])) for case in cases)
    fig, axes = _grid(len(cases), columns, 2.35, 2.85 + 0.14 * tallest)
    for ax, case in zip(axes, cases, strict=True):
        first, *rest = case["lines"]
        _show(ax, case["image"])
        ax.set_title(textwrap.fill(first, 30), fontsize=8.5)
        ax.set_xlabel("\n".join(_wrap(rest)), fontsize=7.5, loc="left", linespacing=1.35)
    return fig


def _wrap(lines: Sequence[str]) -> list[str]:
    return [part for line in lines for part in textwrap.wrap(line, 36, subsequent_indent="   ") or [""]]


def _axes(ax: Axes | None) -> tuple[Figure, Axes]:
    if ax is None:
        _, ax = plt.subplots(figsize=(2.3, 2.6))
    return ax.figure, ax


def _grid(n: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """n axes in rows of ``columns``, each with its texts ``width`` × ``height`` inches."""
    columns = min(n, columns)
    rows = -(-n // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    for ax in axes.flat[n:]:
        ax.set_visible(False)
    return fig, list(axes.flat[:n])


def _show(ax: Axes, image: np.ndarray) -> None:
    """The picture in pixel coordinates from its top left corner, without axes."""
    height, width = image.shape[:2]
    ax.imshow(image, extent=(0, width, height, 0), interpolation="lanczos")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
