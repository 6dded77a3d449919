"""Is everything here that the paper track needs? ``python -m mscke.report.paper_check [--data D] [--models M]``

Says in plain words what is here and what is missing, with sizes as the local files have them, and holds
what is here to the lock file. It only reads. The exit status is 1 if anything is missing or not as locked.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from huggingface_hub import constants
from transformers import AutoConfig

from mscke.benchmark import coco, hub
from mscke.benchmark.fetch import FGVEDIT, MINIGPT4, SIZES, Store, open_store
from mscke.benchmark.lock import FetchError
from mscke.benchmark.sample import RecordError
from mscke.config import Track, get_track
from mscke.models.compose import combine_configs, memory_needed
from mscke.report.dry_run import CONTEXT
from mscke.report.paper import reported_cost

DRIVER = 580  # NVIDIA's, for the CUDA that the locked PyTorch is built for
LEAST = {"bitsandbytes": (0, 46, 1)}  # below it transformers refuses
PEAKS = {"BLIP-2 OPT": 14.8e9, "MiniGPT-4": 27.0e9}  # bytes on a GPU, beside both CLIPs: figures/paper_dry.md
BLIP2, EYES, VICUNA = "Salesforce/blip2-opt-2.7b", "Salesforce/blip2-flan-t5-xxl", "Vision-CAIR/vicuna-7b"


@dataclass(frozen=True)
class Finding:
    """One thing that is needed, whether it is here, and what there is to say of it."""

    name: str
    here: bool
    detail: str


def check(store: Store, track: Track, sizes: dict[str, int] = SIZES) -> list[Finding]:
    """Everything that ``track`` needs, looked for in ``store``: one that is offline and frozen."""
    models = [
        look(repo, lambda repo=repo: _size(hub.model_files(store.model(repo), hub.MODELS[repo]).values()))
        for repo in hub.MODELS
        if repo in track.fetches
    ]
    minigpt4 = [
        look("MiniGPT-4's 7B checkpoint", lambda: f"{_size([store.minigpt4()])}; from {MINIGPT4}"),
        look("packages that read Vicuna's tokenizer", lambda: _packages("sentencepiece", "protobuf")),
    ]
    rounded = [look("a package for 8 bits", lambda: _packages("bitsandbytes"))]
    return [
        look(
            f"{FGVEDIT}: {sizes['train']:,} + {sizes['test']:,} records", lambda: _annotations(store, sizes)
        ),
        look("COCO 2014 images that FGVEdit names", lambda: _images(store, sizes)),
        *models,
        *(minigpt4 if EYES in track.fetches else []),
        *(rounded if track.eight_bit else []),
        look("a GPU", lambda: _gpu(track)),
    ]


def look(name: str, find: Callable[[], str]) -> Finding:
    """What ``find`` says of the thing called ``name``, or why it is not usable."""
    try:
        return Finding(name, True, find())
    except (FetchError, RecordError, OSError) as error:
        return Finding(name, False, str(error))


def needs(store: Store, track: Track, sizes: dict[str, int] = SIZES) -> list[str]:
    """GPU memory, disk and time, each a line, and each as far as it can be known here."""
    parts = reported_cost().set_index("part")
    query = parts["milliseconds"].drop("counterfactual model").sum() / 1000  # the dearer of the two answers
    minutes = 5 * sizes["test"] * query / 60
    theirs = ", ".join(f"{part} {memory:.2f} G" for part, memory in parts["memory"].items())
    configs = {
        "BLIP-2 OPT": lambda: AutoConfig.from_pretrained(store.model(BLIP2)),
        "MiniGPT-4": lambda: combine_configs(store.model(EYES), store.model(VICUNA)),
    }
    return [
        *(
            f"GPU memory, {name}: {_memory(configs[name])}; at its peak, beside both CLIPs, {_bytes(PEAKS[name])} "
            "in the dry run (figures/paper_dry.md)"
            for name in track.backbones
        ),
        f"GPU memory, as the paper reports it: {theirs}",
        *(
            f"disk, for {what}: {_bytes(_free(folder))} free at {folder}; {advice}"
            for what, folder, advice in (
                (
                    "the images, what is composed and computed",
                    store.folder,
                    "allow 60 GB; outputs/ may be a link",
                ),
                (
                    "the models as published",
                    Path(constants.HF_HUB_CACHE),
                    "they take 41 GB where MODELS= has none; HF_HOME= moves them",
                ),
            )
        ),
        f"time: {minutes:.0f} minutes to evaluate MSCKE once on the test split, by the paper's milliseconds a query; "
        "for the hours that all of it takes here, make paper-dry",
    ]


def _free(folder: Path) -> int:
    here = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(here).free


def _packages(*names: str) -> str:
    """The releases of these packages; FetchError with what to install if one lacks, or is older than is needed."""
    found, lacking = {}, []
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            lacking.append(f"{name} is not installed")
            continue
        if tuple(map(int, re.findall(r"\d+", found[name])[:3])) < LEAST.get(name, ()):
            lacking.append(f"{name} {found[name]} is older than {'.'.join(map(str, LEAST[name]))}")
    if lacking:
        raise FetchError(f"{'; '.join(lacking)}: pip install -e '.[paper]'")
    return ", ".join(f"{name} {release}" for name, release in found.items())


def _annotations(store: Store, sizes: dict[str, int]) -> str:
    found = store.annotations(sizes)
    return f"{_size(found.values())} in {found['train'].parent}"


def _images(store: Store, sizes: dict[str, int]) -> str:
    try:
        names = store.named(store.annotations(sizes).values())
    except FetchError:
        raise FetchError("which they are is known once FGVEdit's files are here") from None
    if lacking := coco.absent(names, store.folder, store.data):
        raise FetchError(
            f"{len(lacking):,} of {len(names):,} are not here, {lacking[0]} the first; make paper-data fetches "
            "them, or give DATA= a folder that has them"
        )
    unpacked = [path for name in names if (path := store.folder / name).is_file()]
    store.lock.verify(coco.SOURCE, {str(path.relative_to(store.folder)): path for path in unpacked})
    return f"{len(names):,}, {len(unpacked):,} of them in place ({_size(unpacked)})"


def _gpu(track: Track) -> str:
    """The card and its memory; FetchError if PyTorch sees none, or it is too small for a backbone of the track."""
    if not torch.cuda.is_available():
        raise FetchError(f"PyTorch sees no CUDA device{_driver()}")
    card, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    needed = max(PEAKS[name] for name in track.backbones) + CONTEXT
    if memory < needed and not track.eight_bit:
        raise FetchError(
            f"{card} has {_bytes(memory)}, and {_bytes(needed)} are needed: take a larger one, PRESET=blip2, or "
            "MSCKE_8BIT=1"
        )
    return f"{card}, {_bytes(memory)}"


def _driver() -> str:
    """What NVIDIA's driver says of why; nothing where there is none."""
    if (program := shutil.which("nvidia-smi")) is None:
        return "; nvidia-smi is not there either: install NVIDIA's driver"
    asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    told = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
    if not told:
        return "; nvidia-smi names no card"
    old = int(told[0].split(".")[0]) < DRIVER
    return f"; the driver is {told[0]}" + (f", and CUDA 13 needs {DRIVER} or later: renew it" if old else "")


def _memory(config: Callable) -> str:
    """What the model's weights take in bfloat16, if its configuration is here to compute it from."""
    try:
        return f"{_bytes(memory_needed(config(), torch.bfloat16))} of weights in bfloat16, activations on top"
    except (FetchError, OSError, ValueError):
        return "unknown until the model's files are here"


def _size(paths: Iterable[Path]) -> str:
    return _bytes(sum(path.stat().st_size for path in paths))


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def main(arguments: list[str] | None = None) -> int:
    """Print what is here, what is missing and what is needed; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mscke.report.paper_check", description=main.__doc__)
    parser.add_argument(
        "--data", help="local folder with FGVEdit's JSON files, train2014/, val2014/ or their zips"
    )
    parser.add_argument("--models", help="local folder with model folders, named as on the hub")
    parser.add_argument("--track", default="paper", help="paper, or paper-blip2")
    options = parser.parse_args(arguments)
    track = get_track(options.track)
    try:
        store = open_store(options.data, options.models, online=False, frozen=True)
    except FetchError as error:
        print(error)
        return 1
    found = check(store, track)
    for finding in found:
        print(f"{'here   ' if finding.here else 'MISSING'}  {finding.name}\n         {finding.detail}")
    print("", *needs(store, track), sep="\n")
    missing = sum(not finding.here for finding in found)
    print(f"\n{missing} of {len(found)} things are missing: make paper-data fetches data and models." if missing
          else "\nEverything is here.")  # fmt: skip
    return int(missing > 0)


if __name__ == "__main__":
    sys.exit(main())
