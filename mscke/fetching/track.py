"""A track's records: generated, or fetched."""

from __future__ import annotations

from dataclasses import dataclass

from mscke.benchmark.generate import generate
from mscke.benchmark.load import load_records, split_validation
from mscke.benchmark.sample import EditRecord
from mscke.config import Track
from mscke.fetching.store import open_store


@dataclass(frozen=True)
class Benchmark:
    """Records of one track. ``validation`` is cut from the train file, by image; ``test`` decides nothing.

    ``notes``: what of the files is not among them, or not as it stands there, a line each.
    """

    train: list[EditRecord]
    validation: list[EditRecord]
    test: list[EditRecord]
    notes: tuple[str, ...] = ()


loaded_once: dict[tuple, Benchmark] = {}


def load_benchmark(track: Track) -> Benchmark:
    """Generate or fetch the track's records unless they are there, check every one, and split; once a process.

    Of the published data, records with a bad field are left out and noted.

    Raises :class:`RecordError` for a record that cannot be used, and for data that are fetched
    :class:`mscke.fetching.lock.FetchError` when something is missing or not as locked.
    """
    of = (track.name, track.store, track.n_train, track.n_test, track.validation, track.seed)
    if of in loaded_once:
        return loaded_once[of]
    if track.fetched:
        loaded = open_store(track=track).benchmark(track.sizes)
    else:
        files = {split: generate(track.data, split, size, track.seed) for split, size in track.sizes.items()}
        loaded = {split: load_records(path, track.data) for split, path in files.items()}
    train, validation = split_validation(loaded["train"].records, track.validation, track.seed)
    notes = tuple(f"{split}: {note}" for split, found in loaded.items() for note in found.notes)
    loaded_once[of] = Benchmark(train, validation, loaded["test"].records, notes)
    return loaded_once[of]
