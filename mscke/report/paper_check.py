"""Is everything here that the paper track needs? ``python -m mscke.report.paper_check [--data D] [--models M]``

Says in plain words what is here and what is missing, with sizes as the local files have them, and holds
what is here to the lock file. It only reads. The exit status is 1 if anything is missing or not as locked.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

from mscke.benchmark import coco, hub
from mscke.benchmark.fetch import FGVEDIT, MINIGPT4, SIZES, Store, open_store
from mscke.benchmark.lock import FetchError
from mscke.benchmark.sample import RecordError
from mscke.models.compose import combine_configs, memory_needed
from mscke.report.paper import reported_cost

BLIP2, EYES, VICUNA = "Salesforce/blip2-opt-2.7b", "Salesforce/blip2-flan-t5-xxl", "Vision-CAIR/vicuna-7b"


@dataclass(frozen=True)
class Finding:
    """One thing that is needed, whether it is here, and what there is to say of it."""

    name: str
    here: bool
    detail: str


def check(store: Store, sizes: dict[str, int] = SIZES) -> list[Finding]:
    """Everything that the paper track needs, looked for in ``store``: one that is offline and frozen."""
    models = [
        look(repo, lambda repo=repo: _size(hub.model_files(store.model(repo), hub.MODELS[repo]).values()))
        for repo in hub.MODELS
    ]
    return [
        look(
            f"{FGVEDIT}: {sizes['train']:,} + {sizes['test']:,} records", lambda: _annotations(store, sizes)
        ),
        look("COCO 2014 images that FGVEdit names", lambda: _images(store, sizes)),
        *models,
        look("MiniGPT-4's 7B checkpoint", lambda: f"{_size([store.minigpt4()])}; from {MINIGPT4}"),
        look("a GPU", _gpu),
    ]


def look(name: str, find: Callable[[], str]) -> Finding:
    """What ``find`` says of the thing called ``name``, or why it is not usable."""
    try:
        return Finding(name, True, find())
    except (FetchError, RecordError, OSError) as error:
        return Finding(name, False, str(error))


def needs(store: Store, sizes: dict[str, int] = SIZES) -> list[str]:
    """GPU memory, disk and time, each a line, and each as far as it can be known here."""
    parts = reported_cost().set_index("part")
    query = parts["milliseconds"].drop("counterfactual model").sum() / 1000  # the dearer of the two answers
    minutes = 5 * sizes["test"] * query / 60
    theirs = ", ".join(f"{part} {memory:.2f} G" for part, memory in parts["memory"].items())
    here = next(path for path in (store.folder, *store.folder.parents) if path.exists())
    return [
        f"GPU memory, BLIP-2 OPT: {_memory(lambda: AutoConfig.from_pretrained(store.model(BLIP2)))}",
        f"GPU memory, MiniGPT-4: {_memory(lambda: combine_configs(store.model(EYES), store.model(VICUNA)))}",
        f"GPU memory, as the paper reports it: {theirs}",
        f"disk: {_bytes(shutil.disk_usage(here).free)} free at {here}; a zip of COCO needs room until its images are out",
        f"time: {minutes:.0f} minutes to evaluate MSCKE once on the test split, by the paper's milliseconds a query; "
        "not measured by us, and training was timed by nobody",
    ]


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
            f"{' and '.join(sorted({Path(name).parts[0] for name in lacking}))}, or give DATA= a folder with them"
        )
    unpacked = [path for name in names if (path := store.folder / name).is_file()]
    store.lock.verify("COCO 2014", {str(path.relative_to(store.folder)): path for path in unpacked})
    return f"{len(names):,}, {len(unpacked):,} of them in place ({_size(unpacked)})"


def _gpu() -> str:
    if not torch.cuda.is_available():
        raise FetchError("PyTorch sees no CUDA device")
    return f"{torch.cuda.get_device_name()}, {_bytes(torch.cuda.get_device_properties(0).total_memory)}"


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
    options = parser.parse_args(arguments)
    try:
        store = open_store(options.data, options.models, online=False, frozen=True)
    except FetchError as error:
        print(error)
        return 1
    found = check(store)
    for finding in found:
        print(f"{'here   ' if finding.here else 'MISSING'}  {finding.name}\n         {finding.detail}")
    print("", *needs(store), sep="\n")
    missing = sum(not finding.here for finding in found)
    print(f"\n{missing} of {len(found)} things are missing: make paper-data fetches all but the GPU." if missing
          else "\nEverything is here.")  # fmt: skip
    return int(missing > 0)


if __name__ == "__main__":
    sys.exit(main())
