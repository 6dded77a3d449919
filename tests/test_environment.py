"""environment.yml, pyproject.toml, requirements.lock and the Makefile agree with one another."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
ON_PYPI = {"pytorch": "torch"}  # conda-forge's name → PyPI's, where they differ


def ranges(lines):
    """{package: version range} of requirement lines."""
    parsed = [Requirement(line) for line in lines]
    return {canonicalize_name(ON_PYPI.get(r.name, r.name)): r.specifier for r in parsed}


@pytest.fixture(scope="module")
def project():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return ranges(declared["dependencies"] + declared["optional-dependencies"]["dev"])


@pytest.fixture(scope="module")
def locked():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return ranges(line for line in lines if line and not line.startswith("#"))


def test_conda_and_pip_ask_for_the_same_ranges(project):
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [line for line in environment["dependencies"] if isinstance(line, str)]
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert "python=3.11" in conda
    assert ranges([line for line in conda if line not in ("python=3.11", "pip")] + pip) == project


def test_what_the_paper_track_adds_is_optional_and_named(locked):
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["paper"]
    assert not ranges(extra).keys() & locked.keys()
    for text in ("environment.yml", "mscke/fetching/README.md"):
        assert all(name in (ROOT / text).read_text() for name in ranges(extra)), text


def test_lock_pins_exact_releases(locked):
    for name, pin in locked.items():
        assert re.fullmatch(r"==[^,*]+", str(pin)), f"{name}{pin}"


def test_lock_satisfies_every_range(project, locked):
    assert project.keys() <= locked.keys()
    for name, allowed in project.items():
        (pin,) = locked[name]
        assert pin.version in allowed, f"{name} {pin.version} is outside {allowed}"


def test_make_help_lists_every_documented_target():
    documented = re.findall(r"^(\S+):.*## (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    listed = subprocess.run(["make", "help"], cwd=ROOT, env=clean, capture_output=True, text=True, check=True)
    shown = dict(re.findall(r"^ +make (\S+) +(.+)$", listed.stdout, re.MULTILINE))
    assert len(documented) >= 9
    assert shown == dict(documented)
