"""A file over plain HTTP: resumed where it was cut, and in place only when it is whole and found sound."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import httpx2
from tqdm import tqdm

from mscke.fetching.lock import FetchError

ATTEMPTS = 6  # in a row that bring nothing
RETRIED = {408, 425, 429, 500, 502, 503, 504}


class Refused(FetchError):
    """The server answers, and not with the file that is wanted: to ask at once again is of no use."""


class _Cut(Exception):
    """The connection ended before the file did."""


def open_client(connections: int = 1) -> httpx2.Client:
    """A client with so many connections, which threads may share and its files one after the other."""
    limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
    return httpx2.Client(follow_redirects=True, timeout=30, limits=limits)


def download(
    url: str, path: Path, wait: float = 1.0, check: Callable[[Path], None] | None = None,
    client: httpx2.Client | None = None,
) -> str | None:  # fmt: skip
    """Fetch ``url`` into ``path``; the server's validator (ETag or Last-Modified), if it has one.

    Bytes gather in ``path.part``. A later call goes on there, if the server says (``If-Range``) that the
    file is still the same, and begins anew otherwise. Failures that may pass are tried again after
    ``wait`` seconds, then twice that, and so on. ``check`` gets the whole part, and raises for what is not to be
    put in place: it is deleted then. With a ``client`` of :func:`open_client` this is one of many files, and no
    bar is drawn for it.

    Raises :class:`Refused` where the server has no such file, else :class:`FetchError`; the bytes so far are kept.
    """
    part, tag = path.with_name(path.name + ".part"), path.with_name(path.name + ".part.tag")
    path.parent.mkdir(parents=True, exist_ok=True)
    with nullcontext(client) if client else open_client() as connected:
        _persist(connected, url, part, tag, wait, alone=client is None)
    validator = _read(tag)
    tag.unlink(missing_ok=True)
    try:
        if check:
            check(part)
    except Exception:
        part.unlink()
        raise
    os.replace(part, path)
    return validator or None


def _persist(client: httpx2.Client, url: str, part: Path, tag: Path, wait: float, alone: bool) -> None:
    failures = 0
    while failures < ATTEMPTS:
        before = _size(part)
        try:
            return _go_on(client, url, part, tag, alone)
        except (httpx2.TransportError, _Cut) as error:
            why = str(error) or type(error).__name__
        failures = 0 if _size(part) > before else failures + 1
        time.sleep(wait * 2**failures)
    kept = f"its first {_size(part):,} bytes are kept: run again to go on"
    raise FetchError(f"{url} cannot be fetched ({why}); {kept}")


def _go_on(client: httpx2.Client, url: str, part: Path, tag: Path, alone: bool) -> None:
    """One request for what ``part`` still lacks; returns when it is whole."""
    done, validator = _size(part), _read(tag)
    headers = {"Accept-Encoding": "identity"}  # a range of compressed bytes would be another file
    if done and validator:
        headers |= {"Range": f"bytes={done}-", "If-Range": validator}
    with client.stream("GET", url, headers=headers) as response:
        if response.status_code in RETRIED:
            raise _Cut(f"HTTP {response.status_code}")
        start, total = _range(response)
        if response.status_code == 416 and total == done:  # it was whole already
            return
        if response.status_code == 416 or start not in (0, done):
            part.unlink()
            raise _Cut(f"the server has {total} bytes and sends from {start}")
        if response.is_error:
            raise Refused(f"{url} gives no file: HTTP {response.status_code} {response.reason_phrase}")
        if "text/html" in response.headers.get("Content-Type", ""):
            raise Refused(f"{url} gives a web page and no file: open it in a browser to see what it says")
        if start == 0:
            tag.write_text(_validator(response), encoding="utf-8")
        with open(part, "ab" if start else "wb") as file, _bar(part, start, total, alone) as bar:
            for chunk in response.iter_raw():  # as it comes: a cut loses nothing
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and _size(part) != total:
        raise _Cut(f"{_size(part):,} of {total:,} bytes came")


def _range(response: httpx2.Response) -> tuple[int, int | None]:
    """Where the response begins, and the size of the whole file if it says so; in bytes."""
    unit, _, total = response.headers.get("Content-Range", "").rpartition("/")
    if response.status_code not in (206, 416):
        return 0, int(length) if (length := response.headers.get("Content-Length")) else None
    start = unit.removeprefix("bytes ").partition("-")[0]
    return int(start) if start.isdigit() else 0, int(total) if total.isdigit() else None


def _validator(response: httpx2.Response) -> str:
    """What names this version of the file in ``If-Range``, which takes no weak ETag."""
    etag = response.headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")


def _bar(part: Path, start: int, total: int | None, alone: bool) -> tqdm:
    hidden = {} if alone else {"disable": True}
    return tqdm(desc=part.stem, initial=start, total=total, unit="B", unit_scale=True, mininterval=2, **hidden)


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _read(tag: Path) -> str:
    return tag.read_text(encoding="utf-8") if tag.exists() else ""
