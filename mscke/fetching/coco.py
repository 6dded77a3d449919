"""COCO 2014 images: the named ones and no others, from a local folder or its zips, else one by one from COCO's host."""

from __future__ import annotations

import os
import shutil
import threading
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from urllib.parse import quote

from tqdm import tqdm

from mscke.benchmark.pictures import check_image
from mscke.fetching.download import Refused, download
from mscke.fetching.lock import FetchError, Lock
from mscke.system.files import replacing

SOURCE = "COCO 2014"  # in the lock
IMAGES = "http://images.cocodataset.org/{}"
FOLDERS = ("train2014", "val2014")
AT_ONCE = 16  # images that are fetched side by side
TOLERATED = 20  # refused ones, after which it is not the images that are wrong
SHOWN = 5  # of them, and of the records that need one, in a message


def place(source: Path, target: Path) -> None:
    """Put the file ``source`` at ``target``, as a hard link or, on another disk, a copy; never half of it."""
    source = source.resolve()  # a link to a link would leave the folder that images have to be in
    with replacing(target) as whole:
        try:
            os.link(source, whole)
        except OSError:
            shutil.copyfile(source, whole)


def absent(names: Iterable[str], folder: Path, data: Path | None = None) -> list[str]:
    """Those of the image ``names`` that neither ``folder`` nor ``data`` nor a zip in ``data`` holds, sorted."""
    packed = {name for archive in _archives(data) for name in _members(archive)}
    return sorted(_lacking(names, folder, data) - packed)


def collect(
    needed: Mapping[str, list[str]], folder: Path, data: Path | None, lock: Lock, url: str | None = IMAGES
) -> None:
    """Bring the images ``needed`` ("train2014/….jpg" to the records that name it) into ``folder``.

    What is there already stays. The others come from the same paths below ``data``, else out of
    ``data/train2014.zip`` and ``data/val2014.zip``, else from ``url``; None fetches nothing.
    Raises :class:`FetchError`; images so far are kept.
    """
    for name in _lacking(needed, folder) - _lacking(needed, data):
        place(data / name, folder / name)
    for archive in _archives(data):
        if inside := {name for name in _lacking(needed, folder) if name.startswith(f"{archive.stem}/")}:
            extract(archive, inside, folder)
    if not (lacking := sorted(_lacking(needed, folder))):
        return
    if foreign := [name for name in lacking if name.split("/")[0] not in FOLDERS]:
        raise FetchError(
            f"{len(foreign)} images are not there and not COCO 2014's, {foreign[0]} the first: that is in "
            f"no folder of COCO 2014; name images below {' or '.join(FOLDERS)}"
        )
    if url is None:
        raise FetchError(
            f"{len(lacking)} images are not there, {lacking[0]} the first; go online, or give DATA= a folder "
            f"that has {lacking[0].split('/')[0]}/ or {lacking[0].split('/')[0]}.zip with them"
        )
    fetch({name: needed[name] for name in lacking}, folder, lock, url)


def fetch(needed: Mapping[str, list[str]], folder: Path, lock: Lock, url: str = IMAGES) -> None:
    """Fetch these images into ``folder``, :data:`AT_ONCE` of them side by side.

    Before one is in place it is seen to be an image, and the locked one. One that is refused does not keep the others
    from coming; :class:`FetchError` names it and the records that need it. A host that does not answer ends it at once.
    """
    refused, stop = {}, threading.Event()

    def bring(name: str) -> None:
        def check(file: Path) -> None:
            check_image(file)
            lock.verify(SOURCE, {name: file})

        if stop.is_set():
            return
        try:
            download(url.format(quote(name)), folder / name, check)
        except Refused as error:
            refused[name] = error
            if len(refused) >= TOLERATED:
                stop.set()
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            tasks = [pool.submit(bring, name) for name in needed]
            for task in tqdm(as_completed(tasks), SOURCE, len(tasks), unit="image", mininterval=2):
                task.result()
        finally:
            stop.set()  # those that wait are not begun where this is left early
    if refused:
        lines = [f"{name}, of {'; '.join(_few(needed[name]))}: {refused[name]}" for name in sorted(refused)]
        left = sum(not (folder / name).is_file() for name in needed)
        head = f"{left:,} of {len(needed):,} images of {SOURCE} could not be fetched, the others are kept:"
        fix = "Run again to ask for them once more, or give DATA= a folder that has them."
        raise FetchError("\n  ".join([head, *_few(lines)]) + f"\n{fix}")


def extract(archive: Path, names: Iterable[str], folder: Path) -> None:
    """Write those of ``names`` that ``archive`` has to ``folder``, each checked by its CRC before it is there."""
    members = _members(archive)
    with zipfile.ZipFile(archive) as file:
        for name in tqdm(sorted(members & set(names)), archive.name, mininterval=2):
            try:
                with replacing(folder / name) as whole, file.open(name) as packed, open(whole, "wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked)  # reading to its end checks the CRC
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                raise FetchError(
                    f"{archive} is damaged at {name} ({error}); delete it, or give DATA= a folder with a whole one"
                ) from None


def _few(texts: list[str]) -> list[str]:
    return texts[:SHOWN] + ([f"… and {len(texts) - SHOWN} more"] if len(texts) > SHOWN else [])


def _lacking(names: Iterable[str], *folders: Path | None) -> set[str]:
    roots = [folder for folder in folders if folder is not None]
    return {name for name in names if not any((root / name).is_file() for root in roots)}


def _archives(data: Path | None) -> list[Path]:
    found = [data / f"{name}.zip" for name in FOLDERS] if data else []
    return [archive for archive in found if archive.exists()]


def _members(archive: Path) -> set[str]:
    try:
        with zipfile.ZipFile(archive) as file:
            return set(file.namelist())
    except zipfile.BadZipFile as error:
        raise FetchError(
            f"{archive} is cut short or no zip ({error}); delete it, or give DATA= a folder with a whole one"
        ) from None
