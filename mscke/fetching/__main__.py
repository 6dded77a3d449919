"""Bring the paper track's data and models here: ``python -m mscke.fetching`` (``make paper-data``)."""

from __future__ import annotations

import argparse
import sys

from mscke.benchmark.sample import RecordError
from mscke.config import get_track
from mscke.fetching.lock import FetchError
from mscke.fetching.store import open_store


def main(arguments: list[str] | None = None) -> int:
    """Fetch everything; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mscke.fetching", description=main.__doc__)
    parser.add_argument("--data", help="local folder with FGVEdit's JSON files, train2014/, val2014/ or their zips")
    parser.add_argument("--models", help="local folder with model folders, named as on the hub")
    parser.add_argument("--track", default="paper", help="the track that needs it")
    options = parser.parse_args(arguments)
    track = get_track(options.track)
    try:
        store = open_store(options.data, options.models, track)
        loaded = store.benchmark(track.sizes)
        print("FGVEdit and its images:", store.folder)
        for split, found in loaded.items():
            for note in found.notes:
                print(f"  {split}: {note}")
        for repo in sorted(track.fetches):
            print(f"{repo}:", store.model(repo))
        if any(source.startswith("minigpt4:") for source in track.backbones.values()):
            print("MiniGPT-4's projection:", store.minigpt4())
    except (FetchError, RecordError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"The lock is {store.lock.path}: commit it to fetch the same bytes again.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
