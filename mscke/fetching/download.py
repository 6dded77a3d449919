"""A file over plain HTTP: in place only when it is whole and found sound."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import httpx2
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import silent_tqdm

from mscke.benchmark.pictures import PictureError
from mscke.fetching.lock import FetchError
from mscke.system.files import replacing

ATTEMPTS = 6
RETRIED = {425, 500, 502, 503, 504}  # failures that may pass; http_get tries again on 408, 429 and a cut


class Refused(FetchError):
    """The server answers, and not with the file that is wanted: to ask at once again is of no use."""


def download(url: str, path: Path, check: Callable[[Path], None], bar: bool = False) -> None:
    """Fetch ``url`` into ``path``, in several attempts, with a progress ``bar`` or without.

    ``check`` gets the whole file before it is in place. It raises FetchError or PictureError for what is not wanted.

    Raises :class:`Refused` where the server has no such file, else :class:`FetchError`.
    """
    with replacing(path) as whole:
        _receive(url, whole, bar)
        with open(whole, "rb") as file:
            if file.read(512).lstrip().lower().startswith((b"<html", b"<!doctype html")):
                raise Refused(f"{url} gives a web page and no file: open it in a browser to see what it says")
        try:
            check(whole)
        except (FetchError, PictureError) as error:
            raise Refused(str(error)) from None


def _receive(url: str, whole: Path, bar: bool) -> None:
    for attempt in range(ATTEMPTS):
        try:
            with open(whole, "wb") as file:
                headers = {"Accept-Encoding": "identity"}  # a range of compressed bytes would be another file
                return http_get(url, file, headers=headers, tqdm_class=None if bar else silent_tqdm)
        except HfHubHTTPError as error:
            why = f"HTTP {error.response.status_code}"
            if error.response.status_code not in RETRIED:
                raise Refused(f"{url} gives no file: {why}") from None
        except (httpx2.HTTPError, OSError) as error:
            raise FetchError(f"{url} cannot be fetched ({error}): run again") from None
        time.sleep(2**attempt)
    raise FetchError(f"{url} cannot be fetched ({why}): run again")
