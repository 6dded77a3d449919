"""What every notebook begins with, and what is left of it when it was executed.

:func:`begin` opens a notebook's track. Benchmarks tell more or less of their records: FGVEdit-Scenes tells the scene, the
kind of reference and the attribute that is asked (``meta``), FGVEdit does not. A cell that begins
``# needs of its records: scene`` is run where all records tell their scene. Elsewhere it prints that they do not.

``python -m mscke.report.notebook IN OUT [NOTE]`` cleans an executed notebook. Outputs, cell ids and their order stay. What
papermill and Jupyter note about the run goes: timings, the injected parameters, widget state, what was written to
stderr. Execution counts become 1 … n. The same outputs give the same bytes. A note, in Markdown, becomes the first cell.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import torch
from IPython import get_ipython
from IPython.core.pylabtools import print_figure
from matplotlib.figure import Figure
from matplotlib_inline.backend_inline import set_matplotlib_formats
from nbformat import NotebookNode
from PIL import Image

from mscke.benchmark.sample import EditRecord
from mscke.config import Track, get_track
from mscke.fetching.track import Benchmark, load_benchmark
from mscke.report.figures import use_style
from mscke.system.files import replacing

KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
RUN_METADATA = ("papermill", "execution", "ExecuteTime", "widgets")
MARK = "# needs of its records: "
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def begin(track: str = "", jpeg: bool = False) -> tuple[Track, Benchmark]:
    """The track ``track`` (see :func:`mscke.config.get_track`) and its records.

    Figures are shown in few bytes: in 64 colours, or as JPEG where they are pictures rather than lines.
    """
    use_style()
    torch.set_num_threads(2)
    settings = get_track(track)
    bench = load_benchmark(settings)
    skip_untold(bench.test)
    if jpeg:
        set_matplotlib_formats("jpeg", pil_kwargs={"quality": 66})
        plt.rcParams["figure.dpi"] = 68
    elif shell := get_ipython():
        shell.display_formatter.formatters["image/png"].for_type(Figure, few_colours)
    return settings, bench


def few_colours(fig: Figure) -> bytes:
    """The figure as a PNG of at most 64 colours."""
    out = io.BytesIO()
    image = Image.open(io.BytesIO(print_figure(fig, "png"))).convert("RGB")
    image.quantize(64, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


def clean(notebook: NotebookNode) -> NotebookNode:
    """Clean in place, and return, a notebook of format 4."""
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    notebook.nbformat_minor = 5
    tags = lambda cell: cell.metadata.get("tags", [])  # noqa: E731
    notebook.cells = [cell for cell in notebook.cells if "injected-parameters" not in tags(cell)]
    count = 0
    for i, cell in enumerate(notebook.cells):
        cell.setdefault("id", f"cell-{i:02d}")
        kept = {k: v for k, v in cell.metadata.items() if k not in RUN_METADATA and (k != "tags" or v)}
        cell.metadata = kept
        if cell.cell_type != "code":
            continue
        if cell.execution_count is not None:
            count += 1
            cell.execution_count = count
        cell.outputs = _outputs(cell)
    nbformat.validate(notebook)
    return notebook


def _outputs(cell: NotebookNode) -> list[NotebookNode]:
    """Without stderr and live widgets (their text stays); neighbouring pieces of stdout joined."""
    kept: list[NotebookNode] = []
    for output in cell.outputs:
        if output.output_type == "stream":
            if output.name == "stderr":
                continue
            if kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text
                continue
        if output.output_type == "execute_result":
            output.execution_count = cell.execution_count
        output.get("data", {}).pop(WIDGET_VIEW, None)
        kept.append(output)
    return kept


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


def main(argv: list[str]) -> None:
    if len(argv) not in (2, 3):
        sys.exit("usage: python -m mscke.report.notebook IN.ipynb OUT.ipynb [NOTE]")
    notebook = clean(nbformat.read(argv[0], as_version=4))
    if len(argv) == 3:
        notebook.cells.insert(0, nbformat.v4.new_markdown_cell(argv[2], id="note"))
    with replacing(Path(argv[1])) as temporary:
        nbformat.write(notebook, temporary)


if __name__ == "__main__":
    main(sys.argv[1:])
