"""The shape of the house: imports run one way, the method stays short, nothing unsafe is loaded."""

import ast
import importlib.util
import json
import re
import subprocess
from pathlib import Path

import pytest

from mscke.config import ROOT

PACKAGE = ROOT / "mscke"
MODULES = sorted(PACKAGE.rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TRACKED = subprocess.run(["git", "-C", ROOT, "ls-files", "notebooks"], capture_output=True, text=True).stdout
COMMITTED = [n for n in NOTEBOOKS if n.name in TRACKED] if TRACKED else NOTEBOOKS
FLOORS = (
    "config", "system", "benchmark", "construction", "fetching", "models", "pretraining",
    ("storage", "classifier", "memory", "router"),  # the method, and what its memory stands on
    "training", "editors", "evaluation", "cost", "report",
)  # fmt: skip
LAYER = {name: depth for depth, names in enumerate(FLOORS) for name in ([names] if isinstance(names, str) else names)}


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """The package's own modules that ``path`` imports, wherever in the file it does so."""
    names, known = set(), {dotted(p) for p in MODULES}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write it from the package's root"
            found = {f"{node.module}.{alias.name}" for alias in node.names} & known
            names |= found or {node.module}
    return {name for name in names if name.split(".")[0] == "mscke"}


def layer(module: str) -> int:
    parts = module.split(".")
    return LAYER[parts[1]] if len(parts) > 1 else -1


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_run_one_way(path):
    if path == PACKAGE / "__init__.py":
        return  # the package's front door may name anything
    for other in imports(path):
        assert layer(other) <= layer(dotted(path)), f"{dotted(path)} imports {other}, which stands above it"


def test_no_import_circles():
    graph = {dotted(p): imports(p) - {dotted(p)} for p in MODULES}
    done, open_ = set(), []

    def visit(module):
        assert module not in open_, " → ".join([*open_, module])
        if module not in done:
            open_.append(module)
            for other in sorted(graph.get(module, ())):
                visit(other)
            done.add(open_.pop())

    for module in sorted(graph):
        visit(module)


def test_three_files_at_the_door():
    assert {p.stem for p in PACKAGE.glob("*.py")} == {"__init__", "classifier", "config", "memory", "router"}
    assert {p.parts[-2] for p in PACKAGE.glob("*/*.py")} == set(LAYER) - {"classifier", "config", "memory", "router"}


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_no_file_is_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 250


@pytest.mark.parametrize("name", ["classifier", "memory", "router"])
def test_the_method_is_short(name):
    assert len((PACKAGE / f"{name}.py").read_text().splitlines()) < 200


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_nothing_unsafe_is_loaded(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            assert not {"pickle", "dill", "joblib"} & set(names), f"{path}:{node.lineno}"
        if not isinstance(node, ast.Call):
            continue
        given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        where, name = f"{path}:{node.lineno}", ast.unparse(node.func)
        assert given.get("trust_remote_code", False) is False, where
        if name == "torch.load":
            assert given.get("weights_only") is True, where
        if name.endswith((".read_pickle", ".load")) and "allow_pickle" in given:
            assert given["allow_pickle"] is False, where
        assert name not in ("eval", "exec", "os.system", "pd.read_pickle"), where


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_texts_are_read_and_written_in_utf_8_whatever_the_locale(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {k.arg for k in node.keywords}
        binary = any(isinstance(a, ast.Constant) and "b" in str(a.value) for a in node.args[1:2])
        if name == "open" and not any("b" in ast.unparse(a) for a in node.args[1:2]) and not binary:
            assert "encoding" in given, f"{path}:{node.lineno}"
        if name.endswith((".read_text", ".write_text")):
            assert "encoding" in given, f"{path}:{node.lineno}"


def cells(path):
    return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_take_literal_parameters(path):
    tagged = [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1, "papermill needs one cell tagged `parameters`"
    body = ast.parse("".join(tagged[0]["source"])).body
    assert body
    for node in body:
        assert isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name), ast.unparse(node)
        ast.literal_eval(node.value)  # injected parameters come after this cell: derive nothing in it


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_read_in_small_pieces(path):
    sources = ["".join(c["source"]) for c in cells(path)]
    assert len(sources[1].splitlines()) <= 15, "of imports: import modules, or move work into the package"
    for source in sources:
        assert len(source.splitlines()) <= 25, source
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 12, node.name
        top = [n for n in ast.parse(source).body if isinstance(n, ast.Import | ast.ImportFrom)]
        assert not top or source == sources[1], "imports stand in one cell, the first after the parameters"


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: p.stem)
def test_committed_notebooks_are_light(path):
    assert path.stat().st_size <= 300_000


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: p.stem)
def test_committed_notebooks_are_executed_in_order(path):
    counts = [c["execution_count"] for c in cells(path)]
    assert counts == list(range(1, len(counts) + 1)), "run it: nbval compares no cell without a count"
    assert json.loads(path.read_text(encoding="utf-8"))["metadata"]["kernelspec"]["name"] == "python3"
    for cell in cells(path):
        assert not [o for o in cell["outputs"] if o["output_type"] == "error"]
        if "nbval-check-output" in cell["metadata"].get("tags", []):
            assert cell["outputs"], "a check of no output checks nothing"


# ------------------------------------------------------------------- nothing that is checked was timed

TIMING = {"in_turns", "latency", "side_by_side", "measured", "peak_memory", "paper_seconds", "whole_seconds", "compare"}
TIMING |= {"perf_counter", "monotonic", "process_time", "time", "timeit"}


def names(node) -> set[str]:
    """Names that an expression reads, and the attributes that it calls."""
    called = {n.func.attr for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)}
    return called | {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def timed_checks(tree: ast.AST) -> list[str]:
    """The assertions of a notebook or test that depend on what was timed, through however many names."""
    timed, before = set(TIMING), None
    while timed != before:
        before = set(timed)
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and names(node.value) & timed:
                timed |= {n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("test_") and names(node) & timed:
                timed.add(node.name)
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and "assert_" in ast.unparse(n.func)]
    checks = [*(n for n in ast.walk(tree) if isinstance(n, ast.Assert)), *calls]
    return [ast.unparse(check) for check in checks if names(check) & timed]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_notebook_checks_what_it_timed(path):
    code = "\n".join("".join(c["source"]) for c in cells(path))
    assert not timed_checks(ast.parse(code.replace("%matplotlib", "#")))


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.glob("*.py")), ids=lambda p: p.stem)
def test_no_test_reads_a_clock_to_check_by_it(path):
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(function, ast.FunctionDef) and function.name.startswith("test_"):
            read = {ast.unparse(n.func) for n in ast.walk(function) if isinstance(n, ast.Call)}
            assert not read & {"time.perf_counter", "time.monotonic", "time.time", "time.process_time"}, function.name


def test_what_was_timed_is_found_through_names_and_functions():
    code = """
def both():
    return latency(parts)
table = both()
fast = table[table.ms < 3]
assert len(fast) > 1
work = flops(call)
assert work < 3
"""
    assert timed_checks(ast.parse(code)) == ["assert len(fast) > 1"]


# ------------------------------------------------------------------------------------- the front door


def test_the_front_door_opens():
    import mscke

    assert {getattr(mscke, name).__name__ for name in mscke.__all__} == set(mscke.__all__)


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted(PACKAGE.glob("*/README.md"))], ids=lambda p: p.parent.name
)
def test_what_a_page_names_is_there(page):
    """Its links lead somewhere, its examples compile, and what they import exists."""
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link
    for module in re.findall(r"-m (mscke[\w.]*)", text):
        assert importlib.util.find_spec(module), module
    for code in re.findall(r"```python\n(.*?)```", text, re.S):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
