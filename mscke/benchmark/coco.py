"""COCO 2014 images: the named ones and no others, from a local folder, out of the official zips if they are there, or one by one."""

from __future__ import annotations

import os
import shutil
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from mscke.benchmark.download import AWAY, download
from mscke.benchmark.lock import FetchError, Lock
from mscke.benchmark.pictures import PictureError, check_image

IMAGES = "http://images.cocodataset.org/{}"
AT_ONCE = 16  # images on their way
SOURCE = "COCO 2014"  # as the lock calls them
FOLDERS = ("train2014", "val2014")


def place(source: Path, target: Path) -> None:
    """Put the file ``source`` at ``target``, as a hard link or, on another disk, a copy; never half of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    source = source.resolve()  # a link to a link would leave the folder that images have to be in
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def absent(names: Iterable[str], folder: Path, data: Path | None = None) -> list[str]:
    """Those of the image ``names`` that neither ``folder`` nor ``data`` nor a zip in ``data`` holds, sorted."""
    lacking = _lacking(names, folder, data)
    if data is not None:
        for archive in (data / f"{name}.zip" for name in FOLDERS):
            lacking -= set(_members(archive)) if archive.exists() else set()
    return sorted(lacking)


def collect(
    names: Iterable[str], folder: Path, data: Path | None, lock: Lock, url: str | None = IMAGES
) -> None:
    """Bring the image ``names`` ("train2014/….jpg") into ``folder``; what is there already stays.

    They come from the same paths below ``data``, else out of ``data/train2014.zip``, of which each must match its CRC;
    else one by one from ``url``, of which each must be a whole picture, and the locked one; None fetches nothing.
    Raises :class:`FetchError`; images so far are kept, and a later call fetches the rest.
    """
    for name in names - _lacking(names, folder, data):
        if not (folder / name).is_file():
            place(data / name, folder / name)
    for zipped, wanted in _by_folder(_lacking(names, folder)).items():
        own = data / f"{zipped}.zip" if data is not None else None
        if own is not None and own.exists():
            extract(own, wanted, folder)
            continue
        if url is None or zipped not in FOLDERS:
            raise FetchError(f"{len(wanted)} images are not there, {wanted[0]} the first; {_advice(zipped)}")
        fetch_images(wanted, folder, lock, url)


def fetch_images(names: list[str], folder: Path, lock: Lock, url: str) -> None:
    """Fetch each of ``names`` from ``url``, several at a time; one that fails does not stop the others.

    Raises :class:`FetchError`, which names the first that failed, when all were tried, or so many in vain that the host must be away.
    """
    scratch, away = folder / "downloads" / f"images.{os.getpid()}", []

    def fetch(name: str) -> str | None:
        """Why it could not be fetched, if it could not."""
        if len(away) >= AT_ONCE:
            return away[0]
        temporary = scratch / name
        try:
            download(url.format(name), temporary, bar=False)
            check_image(temporary)
            lock.verify(SOURCE, {name: temporary})
        except (FetchError, PictureError) as error:
            temporary.unlink(missing_ok=True)
            away.extend([str(error)] if AWAY in str(error) else [])
            return str(error)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, folder / name)
        return None

    failed = {}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = zip(names, pool.map(fetch, names), strict=True)
        for name, why in tqdm(found, f"images of {names[0].split('/')[0]}", len(names), mininterval=2):
            failed |= {name: why} if why else {}
    shutil.rmtree(scratch, ignore_errors=True)
    if failed:
        name, why = next(iter(failed.items()))
        raise FetchError(
            f"{len(failed)} of {len(names)} images could not be fetched, {name} the first ({why}); the others are kept: "
            "run again, or give DATA= a folder that has it"
        )


def extract(archive: Path, names: list[str], folder: Path) -> None:
    """Write the members ``names`` of ``archive`` to ``folder``, each checked by its CRC before it is there."""
    members = _members(archive)
    with zipfile.ZipFile(archive) as file:
        for name in tqdm([n for n in names if n in members], archive.name, mininterval=2):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(target.name + ".tmp")
            try:
                with file.open(name) as packed, open(temporary, "wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked)  # reading to its end checks the CRC
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                temporary.unlink(missing_ok=True)
                raise FetchError(
                    f"{archive} is damaged at {name} ({error}); delete it, fetch it again"
                ) from None
            os.replace(temporary, target)
    if missing := [n for n in names if n not in members]:
        raise FetchError(f"{archive} lacks {len(missing)} of the images named, {missing[0]} the first")


def _lacking(names: Iterable[str], *folders: Path | None) -> set[str]:
    roots = [folder for folder in folders if folder is not None]
    return {name for name in names if not any((root / name).is_file() for root in roots)}


def _members(archive: Path) -> set[str]:
    try:
        with zipfile.ZipFile(archive) as file:
            return set(file.namelist())
    except zipfile.BadZipFile as error:
        raise FetchError(f"{archive} is cut short or no zip ({error}); delete it, fetch it again") from None


def _by_folder(names: Iterable[str]) -> dict[str, list[str]]:
    groups = defaultdict(list)
    for name in sorted(names):
        groups[name.split("/")[0]].append(name)
    return groups


def _advice(zipped: str) -> str:
    if zipped not in FOLDERS:
        return f"{zipped}/ is no folder of COCO 2014: name images below {' or '.join(FOLDERS)}"
    return f"go online, or give DATA= a folder that has {zipped}/ or {zipped}.zip"
