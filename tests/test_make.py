"""make, as it is met: which Python it takes, in which folder it runs, and what lies in the environment."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mscke.config import ROOT

TARGETS = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
NOT_OURS = {name for name in os.environ if name.startswith(("MAKE", "MFLAGS", "PIP_", "PYTHON", "MSCKE", "GNUMAKE"))}


def make(folder, *arguments, **environment):
    """What make says and how it ends, in an environment without ours."""
    clean = {name: value for name, value in os.environ.items() if name not in NOT_OURS} | environment
    return subprocess.run(["make", "-C", folder, *arguments], env=clean, capture_output=True, text=True)


@pytest.fixture
def house(tmp_path):
    """A folder with a space in its name that holds the Makefile and what it looks for."""
    folder = tmp_path / "with space"
    (folder / "notebooks").mkdir(parents=True)
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    (folder / "mscke/editors").mkdir(parents=True)
    (folder / "mscke/editors/serac.py").touch()  # the one file that a rule names
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        (folder / "notebooks" / notebook.name).write_text("{}")
    return folder


@pytest.fixture
def fake(tmp_path):
    """A Python that writes down how it was called, when it began and when it ended, and what it was told of data."""
    path, log = tmp_path / "bin of mine" / "python", tmp_path / "log"
    path.parent.mkdir()
    path.write_text(f"""#!/bin/bash
printf 'begin %s|%s|%s|%s\\n' "$MSCKE_DATA" "$MSCKE_MODELS" "$MSCKE_FIGURES" "$*" >> '{log}'
for last; do :; done; case "$last" in *.ipynb) mkdir -p "$(dirname "$last")"; touch "$last";; esac
sleep 0.1
echo end >> '{log}'
""")
    path.chmod(0o755)
    log.touch()
    return path, log


# ------------------------------------------------------------------------------- which Python


def pythons() -> list[str]:
    """Interpreters of different versions from 3.11 on, that run here."""
    names = [f"python3.{minor}" for minor in range(11, 16)]
    there = [sys.executable, *filter(None, map(shutil.which, names))]
    there += map(str, sorted(Path.home().glob(".pyenv/versions/3.1[1-9]*/bin/python")))
    found = {}
    for python in there:
        asked = [python, "-c", "import ensurepip, sys; print(sys.version_info[:2])"]
        said = subprocess.run(asked, capture_output=True, text=True)
        if said.returncode == 0:
            found.setdefault(said.stdout.strip(), python)
    return list(found.values())


def wheel(folder: Path, name: str, tag: str) -> None:
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-{tag}.whl", "w") as file:
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n")
        file.writestr(f"{info}/RECORD", f"{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


BACKEND = """
import zipfile

def build_editable(folder, *_, **__):
    with zipfile.ZipFile(f"{folder}/house-1.0-py3-none-any.whl", "w") as file:
        file.writestr("house-1.0.dist-info/METADATA", "Metadata-Version: 2.1\\nName: house\\nVersion: 1.0\\n")
        file.writestr("house-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        file.writestr("house-1.0.dist-info/RECORD", "")
    return "house-1.0-py3-none-any.whl"
"""
PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "house"
version = "1.0"
"""


@pytest.mark.slow
def test_the_first_python_that_has_wheels_is_taken_under_two_versions(house, tmp_path):
    if len(found := pythons()) < 2:
        pytest.skip("needs two Pythons from 3.11 on: install another beside this one")
    links = tmp_path / "links"
    links.mkdir()
    wheel(links, "pure", "py3-none-any")
    (house / "backend.py").write_text(BACKEND)
    (house / "pyproject.toml").write_text(PROJECT)
    (house / "tiny.lock").write_text("pure==1.0\nbuilt==1.0 ; python_version > '3'\n")
    for here, other in (found[:2], found[1::-1]):
        version = subprocess.run(
            [here, "-c", "import sys; print('cp%d%d' % sys.version_info[:2])"], capture_output=True, text=True
        ).stdout.strip()
        for old in links.glob("built*"):
            old.unlink()
        wheel(links, "built", f"{version}-none-any")
        pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(links), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        settings = ["LOCK=tiny.lock", "BUILT=built pure", "env"]
        shutil.rmtree(house / ".venv", ignore_errors=True)
        done = make(house, f"BASE_PYTHON=python3.none {other} {here}", *settings, **pip)
        assert done.returncode == 0, done.stderr
        assert f"== .venv: by {here}" in done.stdout
        inside = [house / ".venv/bin/python", "-c", "import sys; print('cp%d%d' % sys.version_info[:2])"]
        assert subprocess.run(inside, capture_output=True, text=True).stdout.strip() == version
        listed = subprocess.run([inside[0], "-m", "pip", "list"], capture_output=True, text=True).stdout.split()
        assert {"pure", "built", "house"} <= set(listed)
        shutil.rmtree(house / ".venv")
        refused = make(house, f"BASE_PYTHON=python3.none {other}", *settings, **pip)
        assert refused.returncode != 0 and not (house / ".venv").exists()
        for part in ("python3.none: not there", "tiny.lock has no wheels for it here", "built", "Install Python 3.11"):
            assert part in refused.stderr


def test_without_a_python_make_says_what_to_install(house):
    old = house / "python-old"
    old.write_text("#!/bin/sh\necho 3.8.1\nexit 1\n")
    old.chmod(0o755)
    done = make(house, "BASE_PYTHON=python3.none ./python-old", "env")
    assert done.returncode != 0 and "Error 127" not in done.stderr
    for part in ("python3.none: not there", "./python-old: 3.8.1 is older than 3.11", "Install Python 3.11"):
        assert part in done.stderr


def test_an_environment_whose_python_is_gone_is_said_so(house):
    (house / ".venv/bin").mkdir(parents=True)
    (house / ".venv/bin/python").symlink_to("/nowhere/python3.11")
    done = make(house, "BASE_PYTHON=python3.none", "env")
    assert "its Python is gone or too old; it is made anew" in done.stdout and done.returncode != 0


# ------------------------------------------------------------------------------- where, and with what around it


@pytest.mark.parametrize("target", TARGETS)
def test_no_recipe_cuts_a_path_at_its_space(house, target):
    data = ["DATA=my coco", "MODELS=~/my models"] if target.startswith("paper") else []
    done = make(house, "-n", target, *data)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.replace("\\\n", " ").splitlines():
        for word in shlex.split(line, comments=True):
            assert not re.search(re.escape(str(house.parent)) + r"/with(?! space)", word), line


def test_a_folder_and_an_interpreter_with_spaces_are_used_whole(house, fake):
    python, log = fake
    assert make(house, f"PYTHON={python}", "reproduce").returncode == 0
    figures = [line.split("|")[2] for line in log.read_text().splitlines() if "--nbval" in line]
    assert figures == [f"{house}/outputs/mini/checked"]


def test_data_and_models_with_spaces_reach_the_track_whole(house, fake):
    python, log = fake
    make(house, f"PYTHON={python}", "DATA=my coco", "MODELS=~/my models", "paper-check", HOME="/home/some one")
    told = next(line for line in log.read_text().splitlines() if "paper_check" in line).removeprefix("begin ")
    assert told.split("|")[:2] == [f"{house}/my coco", "/home/some one/my models"]


@pytest.mark.parametrize("name", ["PYTHON", "PRESET", "DATA", "MODELS"])
def test_a_variable_that_lies_in_the_environment_is_not_taken(house, name, tmp_path):
    there = make(house, "-n", "paper", **{name: str(tmp_path / "some")})
    plain = make(house, "-n", "paper")
    assert there.returncode == 0 and there.stdout == plain.stdout
    assert f"{name} of the environment is not taken; say make {name}=… if it is meant" in there.stderr
    assert not plain.stderr


@pytest.mark.parametrize("target", ["smoke", "reproduce", "test"])
def test_one_notebook_after_the_other_whatever_j_says(house, fake, target):
    python, log = fake
    assert make(house, f"PYTHON={python}", target, MAKEFLAGS="-j4").returncode == 0
    marks = [line.split()[0] for line in log.read_text().splitlines()]
    assert len(marks) > 14 and marks == ["begin", "end"] * (len(marks) // 2)
