"""The ablation's panel in JupyterLab as a reader meets it: Chromium clicks, presses keys and reads.

Nothing is trained: the notebook's scores are made up. Skipped where Chromium or playwright is missing.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys

import nbformat
import numpy as np
import pytest
from tenacity import Retrying, retry_if_result, stop_after_delay, wait_fixed

from mscke.report.ablation import Scored, read

pytestmark = pytest.mark.slow
PATIENCE = 120  # seconds: how long a busy machine may take for one thing
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
ALIGNED = "cell => getComputedStyle(cell).textAlign"
CELL = """
from mscke.report.ablation import Scored
from mscke.report.figures import use_style
from mscke.report.panel import Panel

use_style()
Panel(Scored.open("scores.parquet"), "mini-L")
"""


@pytest.fixture
def api():
    """What drives the browser."""
    reason = "the browser's side is not tested: pip install playwright (it is in the extra dev)"
    api = pytest.importorskip("playwright.sync_api", reason=reason)
    if CHROMIUM is None:
        pytest.skip("the browser's side is not tested: no Chromium (on Debian: apt-get install chromium)")
    api.expect.set_options(timeout=1000 * PATIENCE)
    return api


@pytest.fixture
def scored():
    rng = np.random.default_rng(0)
    reference = np.full((80, 5), "", dtype="<U8")
    reference[:, 2:4] = rng.choice(["colour", "place", "relation"], (80, 2))
    keys = [(c, f, s) for c in ("mini-B", "mini-L") for f in ("text", "dot_pooled", "dot") for s in (0, 1)]
    values = rng.integers(0, 2, (80, 5, 2)).astype(float)
    return Scored(values, reference, {key: rng.random((80, 5)).astype("float32") for key in keys})


@pytest.fixture
def lab(api, tmp_path, scored):
    """A notebook with the panel in a JupyterLab of its own, on loopback: its address."""
    (tmp_path / "work").mkdir()
    scored.save(tmp_path / "work" / "scores.parquet")
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL.strip())], metadata=kernel)
    nbformat.write(notebook, tmp_path / "work" / "panel.ipynb")
    quiet = tmp_path / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    folders = {f"JUPYTER_{kind}_DIR": str(tmp_path / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    folders |= {f"JUPYTERLAB_{kind}_DIR": str(tmp_path / kind.lower()) for kind in ("SETTINGS", "WORKSPACES")}
    token = secrets.token_hex(16)
    # fmt: off
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0",
        f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={tmp_path / 'work'}",
    ]
    # fmt: on
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, env=os.environ | folders, stdout=log, stderr=log)
    try:
        yield f"{_address(server, tmp_path)}lab/tree/panel.ipynb?token={token}"
    finally:
        server.terminate()
        server.wait(PATIENCE)


def _address(server, folder):
    """Where the server listens, once it says so."""
    told = folder / "runtime" / f"jpserver-{server.pid}.json"
    ready = lambda: told.exists() or server.poll() is not None  # noqa: E731
    Retrying(retry=retry_if_result(lambda done: not done), wait=wait_fixed(0.1), stop=stop_after_delay(PATIENCE))(ready)
    assert server.poll() is None, (folder / "log").read_text()
    return json.loads(told.read_text())["url"]


def _error(said):
    """JupyterLab asks for language servers, and is told that there are none: no error of ours."""
    return said.type == "error" and "/lsp/status" not in said.location["url"]


@pytest.fixture
def page(api, lab):
    """The notebook in a browser; at the end: nothing went wrong in it."""
    wrong = []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET.split())
        page = browser.new_page(viewport={"width": 1400, "height": 1200})
        page.set_default_timeout(1000 * PATIENCE)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: _error(said) and wrong.append(f"{said.text} {said.location}"))
        page.goto(lab)
        yield page
        browser.close()
    assert not wrong


def test_a_reader_moves_the_panel_and_resets_it(api, page, scored):
    expect = api.expect
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    page.locator(".jp-CodeCell .cm-content").click()
    page.keyboard.press("Shift+Enter")
    tables, picture = page.locator(".jp-OutputArea table"), page.locator(".jp-OutputArea img")

    def shows(**state):
        """Every number of both tables is what the pure function gives."""
        reading = read(scored, **state)
        for row, found in zip(tables.nth(0).locator("tbody tr").all(), reading.metrics.itertuples(), strict=True):
            expect(row.locator("td")).to_have_text([f"{v:.2f}" for v in found[2:5]] + [str(found.n)])
        for row, counts in zip(tables.nth(1).locator("tbody tr").all(), reading.confusion.to_numpy(), strict=True):
            expect(row.locator("td")).to_have_text([str(n) for n in counts])

    expect(tables).to_have_count(2)
    shows(clip="mini-L", fusion="dot", seed=0, threshold=0.5)
    first = picture.get_attribute("src")
    for table in tables.all():  # a header stands over its column
        assert table.locator("thead tr").count() == 1
        for head, cell in zip(
            table.locator("thead th").all(), table.locator("tbody tr").first.locator("th, td").all(), strict=True
        ):
            (over, under) = (part.bounding_box() for part in (head, cell))
            assert over["x"] == pytest.approx(under["x"]) and over["width"] == pytest.approx(under["width"])
            assert head.evaluate(ALIGNED) == cell.evaluate(ALIGNED)
    assert page.locator(".noUi-base").bounding_box()["width"] > 300  # pixels for a hundred steps
    for button in page.locator(".jp-OutputArea .jupyter-button").all():  # no name is cut
        assert button.evaluate("b => b.scrollWidth <= b.clientWidth"), button.text_content()

    page.get_by_role("button", name="dot_pooled").click()
    shows(clip="mini-L", fusion="dot_pooled", seed=0, threshold=0.5)
    handle = page.locator(".noUi-handle")
    handle.focus()
    for threshold in (0.51, 0.52, 0.53):
        page.keyboard.press("ArrowRight")
        shows(clip="mini-L", fusion="dot_pooled", seed=0, threshold=threshold)
    expect(picture).not_to_have_attribute("src", first)

    page.get_by_role("button", name="reset").click()
    shows(clip="mini-L", fusion="dot", seed=0, threshold=0.5)
    expect(handle).to_have_attribute("aria-valuenow", "0.5")
    expect(page.locator(".widget-readout")).to_have_text("0.50")
    expect(page.get_by_role("button", name="dot", exact=True)).to_contain_class("mod-active")
