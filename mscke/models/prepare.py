"""A track's models made ready before a notebook needs them: ``python -m mscke.models.prepare [--track T]``

MiniGPT-4 is composed of its fetched parts, so that what is missing or does not fit shows now and not hours later.
``--device`` says instead where the track would compute. The exit status is 1 if it cannot.
"""

from __future__ import annotations

import argparse
import sys

from mscke.config import Track, get_track
from mscke.fetching.lock import FetchError
from mscke.models.sources import device_of, find


def prepare(track: Track) -> dict[str, str]:
    """The folder of each of the track's models that is composed. Raises what :func:`find` raises."""
    composed = [source for source in track.backbones.values() if source.startswith("minigpt4:")]
    return {source: find(track, source) for source in composed}


def main(arguments: list[str] | None = None) -> int:
    """Make a track's models ready, or say where it computes; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mscke.models.prepare", description=main.__doc__)
    parser.add_argument("--track", default="paper", help="the track that needs them")
    parser.add_argument("--device", action="store_true", help="say where the track computes, and make nothing")
    options = parser.parse_args(arguments)
    track = get_track(options.track)
    try:
        if options.device:
            print(f"{track.name} computes on {device_of(track)}")
            return 0
        for source, folder in prepare(track).items():
            print(f"{source}: {folder}")
    except (FetchError, RuntimeError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
