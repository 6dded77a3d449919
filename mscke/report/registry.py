"""Which notebook made which figure or table: ``index.json``, and the ``README.md`` written from it.

:func:`mscke.report.figures.save_figure` and :func:`mscke.report.tables.write_table` register what they
write when a caption is given; :func:`write_index` (``python -m mscke.report.registry``) then shows it
all. Same content, same bytes.
"""

from __future__ import annotations

import json
import os
from itertools import groupby
from pathlib import Path

from mscke.config import ROOT, get_track
from mscke.system.files import replacing

SHOWN = 30  # rows of a table, at most; a longer one is linked
HEAD = """# Figures and tables

Written by the notebooks, and this page by `mscke.report.registry`: to change a figure, change its notebook.
Pictures of scenes adapt artwork by [OpenMoji](https://openmoji.org/), CC BY-SA 4.0: see NOTICE.md.
"""


def register(folder: str | Path, name: str, caption: str, notebook: str) -> None:
    """Record ``name`` (a stem relative to ``folder``: ``"main"``, ``"tables/main"``) in ``index.json``."""
    path = Path(folder) / "index.json"
    entry = {name: {"caption": " ".join(caption.split()), "notebook": notebook.removesuffix(".ipynb")}}
    with replacing(path) as temporary:
        text = json.dumps(_entries(path) | entry, indent=1, sort_keys=True, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def write_index(folder: str | Path) -> Path:
    """Write ``folder/README.md``: each registered figure and table, notebook by notebook.

    Entries whose files are gone are left out.
    """
    folder = Path(folder)
    by_notebook = lambda item: (item[1]["notebook"], item[0])  # noqa: E731
    entries = sorted(_entries(folder / "index.json").items(), key=by_notebook)
    blocks = [HEAD]
    for notebook, group in groupby(entries, key=lambda item: item[1]["notebook"]):
        link = Path(os.path.relpath(ROOT / "notebooks", folder.resolve())) / f"{notebook}.ipynb"
        blocks.append(f"## [{notebook}]({link.as_posix()})\n")
        blocks += [block for name, entry in group if (block := _show(folder, name, entry["caption"]))]
    with replacing(folder / "README.md") as temporary:
        temporary.write_text("\n".join(blocks), encoding="utf-8")
    return folder / "README.md"


def _show(folder: Path, name: str, caption: str) -> str:
    """One entry as Markdown, or nothing when its files are gone."""
    found = [e for e in ("png", "pdf", "csv", "md", "tex") if (folder / f"{name}.{e}").exists()]
    files = " · ".join(f"[{e}]({name}.{e})" for e in found)
    if "png" in found:
        alt = caption.translate(str.maketrans("[]", "()"))
        body = f"![{alt}]({name}.png)"
    elif "md" in found:
        body = (folder / f"{name}.md").read_text(encoding="utf-8").strip()
        if (rows := body.count("\n") - 1) > SHOWN:
            body = f"[{rows} rows]({name}.md)"
    else:
        return ""
    return f"### {Path(name).name}\n\n{body}\n\n{caption} ({files})\n"


def _entries(path: Path) -> dict[str, dict[str, str]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


if __name__ == "__main__":
    print(write_index(get_track().figures))
