"""FGVEdit and FGVEdit-Scenes: records, and the scenes and programs that Scenes are made of."""

from __future__ import annotations

from dataclasses import dataclass

from mscke.benchmark.generate import generate
from mscke.benchmark.sample import Edit, EditRecord, Query, load_records, split_validation
from mscke.config import Track

__all__ = ["Benchmark", "Edit", "EditRecord", "Query", "load_benchmark", "load_records"]


@dataclass(frozen=True)
class Benchmark:
    """Records of one track. ``validation`` is cut from the train file, by image; ``test`` decides nothing."""

    train: list[EditRecord]
    validation: list[EditRecord]
    test: list[EditRecord]


def load_benchmark(track: Track) -> Benchmark:
    """Generate the track's records unless they are there, check every one, and split."""
    loaded = {
        split: load_records(generate(track.data, split, size, track.seed), track.data).records
        for split, size in (("train", track.n_train), ("test", track.n_test))
    }
    train, validation = split_validation(loaded["train"], track.validation, track.seed)
    return Benchmark(train, validation, loaded["test"])
