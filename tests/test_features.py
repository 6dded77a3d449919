"""The table of what is frozen: computed once, for all processes, and never stale."""

import os

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
    path = tmp_path / "a" / "table.safetensors"
    values(make(path), ["abc", "d"])
    values(make(path), ["d", "abc"])
    assert len(asked) == 2 and [p.name for p in path.parent.iterdir()] == [path.name]


def test_what_another_process_has_written_since_is_read(make, asked, tmp_path):
    one, other = (make(tmp_path / "table.safetensors") for _ in range(2))
    values(one, ["abc", "d"])
    values(other, ["d", "abc"])
    assert len(asked) == 2
    values(other, ["ef"])
    os.utime(tmp_path / "table.safetensors", ns=(1, 1))  # clocks are coarse: another version all the same
    values(one, ["ef", "abc", "d"])
    assert len(asked) == 3


def test_a_file_that_was_cut_is_made_anew(make, asked, tmp_path):
    path = tmp_path / "table.safetensors"
    values(make(path), ["abc", "d"])
    path.write_bytes(path.read_bytes()[:-4])
    values(make(path), ["abc", "d"])
    values(make(path), ["abc", "d"])
    assert len(asked) == 4


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
