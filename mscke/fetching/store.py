"""What the paper track is made of, brought here: FGVEdit, its COCO images, the models.

Nothing is fetched that is here already, that a local folder has, or when HF_HUB_OFFLINE=1; all of it is held to the
lock file::

    store = open_store()                                    # MSCKE_DATA, MSCKE_MODELS: local folders
    records = store.benchmark()["test"].records             # images brought, all of it checked
    folder = store.model("Salesforce/blip2-opt-2.7b")       # what from_pretrained takes
"""

from __future__ import annotations

import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import is_offline_mode

from mscke.benchmark.generate import SIZES
from mscke.benchmark.load import LoadedRecords, load_records
from mscke.config import Track, get_track
from mscke.fetching import coco, hub
from mscke.fetching.download import download
from mscke.fetching.lock import FetchError, Lock, sha256

FGVEDIT = "ZhenZeng/FGVEdit"
FILES = {"train": "train_data.json", "test": "test_data.json"}

# MiniGPT-4's 7B checkpoint: in its authors' space on the hub, spelt like this, and where their README links to.
SPACE, PROJECTION = "Vision-CAIR/minigpt4", "prerained_minigpt4_7b.pth"
DRIVE = "https://drive.google.com/uc?export=download&id=1RY9jV0dyqLX-o38LrumkKRh6Jtaop58R"
MINIGPT4_NAMES = ("pretrained_minigpt4_7b.pth", PROJECTION)
MINIGPT4_BYTES, MINIGPT4_SHA256 = 37_907_201, r"017a9ed588a1.*dcbb"  # as the space lists it


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
        needed = self.named(self.folder / name for name in FILES.values())
        coco.collect(needed, self.folder, self.data, self.lock, self.images if self.online else None)
        # opens every image, so that none that is cut short is ever locked
        loaded = {split: self.read(self.folder / name) for split, name in FILES.items()}
        self.lock.check(coco.SOURCE, {name: self.folder / name for name in sorted(needed)})
        return loaded

    def read(self, path: Path, check_images: bool = True) -> LoadedRecords:
        """The records of the JSON file ``path``, images below ``folder``; those with a bad field are left out and noted."""
        return load_records(path, self.folder, check_images=check_images, pass_over=True)

    def annotations(self, sizes: dict[str, int] = SIZES) -> dict[str, Path]:
        """The JSON file of each split where it lies now, read through, counted and locked."""
        source, revision = f"datasets/{FGVEDIT}", None
        local = map(_files, filter(None, (self.folder, self.data)))
        found = next((files for files in local if len(files) == len(FILES)), None)
        if found is None:
            wanted = self.lock.revision(source) or "main"
            patterns = [pattern for name in FILES.values() for pattern in (name, f"*/{name}")]
            folder = hub.snapshot(FGVEDIT, patterns, wanted, self.online, "dataset")
            found, revision = _files(folder), folder.name
            if lacking := [name for split, name in FILES.items() if split not in found]:
                raise FetchError(f"{FGVEDIT}: {folder} lacks {lacking[0]}; fetch it, or give DATA= a folder with it")
        for split, path in found.items():
            _count(path, self.read(path, check_images=False), sizes[split])
        self.lock.check(source, {path.name: path for path in found.values()}, revision)
        return found

    def named(self, paths: Iterable[Path]) -> dict[str, list[str]]:
        """The images that records of the JSON files ``paths`` name, relative to ``folder``, and which records do."""
        root, needed = os.path.realpath(self.folder), defaultdict(list)
        for path in paths:
            for record in self.read(path, check_images=False).records:
                needed[os.path.relpath(record.edit.image, root)].append(f"{path.name}, record {record.id}")
        return dict(needed)

    def model(self, repo: str, parts: hub.Parts | None = None) -> Path:
        """The folder with the files of the hub's model ``repo``: below ``models``, else the hub's cache."""
        parts = parts or hub.MODELS.get(repo, hub.Parts())
        source, revision = f"models/{repo}", None
        local = [self.models / name for name in (repo, Path(repo).name)] if self.models else []
        folder = next((path for path in local if path.is_dir()), None)
        if folder is None:
            folder = hub.fetch_model(repo, parts, self.lock.revision(source) or "main", self.online)
            revision = folder.name
        self.lock.check(source, hub.model_files(folder, parts), revision)
        return folder

    def minigpt4(self) -> Path:
        """MiniGPT-4's 7B checkpoint, a dict whose key ``model`` holds ``llama_proj``; off the hub, else Google Drive."""
        source, revision = f"spaces/{SPACE}", None
        folders = filter(None, (self.models, self.folder / "downloads"))
        paths = [folder / name for folder in folders for name in MINIGPT4_NAMES]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            path, revision = self._projection(self.lock.revision(source) or "main")
        self.lock.check(source, {PROJECTION: path}, revision)
        return path

    def _projection(self, revision: str) -> tuple[Path, str | None]:
        """The checkpoint as its authors published it, and the space's commit that it is of, if it is."""
        try:
            folder = hub.snapshot(SPACE, [PROJECTION], revision, self.online, "space")
            _as_published(path := folder / PROJECTION)
            return path, folder.name
        except FetchError as error:
            if not self.online:
                raise FetchError(f"{PROJECTION}: {error}") from None
            why = error
        print(f"{why}\nGoogle Drive is asked for {PROJECTION} instead.", file=sys.stderr)
        try:
            download(DRIVE, path := self.folder / "downloads" / PROJECTION, _as_published, bar=True)
        except FetchError as error:
            fix = f"give MODELS= a folder with {PROJECTION}, which MiniGPT-4's README links to"
            raise FetchError(f"{PROJECTION} is to be had neither here ({why}) nor there ({error}): {fix}") from None
        return path, None


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


def _files(folder: Path) -> dict[str, Path]:
    """FGVEdit's JSON file of each split that ``folder`` has, at its top or else somewhere below."""
    found = {}
    for split, name in FILES.items():
        below = [folder / name] if (folder / name).is_file() else sorted(folder.glob(f"*/**/{name}"))
        if len(below) > 1:
            some = " and ".join(str(path.relative_to(folder)) for path in below)
            raise FetchError(f"{folder} has {some}: give DATA= a folder with the {name} that is meant")
        if below:
            found[split] = below[0]
    return found


def _as_published(path: Path) -> None:
    """Raise FetchError unless this is MiniGPT-4's checkpoint as its space lists it."""
    if not path.is_file():
        raise FetchError(f"{SPACE} has no {path.name} any more")
    if (size := path.stat().st_size) != MINIGPT4_BYTES or not re.fullmatch(MINIGPT4_SHA256, sha256(path)):
        raise FetchError(
            f"{path} is not the checkpoint that was published: it has {size:,} bytes and SHA-256 "
            f"{sha256(path)[:16]}…, not {MINIGPT4_BYTES:,} and {MINIGPT4_SHA256[:12]}…"
        )


def _count(path: Path, loaded: LoadedRecords, size: int) -> None:
    """The paper does not say whether its counts include records with an empty ``alt``: either way will do.

    Those that were left out count as what they should have been.
    """
    usable = len(loaded.records) + len(loaded.left_out)
    listed = usable + loaded.skipped
    if size not in (usable, listed):
        gap = f"{size - listed:,} are missing" if listed < size else f"{usable - size:,} are too many"
        raise FetchError(
            f"{path} has {listed:,} records ({loaded.skipped:,} of them without an answer), not {size:,}: {gap}; "
            "fetch it again, or take the revision that the paper used"
        )
