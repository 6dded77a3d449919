"""Is everything here that the paper track needs? ``python -m mscke.report.paper_check [--track T] [--data D] [--models M]``

Says in plain words what is here and what is missing, with sizes as the local files have them, holds what is
here to the lock file, and looks at the machine. It only reads. The exit status is 1 if anything is missing, not as
locked, or will not do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub.constants as constants
import torch
from transformers import AutoConfig

from mscke.benchmark.sample import RecordError
from mscke.config import Track, get_track
from mscke.fetching import coco, hub
from mscke.fetching.lock import FetchError
from mscke.fetching.machine import Room, by_disk, disk, gpu, package, shown
from mscke.fetching.store import DRIVE, FGVEDIT, SPACE, Store, open_store
from mscke.models.compose import combine_configs, memory_needed
from mscke.report.paper import reported_cost

PICTURE = 0.165e6  # bytes of one of COCO's, about
COMPOSED = 17.9e9  # MiniGPT-4: vision tower and Q-Former in float32, Vicuna in float16
COMPUTED = 20e9  # features and trained weights of a track, at most, by our count
PEAKS = {"BLIP-2 OPT": 14.8e9, "MiniGPT-4": 27.0e9}  # bytes on a GPU, beside both CLIPs: figures/paper_dry.md


@dataclass(frozen=True)
class Finding:
    """One thing that is needed, whether it is here, and what there is to say of it."""

    name: str
    here: bool
    detail: str


def check(store: Store, track: Track) -> list[Finding]:
    """Everything that ``track`` needs, looked for in ``store``: one that is offline and frozen."""
    sizes = track.sizes
    files = [
        look(f"{FGVEDIT}: {sizes['train']:,} + {sizes['test']:,} records", lambda: _annotations(store, sizes)),
        look("COCO 2014 images that FGVEdit names", lambda: _images(store, sizes)),
    ]
    models = {
        repo: look(repo, lambda repo=repo: _size(hub.model_files(store.model(repo), hub.MODELS[repo]).values()))
        for repo in sorted(track.fetches)
    }
    files += models.values()
    if _composed(track):
        where = f"from the hub's space {SPACE} or {DRIVE}"
        files.append(look("MiniGPT-4's 7B checkpoint", lambda: f"{_size([store.minigpt4()])}; {where}"))
    extras = [look(f"{name}, for {what}", lambda r=name: package(r)) for name, what in _extras(store, track)]
    absent = [repo for repo, found in models.items() if not found.here]
    rooms = by_disk(_rooms(store, track, absent))
    disks = [
        look(" and ".join(f"disk for {room.what}" for room in those), lambda those=those: disk(those))
        for those in rooms
    ]
    return [*files, *extras, *disks, look("a GPU", lambda: gpu(track))]


def look(name: str, find: Callable[[], str]) -> Finding:
    """What ``find`` says of the thing called ``name``, or why it is not usable."""
    try:
        return Finding(name, True, find())
    except (FetchError, RecordError, OSError) as error:
        return Finding(name, False, str(error))


def needs(store: Store, track: Track) -> list[str]:
    """GPU memory and time, each a line, and each as far as it can be known here."""
    parts = reported_cost().set_index("part")
    query = parts["milliseconds"].drop("counterfactual model").sum() / 1000  # the dearer of the two answers
    minutes = 5 * track.n_test * query / 60
    theirs = ", ".join(f"{part} {memory:.2f} G" for part, memory in parts["memory"].items())
    return [
        *(
            f"GPU memory, {name}: {_memory(store, source)}; at its peak, beside both CLIPs, {shown(PEAKS[name])} in "
            "the dry run (figures/paper_dry.md)"
            for name, source in track.backbones.items()
        ),
        f"GPU memory, as the paper reports it: {theirs}",
        f"time: {minutes:.0f} minutes to evaluate MSCKE once on the test split, by the paper's milliseconds a query; "
        "for the hours that all of it takes here, make paper-dry",
    ]


def _composed(track: Track) -> str:
    """The parts of MiniGPT-4, "<BLIP-2>+<Vicuna>", or "" where the track goes without."""
    found = [source for source in track.backbones.values() if source.startswith("minigpt4:")]
    return found[0].removeprefix("minigpt4:") if found else ""


def _extras(store: Store, track: Track) -> list[tuple[str, str]]:
    """Packages beside the lock's that this track needs, and what for."""
    found = [("bitsandbytes>=0.46.1", "MSCKE_8BIT=1")] if track.eight_bit else []
    if (parts := _composed(track)) and not (track.models / "minigpt4").exists():
        try:
            plain = (store.model(parts.split("+")[1]) / "tokenizer.json").is_file()
        except FetchError:
            plain = False  # as it is published
        if not plain:
            what = "Vicuna's tokenizer, which comes as tokenizer.model"
            found += [("sentencepiece>=0.2", what), ("protobuf>=5", what)]
    return found


def _rooms(store: Store, track: Track, absent: Iterable[str]) -> list[Room]:
    """What is still to come to the hub's cache and to outputs/; ``absent``: models that are not here."""
    try:
        needed = store.named(store.annotations(track.sizes).values())
        pictures = len(coco.absent(needed, store.folder, None))
    except (FetchError, RecordError):
        pictures = sum(track.sizes.values())
    kept = sum(p.stat().st_size for p in track.outputs.rglob("*") if p.is_file() and not p.is_symlink())
    composed = COMPOSED if _composed(track) and not (track.models / "minigpt4").exists() else 0
    return [
        Room(
            "models as published", Path(constants.HF_HUB_CACHE), sum(hub.MODELS[repo].size for repo in absent),
            "Set HF_HOME to a folder on a disk with room, or give MODELS= a folder that has them",
        ),
        Room(
            "images, features and what is composed and trained", store.folder,
            pictures * PICTURE + composed + max(0, COMPUTED - kept),
            "make outputs/ a link to a folder on a disk with room",
        ),
    ]  # fmt: skip


def _annotations(store: Store, sizes: dict[str, int]) -> str:
    found = store.annotations(sizes)
    notes = [f"{split}: {note}" for split in found for note in store.read(found[split], check_images=False).notes]
    return "\n         ".join([f"{_size(found.values())} in {found['train'].parent}", *notes])


def _images(store: Store, sizes: dict[str, int]) -> str:
    try:
        needed = store.named(store.annotations(sizes).values())
    except FetchError:
        raise FetchError("which they are is known once FGVEdit's files are here") from None
    if lacking := coco.absent(needed, store.folder, store.data):
        raise FetchError(
            f"{len(lacking):,} of {len(needed):,} are not here, {lacking[0]} the first; make paper-data fetches "
            f"them one by one (about {shown(len(lacking) * PICTURE)}), or give DATA= a folder with them"
        )
    unpacked = [path for name in needed if (path := store.folder / name).is_file()]
    store.lock.verify(coco.SOURCE, {str(path.relative_to(store.folder)): path for path in unpacked})
    return f"{len(needed):,}, {len(unpacked):,} of them in place ({_size(unpacked)})"


def _memory(store: Store, source: str) -> str:
    """What the model's weights take in bfloat16, if its configuration is here to compute it from."""
    kind, _, what = source.partition(":")
    try:
        folders = [store.model(repo) for repo in what.split("+")]
        config = combine_configs(*folders) if kind == "minigpt4" else AutoConfig.from_pretrained(folders[0])
        return f"{shown(memory_needed(config, torch.bfloat16))} of weights in bfloat16"
    except (FetchError, OSError, ValueError):
        return "unknown until the model's files are here"


def _size(paths: Iterable[Path]) -> str:
    return shown(sum(path.stat().st_size for path in paths))


def main(arguments: list[str] | None = None) -> int:
    """Print what is here, what is missing and what is needed; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mscke.report.paper_check", description=main.__doc__)
    parser.add_argument("--data", help="local folder with FGVEdit's JSON files, train2014/, val2014/ or their zips")
    parser.add_argument("--models", help="local folder with model folders, named as on the hub")
    parser.add_argument("--track", default="paper", help="paper, or paper-blip2")
    options = parser.parse_args(arguments)
    track = get_track(options.track)
    if track.tiny or not track.fetched:
        print(f"The track {track.name} makes all that it needs itself, and takes any machine.")
        return 0
    try:
        store = open_store(options.data, options.models, track, online=False, frozen=True)
    except FetchError as error:
        print(error)
        return 1
    found = check(store, track)
    for finding in found:
        print(f"{'here   ' if finding.here else 'MISSING'}  {finding.name}\n         {finding.detail}")
    print("", *needs(store, track), sep="\n")
    missing = sum(not finding.here for finding in found)
    print(f"\n{missing} of {len(found)} things are missing or will not do: make paper-data fetches data and models, "
          "and beside each other one stands what to do." if missing else "\nEverything is here.")  # fmt: skip
    return int(missing > 0)


if __name__ == "__main__":
    sys.exit(main())
