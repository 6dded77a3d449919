"""What the paper track is made of, brought here: FGVEdit, its COCO images, the models.

``python -m mscke.benchmark.fetch [--data D] [--models M]`` fetches all of it. Nothing is fetched that is
here already, that a local folder has, or when HF_HUB_OFFLINE=1; all of it is held to the lock file::

    store = open_store()                                    # MSCKE_DATA, MSCKE_MODELS: local folders
    records = store.benchmark()["test"].records             # images brought, all of it checked
    folder = store.model("Salesforce/blip2-opt-2.7b")       # what from_pretrained takes
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import is_offline_mode

from mscke.benchmark import coco, hub
from mscke.benchmark.download import download
from mscke.benchmark.generate import SIZES
from mscke.benchmark.load import LoadedRecords, load_records
from mscke.benchmark.lock import FetchError, Lock
from mscke.benchmark.sample import RecordError
from mscke.config import Track, get_track

FGVEDIT = "ZhenZeng/FGVEdit"
FILES = {"train": "train_data.json", "test": "test_data.json"}

# The 7B checkpoint lies in its authors' space on the hub, and where MiniGPT-4's README links to; they also spell it
# "prerained".
MINIGPT4_SPACE = "Vision-CAIR/minigpt4"
MINIGPT4 = "https://drive.google.com/uc?export=download&id=1RY9jV0dyqLX-o38LrumkKRh6Jtaop58R"
MINIGPT4_NAMES = ("pretrained_minigpt4_7b.pth", "prerained_minigpt4_7b.pth")


@dataclass(frozen=True)
class Store:
    """Where things lie and come from. ``data`` and ``models`` are local folders and only read.

    With ``online=False`` nothing is fetched. Every method raises :class:`FetchError` for what is missing,
    damaged, or not what the lock says, and leaves what was fetched before as it is.
    """

    folder: Path
    lock: Lock
    data: Path | None = None
    models: Path | None = None
    online: bool = True
    images: str = coco.IMAGES

    def benchmark(self, sizes: dict[str, int] = SIZES) -> dict[str, LoadedRecords]:
        """The records of each split, checked, counted and locked, with every image they name in ``folder``."""
        for path in self.annotations(sizes).values():
            if path.parent != self.folder:
                coco.place(path, self.folder / path.name)
        names = self.named(self.folder / name for name in FILES.values())
        coco.collect(names, self.folder, self.data, self.lock, self.images if self.online else None)
        # opens every image, so that none that is cut short is ever locked
        loaded = {
            split: load_records(self.folder / name, self.folder, pass_over=True)
            for split, name in FILES.items()
        }
        self.lock.check(coco.SOURCE, {name: self.folder / name for name in sorted(names)})
        return loaded

    def annotations(self, sizes: dict[str, int] = SIZES) -> dict[str, Path]:
        """The JSON file of each split where it lies now, read through, counted and locked."""
        source, revision = f"datasets/{FGVEDIT}", None
        folders = [folder for folder in (self.folder, self.data) if folder is not None]
        here = (folder for folder in folders if all((folder / name).is_file() for name in FILES.values()))
        if (folder := next(here, None)) is None:
            wanted = self.lock.revision(source) or "main"
            names = [*FILES.values(), *(f"**/{name}" for name in FILES.values())]
            folder = hub.snapshot(FGVEDIT, names, wanted, self.online, "dataset")
            revision, folder = folder.name, _together(folder)
        found = {split: folder / name for split, name in FILES.items()}
        for split, path in found.items():
            if not path.is_file():
                raise FetchError(
                    f"{FGVEDIT}: {folder} lacks {path.name}; fetch it, or give DATA= a folder with it"
                )
            _count(path, load_records(path, self.folder, check_images=False, pass_over=True), sizes[split])
        self.lock.check(source, {path.name: path for path in found.values()}, revision)
        return found

    def named(self, paths: Iterable[Path]) -> set[str]:
        """The images that the records of the JSON files ``paths`` name, relative to ``folder``."""
        root = os.path.realpath(self.folder)
        loaded = [load_records(path, root, check_images=False, pass_over=True).records for path in paths]
        return {os.path.relpath(record.edit.image, root) for records in loaded for record in records}

    def model(self, repo: str, parts: hub.Parts | None = None) -> Path:
        """The folder with the files of the hub's model ``repo``: below ``models``, else the hub's cache."""
        parts = parts or hub.MODELS.get(repo, hub.Parts())
        source, revision = f"models/{repo}", None
        local = [self.models / name for name in (repo, Path(repo).name)] if self.models is not None else []
        folder = next((path for path in local if path.is_dir()), None)
        if folder is None:
            folder = hub.fetch_model(repo, parts, self.lock.revision(source) or "main", self.online)
            revision = folder.name
        self.lock.check(source, hub.model_files(folder, parts), revision)
        return folder

    def minigpt4(self) -> Path:
        """MiniGPT-4's 7B checkpoint, a dict whose key ``model`` holds ``llama_proj``."""
        folders = [folder for folder in (self.models, self.folder / "downloads") if folder is not None]
        paths = [folder / name for folder in folders for name in MINIGPT4_NAMES]
        path, revision = next((path for path in paths if path.is_file()), None), None
        path = path or self._of_space()
        if path is None:
            path = self.folder / "downloads" / MINIGPT4_NAMES[0]
            if not self.online:
                raise FetchError(f"{path.name} is not there: go online, or give MODELS= a folder that has it")
            revision = download(MINIGPT4, path)
        self.lock.check(MINIGPT4, {MINIGPT4_NAMES[0]: path}, revision)
        return path

    def _of_space(self) -> Path | None:
        """The checkpoint in its authors' space on the hub; None if that has it no more, or cannot be reached."""
        try:
            folder = hub.snapshot(MINIGPT4_SPACE, MINIGPT4_NAMES, "main", self.online, "space")
        except FetchError:
            return None
        return next((folder / name for name in MINIGPT4_NAMES if (folder / name).is_file()), None)


def open_store(
    data: str | Path | None = None, models: str | Path | None = None, track: Track | None = None,
    online: bool = True, frozen: bool = False,
) -> Store:  # fmt: skip
    """The store of ``track``, by default the paper's. Without ``data`` and ``models``, the track names the folders."""
    track = track or get_track("paper")
    return Store(
        folder=track.data,
        lock=Lock(track.lock, frozen),
        data=_folder(data or track.sources["data"], "DATA"),
        models=_folder(models or track.sources["models"], "MODELS"),
        online=online and not is_offline_mode(),
    )


def _folder(path: str | Path | None, name: str) -> Path | None:
    if path and not (folder := Path(path).expanduser()).is_dir():
        raise FetchError(f"{name}={path} is not a folder")
    return folder.resolve() if path else None


def _together(folder: Path) -> Path:
    """The folder that holds all annotation files: ``folder``, or one below it."""
    below = sorted(path.parent for path in folder.rglob(FILES["train"]))
    return next((f for f in (folder, *below) if all((f / name).is_file() for name in FILES.values())), folder)


def _count(path: Path, loaded: LoadedRecords, size: int) -> None:
    """The paper does not say whether its counts include records with an empty ``alt``: either way will do."""
    usable, listed = len(loaded.records), len(loaded.records) + loaded.skipped
    if size not in (usable, listed):
        gap = f"{size - listed:,} are missing" if listed < size else f"{usable - size:,} are too many"
        raise FetchError(
            f"{path} has {listed:,} records ({loaded.skipped:,} of them without an answer, or passed over), not {size:,}: {gap}; "
            "fetch it again, or take the revision that the paper used"
        )


def main(arguments: list[str] | None = None) -> int:
    """Fetch everything; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mscke.benchmark.fetch", description=main.__doc__)
    parser.add_argument(
        "--data", help="local folder with FGVEdit's JSON files, train2014/, val2014/ or their zips"
    )
    parser.add_argument("--models", help="local folder with model folders, named as on the hub")
    parser.add_argument("--track", default="paper", help="the track that needs it")
    options = parser.parse_args(arguments)
    track = get_track(options.track)
    try:
        store = open_store(options.data, options.models, track)
        store.benchmark(track.sizes)
        print("FGVEdit and its images:", store.folder)
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
