"""The table of what is frozen: computed once, for all processes, and never stale."""

import multiprocessing
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from mscke.models.features import FeatureTable, ImageTable


@pytest.fixture
def asked():
    """Every key that was computed."""
    return []


@pytest.fixture
def make(asked):
    def compute(keys):
        asked.extend(keys)
        return torch.tensor([[float(len(key))] for key in keys]), torch.tensor(
            [[float(ord(key[-1])), 1] for key in keys]
        )

    return lambda path=None, kind=FeatureTable, **more: kind(compute, path, **more)


def values(table, keys):
    rows = table(keys)
    assert len(rows) == len(keys)
    assert table.columns[0][rows].flatten().tolist() == [len(key) for key in keys]
    assert table.columns[1][rows].tolist() == [[ord(key[-1]), 1] for key in keys]


def test_each_key_is_computed_once_and_has_its_own_row(make, asked):
    table = make(batch_size=2)
    values(table, ["abc", "d", "abc", "ef", "g"])
    values(table, ["g", "hij", "d"])
    assert sorted(asked) == ["abc", "d", "ef", "g", "hij"]


def test_it_outlives_its_process(make, asked, tmp_path):
    path = tmp_path / "a" / "table"
    values(make(path), ["abc", "d"])
    values(make(path), ["d", "abc"])
    assert len(asked) == 2 and [p.name for p in path.parent.iterdir()] == [path.name]


def test_what_another_process_has_written_since_is_read(make, asked, tmp_path):
    one, other = (make(tmp_path / "table") for _ in range(2))
    values(one, ["abc", "d"])
    values(other, ["d", "abc"])
    assert len(asked) == 2
    values(other, ["ef"])
    values(one, ["ef", "abc", "d"])
    assert len(asked) == 3


def test_a_row_is_written_once_and_stays(make, tmp_path):
    """Whatever is added later, no byte of it is written again."""
    table, before = make(tmp_path / "table", batch_size=2), {}
    for n in (1, 3, 8):
        values(table, [f"{i} " * (i + 1) for i in range(n)])
        now = {path.name: path.read_bytes() for path in sorted((tmp_path / "table").iterdir())}
        assert all(content.startswith(before.get(name, b"")) for name, content in now.items())
        assert [len(now[name]) for name in ("00.float32", "01.float32")] == [4 * n, 8 * n]
        before = now


@pytest.mark.parametrize("name", ["keys.jsonl", "00.float32", "01.float32"])
@pytest.mark.parametrize("cut", [1, 9, 30, None])
@pytest.mark.filterwarnings("ignore:.* is damaged and is made anew")
def test_what_was_cut_is_computed_again(make, tmp_path, name, cut):
    """By a kill while it was written, or a full disk: a reader sees whole rows alone, whoever has it open goes on."""
    path, keys = tmp_path / "table", ["abc", "d", "ef", "ghij"]
    open_before = make(path)
    values(open_before, keys)
    file = path / name
    content = file.read_bytes()[: -cut if cut else 0]
    file.unlink()
    file.write_bytes(content)
    for table in (make(path), open_before, make(path)):
        values(table, [*keys, "k"])


def test_a_row_without_its_line_is_none(make, asked, tmp_path):
    path = tmp_path / "table"
    values(make(path), ["abc"])
    with open(path / "00.float32", "ab") as rows, open(path / "keys.jsonl", "ab") as keys:
        rows.write(b"123456")
        keys.write(b'["d", ')
    values(make(path), ["abc", "d"])
    values(make(path), ["d", "abc"])
    assert asked == ["abc", "d"]


def slow(keys):
    time.sleep(0.01)
    with open(os.environ["ASKED"], "a", encoding="utf-8") as file:
        file.write("".join(f"{key}\n" for key in keys))
    return (torch.tensor([[float(key)] for key in keys]),)


def ask(path, keys):
    table = FeatureTable(slow, path, batch_size=5)
    rows = table(keys)
    return table.columns[0][rows].flatten().tolist()


def test_processes_share_the_work(tmp_path, monkeypatch):
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    keys = [str(i) for i in range(100)]
    orders = [random.Random(seed).sample(keys, 100) for seed in range(4)]
    with ProcessPoolExecutor(4, multiprocessing.get_context("fork")) as pool:
        found = list(pool.map(ask, [tmp_path / "table"] * 4, orders))
    assert found == [[float(key) for key in order] for order in orders]
    assert sorted((tmp_path / "asked").read_text().split()) == sorted(keys)  # each once


RESIDENT = """
import resource, sys, torch
from pathlib import Path
from mscke.models.features import FeatureTable
folder, n = Path(sys.argv[1]), int(sys.argv[2])
row = torch.arange(24 * 1024, dtype=torch.float16)
table = FeatureTable(lambda keys: (row.repeat(len(keys), 1) + len(keys),), folder, 64, torch.float16)
keys = [str(i) for i in range(n)]
rows = table(keys)
for some in rows[torch.randperm(n)].split(64):
    assert (table.columns[0][some] > 0).all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_the_memory_of_a_process_does_not_grow_with_the_table(tmp_path):
    """Megabytes at their peak, while it is made and read: 480 MB of rows, and 48."""
    peaks = [
        int(
            subprocess.run(
                [sys.executable, "-c", RESIDENT, tmp_path / str(n), str(n)], check=True, capture_output=True
            ).stdout
        )
        for n in (1_000, 10_000)
    ]
    assert peaks[1] - peaks[0] < 100


def test_an_image_that_was_written_anew_is_seen_anew(make, asked, tmp_path):
    images = [str(tmp_path / f"{name}.png") for name in "ab"]
    for image in images:
        with open(image, "w") as file:
            file.write("first")
    values(make(tmp_path / "table", ImageTable), images)
    with open(images[0], "w") as file:
        file.write("second")
    values(make(tmp_path / "table", ImageTable), images)
    assert asked == [*images, images[0]]


def test_half_precision_is_kept_where_it_is_asked_for(make, tmp_path):
    values(make(tmp_path / "table", dtype=torch.float16), ["abc"])
    again = make(tmp_path / "table", dtype=torch.float16)
    values(again, ["abc"])
    assert {column.dtype for column in again.columns} == {torch.float16}
