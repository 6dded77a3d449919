"""A track's models made ready before a notebook needs them: ``python -m mscke.models.prepare [--track T]``

MiniGPT-4 is composed of its fetched parts, so that what is missing or does not fit shows now and not hours later.
"""

from __future__ import annotations

import argparse
import sys

from mscke.config import get_track
from mscke.fetching.lock import FetchError
from mscke.models.sources import device_of, find


def main(arguments: list[str] | None = None) -> int:
    """Make a track's models ready, or say where it computes; the exit status, 1 if it cannot."""
    parser = argparse.ArgumentParser(prog="python -m mscke.models.prepare", description=main.__doc__)
    parser.add_argument("--track", default="paper", help="the track that needs them")
    parser.add_argument("--device", action="store_true", help="say where the track computes, and make nothing")
    options = parser.parse_args(arguments)
    track = get_track(options.track)
    try:
        if options.device:
            print(f"{track.name} computes on {device_of(track)}")
            return 0
        for source in track.backbones.values():
            if source.startswith("minigpt4:"):
                print(f"{source}: {find(track, source)}")
    except (FetchError, RuntimeError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
