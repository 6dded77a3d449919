"""Tables say what the rows say, files are the same bytes again, and a number that moved is noticed."""

import re
import subprocess

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from mscke.report import data, figures, main_results, paper, pictures, registry, tables, training, verify
from mscke.report import notebook as clean

SHARES = {"reliability": 0.97, "generality": 0.9, "locality": 1.0, "m_in": 0.6, "m_out": 0.8}


def some_rows(methods=("MSCKE", "FT-LLM"), n=200, seed=0):
    """Per-record rows, values 0 or 1 with the probabilities of SHARES."""
    rng, parts = np.random.default_rng(seed), []
    for backbone in ("BLIP-2-mini", "MiniGPT-4-mini"):
        for method in methods:
            for protocol in tables.PROTOCOLS:
                for metric, share in SHARES.items():
                    values = (rng.random(n) < share).astype(float)
                    columns = {"track": "mini", "backbone": backbone, "method": method, "protocol": protocol}
                    columns |= {"record": range(n), "metric": metric, "value": values, "answer": "owl"}
                    parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def rows():
    return some_rows()


@pytest.fixture(scope="module")
def summary(rows):
    return tables.summarise(rows)


# ------------------------------------------------------------------------------- tables


def test_bootstrap_agrees_with_a_plain_loop_and_with_the_normal_approximation():
    values = (np.random.default_rng(1).random((400, 2)) < [0.3, 0.9]).astype(float)
    mean, lo, hi = tables.bootstrap(values, n_boot=4000)

    rng, n = np.random.default_rng(2), len(values)
    means = [values[rng.integers(n, size=n)].mean(0) for _ in range(4000)]
    np.testing.assert_allclose(lo, np.percentile(means, 2.5, axis=0), atol=0.005)
    np.testing.assert_allclose(hi, np.percentile(means, 97.5, axis=0), atol=0.005)

    half = 1.96 * np.sqrt(mean * (1 - mean) / n)
    np.testing.assert_allclose(mean, values.mean(0))
    np.testing.assert_allclose([mean - lo, hi - mean], [half, half], atol=0.006)


def test_summary_holds_percent_and_specificity_is_the_mean_of_in_and_out(rows, summary):
    wide = summary.pivot(index=["backbone", "method", "protocol"], columns="metric", values="value")
    np.testing.assert_allclose(wide["specificity"], (wide["m_in"] + wide["m_out"]) / 2)
    one = rows.query("backbone == 'BLIP-2-mini' and method == 'MSCKE' and protocol == 'generated'")
    expected = 100 * one[one["metric"] == "m_in"]["value"].mean()
    assert wide.loc[("BLIP-2-mini", "MSCKE", "generated"), "m_in"] == pytest.approx(expected)
    assert (summary["lo"] <= summary["value"]).all() and (summary["value"] <= summary["hi"]).all()
    assert (summary["n"] == 200).all()


def test_specificity_varies_as_its_pairs_do():
    """Opposite halves within each record cancel: the interval is over records, not over queries."""
    rows = some_rows(("MSCKE",))
    flipped = 1 - rows.loc[rows["metric"] == "m_in", "value"].to_numpy()
    rows.loc[rows["metric"] == "m_out", "value"] = flipped
    specificity = tables.summarise(rows, n_boot=50).query("metric == 'specificity'")
    assert (specificity[["value", "lo", "hi"]] == 50).all(axis=None)


def test_summary_has_one_order_and_one_result(rows, summary):
    shuffled = rows.sample(frac=1, random_state=0)
    backbones = ["BLIP-2-mini", "MiniGPT-4-mini"]
    shuffled["backbone"] = pd.Categorical(shuffled["backbone"], backbones)
    shuffled = shuffled.sort_values("backbone").astype({"backbone": object})
    pd.testing.assert_frame_equal(tables.summarise(shuffled), summary, rtol=0, atol=1e-12)
    assert list(summary["method"].unique()) == ["FT-LLM", "MSCKE"]
    assert list(summary["metric"][:6]) == list(tables.LABELS)


def drop(rows):
    return rows.drop(rows.index[(rows["record"] == 17) & (rows["metric"] == "m_in")][0])


def spoil(value):
    def change(rows):
        return rows.assign(value=rows["value"].mask((rows["record"] == 17) & (rows["metric"] == "m_in"), value))

    return change


@pytest.mark.parametrize("damage", [drop, spoil(np.nan), spoil(97.0), lambda rows: pd.concat([rows, rows[170:180]])])
def test_a_value_that_is_missing_double_or_no_share_names_its_record(rows, damage):
    with pytest.raises(ValueError, match=r"BLIP-2-mini, MSCKE, generated: .*record 17"):
        tables.summarise(damage(rows))


def test_wide_and_beside_paper_read_as_the_summary(summary):
    wide = tables.wide(summary, "generated")
    assert list(wide.columns) == ["backbone", "method", *tables.LABELS.values()]
    first = summary.iloc[0]
    assert wide.loc[0, "Reliability"] == f"{first.value:.1f} [{first.lo:.1f}, {first.hi:.1f}]"

    beside = tables.beside_paper(summary).set_index(["backbone", "method", "metric"])
    assert beside.loc[("BLIP-2-mini", "MSCKE", "specificity"), "reported"] == 61.6
    assert beside.loc[("MiniGPT-4-mini", "FT-LLM", "locality"), "reported"] == 86.3
    assert beside.loc[("BLIP-2-mini", "FT-LLM", "reliability"), "generated"] == first.value


def test_what_the_paper_does_not_report_stays_empty():
    summary = tables.summarise(some_rows(("SERAC+fg",)), n_boot=10)
    assert tables.beside_paper(summary)["reported"].isna().all()


def test_reported_numbers_are_complete():
    main = paper.reported_main()
    assert len(main) == 2 * 6 * 4 and main["value"].between(0, 100).all()
    assert not main.duplicated(["backbone", "method", "metric"]).any()
    assert len(paper.reported_ablation()) == 6 and len(paper.reported_transfer()) == 3


def test_tables_come_back_and_are_escaped(tmp_path, summary):
    path = tables.write_table(summary, "main", tmp_path)
    read = pd.read_csv(path)
    pd.testing.assert_frame_equal(read, summary.round(2), atol=0.0051, rtol=0)

    frame = pd.DataFrame({"M_in": [1.0, np.nan], "rule": ["ρ > 50 % & more", "a|b"]})
    tables.write_table(frame, "odd", tmp_path)
    md = (tmp_path / "tables/odd.md").read_text(encoding="utf-8")
    assert r"a\|b" in md and "–" in md
    tex = (tmp_path / "tables/odd.tex").read_text(encoding="utf-8")
    assert r"M\_in" in tex and r"50 \% \& more" in tex and r"\toprule" in tex and "–" in tex
    assert not list(tmp_path.rglob("*.tmp"))


# ------------------------------------------------------------------------------- figures

RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (96, 96, 3), dtype=np.uint8) for _ in range(3)]
WEIGHTS = [w / w.sum() for w in RNG.random((3, 36))]
CURVE = pd.DataFrame({"epoch": [1, 2, 3], "loss": [3.0, 2.0, 1.0], "right_in_scope": [0.5, 0.6, 0.7]})
CASE = {"image": IMAGES[0], "lines": ["Missed", "What is the thing on the red card? → owl", "ρ = 0.31"]}
PLOTS = {
    "main": lambda s, r: main_results.plot_main_results(s, "generated"),
    "all": lambda s, r: main_results.plot_main_results(s, "teacher_forced", list(tables.LABELS)),
    "curves": lambda s, r: training.plot_curves(CURVE, {"Loss": ["loss"], "Right (%)": ["right_in_scope"]}),
    "scores": lambda s, r: training.plot_score_histogram(RNG.random(50), [0.1, 0.2], 0.5, [0.0, 0.1]),
    "breakdown": lambda s, r: figures.plot_breakdown(r, ["metric", "protocol"], hue="method"),
    "text": lambda s, r: data.plot_text_similarity(np.linspace(0.2, 1, 30), np.linspace(0, 0.9, 40)),
    "scene": lambda s, r: pictures.plot_scene(IMAGES[0], title="a scene"),
    "attention": lambda s, r: pictures.plot_attention(IMAGES[0], WEIGHTS[0], "What is on the red card?"),
    "grid": lambda s, r: pictures.plot_attention_grid(IMAGES, WEIGHTS, ["a", "b", "c"], columns=2),
    "failures": lambda s, r: pictures.plot_failures([CASE, CASE]),
}


@pytest.mark.parametrize("name", PLOTS)
def test_every_figure_is_written_and_not_empty(name, tmp_path, rows, summary):
    path = figures.save_figure(PLOTS[name](summary, rows), name, tmp_path)
    assert plt.imread(path).std() > 0.01
    assert path.with_suffix(".pdf").stat().st_size > 5000


@pytest.mark.parametrize("name", ["main", "breakdown", "grid", "failures"])
def test_figure_files_are_the_same_bytes_drawn_again_or_saved_again(name, tmp_path, rows, summary):
    drawn = PLOTS[name](summary, rows)
    for folder, figure in (("a", drawn), ("b", drawn), ("c", PLOTS[name](summary, rows))):
        figures.save_figure(figure, name, tmp_path / folder)
    for suffix in ("png", "pdf"):
        assert len({(tmp_path / f / f"{name}.{suffix}").read_bytes() for f in "abc"}) == 1


def test_the_main_figure_shows_every_number(summary):
    ax = main_results.plot_main_results(summary, "generated").axes[3]  # BLIP-2-mini, specificity
    shown = sorted(float(np.ravel(x)[0]) for line in ax.lines if len(x := line.get_xdata()) == 1)
    ours = summary.query("backbone == 'BLIP-2-mini' and protocol == 'generated' and metric == 'specificity'")
    assert shown == pytest.approx(sorted(ours["value"]))
    low, high = ax.get_xlim()
    assert low < 24.2 and high > 100  # the paper's FT-LLM is in sight too


def test_the_style_tells_every_method_apart():
    assert set(figures.METHOD_COLOURS) == set(tables.METHODS)
    assert len(set(figures.METHOD_COLOURS.values())) == len(tables.METHODS)
    assert plt.rcParams["pdf.fonttype"] == 42  # embedded


def test_weights_that_are_no_square_are_refused():
    with pytest.raises(ValueError, match="7 weights"):
        pictures.plot_attention(IMAGES[0], np.ones(7), "")


# ------------------------------------------------------------------------------- index


def test_the_index_shows_all_that_was_registered(tmp_path, summary):
    caption = "Main results, ρ ≥ 0.5 [both\n backbones]."
    figure = main_results.plot_main_results(summary)
    figures.save_figure(figure, "main", tmp_path, caption, "03_main_results")
    tables.write_table(summary, "main", tmp_path, tables.wide(summary), "As a table.", "03_main_results.ipynb")
    tables.write_table(summary[:1], "unlisted", tmp_path)
    figures.save_figure(pictures.plot_scene(IMAGES[0]), "gone", tmp_path, "Gone.", "01_data")
    text = registry.write_index(tmp_path).read_text(encoding="utf-8")
    assert "](gone.png)" in text

    for kind in ("png", "pdf"):
        (tmp_path / f"gone.{kind}").unlink()
    text = registry.write_index(tmp_path).read_text(encoding="utf-8")
    assert "Gone" not in text and "unlisted" not in text
    assert "Main results, ρ ≥ 0.5 [both backbones]." in text and "As a table." in text
    assert text.count("notebooks/03_main_results.ipynb") == 1 and "| FT-LLM " in text
    links = re.findall(r"\]\(((?:tables/)?main\.\w+)\)", text)
    assert set(links) == {"main.png", "main.pdf", "tables/main.csv", "tables/main.md", "tables/main.tex"}
    assert all((tmp_path / link).exists() for link in links)

    before = (tmp_path / "index.json").read_bytes()
    registry.register(tmp_path, "main", caption, "03_main_results")
    assert (tmp_path / "index.json").read_bytes() == before


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), registry.replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------- notebooks


def executed_notebook():
    view = {"text/plain": "interactive(…)", clean.WIDGET_VIEW: {"model_id": "3f"}}
    cells = [
        new_markdown_cell("# Title", id="title", metadata={"papermill": {"duration": 1.0}, "tags": []}),
        new_code_cell("n = 1", id="parameters", execution_count=3, metadata={"tags": ["parameters"]}),
        new_code_cell("n = 2", id="injected", execution_count=4, metadata={"tags": ["injected-parameters"]}),
        new_code_cell(
            "run()",
            id="run",
            execution_count=9,
            metadata={"execution": {"iopub.execute_input": "2024-01-01"}, "tags": ["nbval-check-output"]},
            outputs=[
                new_output("stream", name="stdout", text="a\n"),
                new_output("stream", name="stderr", text="100%|████|"),
                new_output("stream", name="stdout", text="b\n"),
                new_output("display_data", data=view),
                new_output("execute_result", data={"text/plain": "42"}, execution_count=9),
            ],
        ),
        new_code_cell("", id="empty"),
    ]
    metadata = {
        "kernelspec": {"name": "my-env", "display_name": "mine"},
        "language_info": {"name": "python", "version": "3.11.9"},
        "papermill": {"parameters": {"n": 2}},
        "widgets": {"state": {}},
    }
    return new_notebook(cells=cells, metadata=metadata)


def test_clean_drops_the_run_and_keeps_the_result(tmp_path):
    source, target = tmp_path / "in.ipynb", tmp_path / "out.ipynb"
    nbformat.write(executed_notebook(), source)
    clean.main([str(source), str(target)])
    notebook = nbformat.read(target, as_version=4)
    assert [cell.id for cell in notebook.cells] == ["title", "parameters", "run", "empty"]
    assert notebook.metadata == {"kernelspec": clean.KERNEL, "language_info": {"name": "python"}}
    title, parameters, run, empty = notebook.cells
    assert title.metadata == {} and run.metadata == {"tags": ["nbval-check-output"]}
    assert [cell.execution_count for cell in (parameters, run, empty)] == [1, 2, None]
    stream, widget, result = run.outputs
    assert (stream.name, stream.text) == ("stdout", "a\nb\n")
    assert widget.data == {"text/plain": "interactive(…)"}
    assert (result.data["text/plain"], result.execution_count) == ("42", 2)

    once = target.read_bytes()
    clean.main([str(target), str(target)])  # in place, and again
    assert target.read_bytes() == once
    assert not any(word in once for word in (b"papermill", b"stderr", b"iopub", b"widget"))

    clean.main([str(source), str(target), "*a note*"])
    note, *rest = nbformat.read(target, as_version=4).cells
    assert (note.cell_type, note.source) == ("markdown", "*a note*") and rest == notebook.cells


# ------------------------------------------------------------------------------- verify


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path, summary):
    """A git repository whose HEAD holds the main table."""
    git(tmp_path, "init", "-q")
    tables.write_table(summary, "main_results", tmp_path / "figures")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "results")
    return tmp_path


def change(repository, column, value):
    """Set one number of the regenerated table: MSCKE's generated specificity on BLIP-2-mini."""
    path = repository / verify.TABLE
    table = pd.read_csv(path)
    one = (table["backbone"] == "BLIP-2-mini") & (table["method"] == "MSCKE")
    one &= (table["protocol"] == "generated") & (table["metric"] == "specificity")
    table.loc[one, column] = value(table.loc[one].iloc[0])
    table.to_csv(path, index=False)


def test_verify_passes_what_did_not_change(repository, capsys):
    assert verify.verify(repository) == 0
    printed = capsys.readouterr().out
    assert "24 of 24 numbers are within tolerance" in printed and "61.60" in printed
    assert "NOT" not in printed


def test_verify_allows_half_the_committed_interval_and_no_more(repository, capsys):
    change(repository, "value", lambda row: row["value"] + 0.45 * (row["hi"] - row["lo"]))
    assert verify.verify(repository) == 0
    change(repository, "value", lambda row: row["value"] + 0.45 * (row["hi"] - row["lo"]))
    assert verify.verify(repository) == 1
    printed = capsys.readouterr().out
    assert "23 of 24 numbers are within tolerance" in printed and printed.count("NOT") == 1


def test_verify_allows_one_edit_where_the_interval_has_no_width(repository):
    def at_top(table, value):
        table.loc[table["metric"] == "locality", ["value", "lo", "hi"]] = [value, 100.0, 100.0]
        return table

    committed = at_top(pd.read_csv(repository / verify.TABLE), 100.0)
    within = verify.compare(committed, at_top(committed.copy(), 99.5)).set_index("metric")["within"]
    assert within["locality"].all()  # 200 edits: one is half a per cent
    within = verify.compare(committed, at_top(committed.copy(), 99.4)).set_index("metric")["within"]
    assert not within["locality"].any()


def test_verify_reports_a_number_that_is_gone(repository):
    path = repository / verify.TABLE
    table = pd.read_csv(path)
    table[table["method"] != "MSCKE"].to_csv(path, index=False)
    assert verify.verify(repository) == 1


def test_verify_names_the_tables_that_are_not_as_committed(repository, capsys):
    folder = repository / "figures" / "tables"
    for name in ("transfer", "cost"):
        (folder / f"{name}.csv").write_text("ms\n1\n")
    git(repository, "add", "-A")
    git(repository, "commit", "-qm", "more tables")
    assert verify.other_tables(repository).startswith("2 of 2 tables") and verify.verify(repository) == 0
    for name in ("transfer", "cost", "new"):  # timings differ, and what was never committed is no table of ours
        (folder / f"{name}.csv").write_text("ms\n2\n")
    told = verify.other_tables(repository).splitlines()
    assert told[0].startswith("1 of 2 tables without timings are byte for byte as committed")
    assert told[1:] == ["  transfer: row 0 (), ms: 1 committed, 2 regenerated, 1 apart"]
    assert verify.verify(repository) == 0 and "transfer: row 0" in capsys.readouterr().out


OLD = pd.DataFrame({"method": ["a", "b", "c"], "value": [1.0, 2.0, np.nan], "n": [5, 6, 7]})


@pytest.mark.parametrize(
    "new, told",
    [
        (
            OLD.assign(value=[1.0, 2.5, np.nan], n=[5, 6, 7]),
            "row 1 (b), value: 2 committed, 2.5 regenerated, 0.5 apart",
        ),
        (OLD.assign(value=[1.1, 2.0, np.nan], n=[5, 6, 9]), "row 2 (c), n: 7 committed, 9 regenerated, 2 apart"),
        (OLD.assign(value=[1.0, 2.0, 3.0]), "row 2 (c), value: nan committed, 3 regenerated, inf apart"),
        (OLD.assign(method=["a", "x", "c"]), "row 1, method: b committed, x regenerated"),
        (OLD.iloc[:2], "3 rows of ['method', 'value', 'n'] committed, 2 of ['method', 'value', 'n'] regenerated"),
        (OLD.rename(columns={"n": "edits"}), "regenerated"),
        (OLD.assign(value=["1.00", "2.0", None]), "the same numbers, written otherwise"),
    ],
)
def test_verify_names_the_largest_difference_of_a_table(repository, new, told):
    path = repository / "figures" / "tables" / "some.csv"
    OLD.to_csv(path, index=False)
    git(repository, "add", "-A")
    git(repository, "commit", "-qm", "a table")
    new.to_csv(path, index=False)
    assert verify.largest_difference(repository, "some").endswith(told)
    assert f"some: {verify.largest_difference(repository, 'some')}" in verify.other_tables(repository)


def test_verify_says_what_it_lacks(repository, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert verify.verify(repository) == 0
    assert "git is not installed" in capsys.readouterr().out
    monkeypatch.undo()

    git(repository, "rm", "-q", "--cached", verify.TABLE)
    git(repository, "commit", "-qm", "without it")
    assert verify.verify(repository) == 0
    assert "No committed figures/tables/main_results.csv" in capsys.readouterr().out

    (repository / verify.TABLE).unlink()
    assert verify.verify(repository) == 1
    assert "03_main_results" in capsys.readouterr().out
