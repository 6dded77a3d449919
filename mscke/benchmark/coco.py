"""COCO 2014 images: the named ones, from a local folder or out of the official zips, and no others."""

from __future__ import annotations

import os
import shutil
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from mscke.benchmark.download import download
from mscke.benchmark.lock import FetchError, Lock

ZIPS = "http://images.cocodataset.org/zips/{}.zip"
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
    names: Iterable[str], folder: Path, data: Path | None, lock: Lock, url: str | None = ZIPS
) -> None:
    """Bring the image ``names`` ("train2014/….jpg") into ``folder``; what is there already stays.

    They come from the same paths below ``data``, else out of ``data/train2014.zip``, else out of the zip
    at ``url``, which is fetched, locked and deleted when its images are out; None fetches nothing. Every
    image taken from a zip matches the zip's CRC. Raises :class:`FetchError`; images so far are kept.
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
        archive, source = folder / "downloads" / f"{zipped}.zip", url.format(zipped)
        revision = lock.revision(source) if archive.exists() else download(source, archive)
        lock.verify(source, {archive.name: archive})
        extract(archive, wanted, folder)
        lock.check(source, {archive.name: archive}, revision)
        archive.unlink()


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
