"""The lock file: what was fetched, by revision and SHA-256; trusted on first use, verified ever after."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from mscke.system.files import replacing


class FetchError(RuntimeError):
    """Something that the paper track needs is missing, damaged or changed; the message says what to do."""


class Lock:
    """A JSON file that maps each source to ``{"revision": …, "files": {name: SHA-256}}``, sorted.

    Commit it, and whoever fetches later gets the same bytes or an error. A ``frozen`` lock verifies
    and never writes. Raises :class:`FetchError` for a file that is no lock.
    """

    def __init__(self, path: str | Path, frozen: bool = False):
        self.path, self.frozen = Path(path), frozen
        try:
            entries = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
            self.entries = {s: {"revision": e["revision"], "files": dict(e["files"])} for s, e in entries.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise FetchError(f"{path} is not a lock file ({error!r}); restore it, or delete it to trust anew") from None

    def revision(self, source: str) -> str | None:
        """The commit that ``source`` was fetched at, None where that is not known."""
        return self.entries.get(source, {}).get("revision")

    def verify(self, source: str, files: Mapping[str, Path]) -> dict[str, str]:
        """SHA-256 of each of ``files``, name to path. Raises FetchError if one is not what was locked."""
        found = {name: sha256(path) for name, path in tqdm(files.items(), "verifying", leave=False, delay=2)}
        known = self.entries.get(source, {}).get("files", {})
        if changed := [name for name in found if known.get(name, found[name]) != found[name]]:
            first = changed[0]
            raise FetchError(
                f"{len(changed)} of {len(found)} files of {source} are not those in {self.path}: {files[first]} has "
                f"SHA-256 {found[first][:16]}…, locked is {known[first][:16]}…; delete them to fetch them again, "
                f"or delete the lock's entry {source!r} to trust the new ones"
            )
        return found

    def check(self, source: str, files: Mapping[str, Path], revision: str | None = None) -> None:
        """:meth:`verify`, then write down what was not known yet."""
        found = self.verify(source, files)
        known = self.entries.get(source, {"revision": None, "files": {}})
        entry = {"revision": revision or known["revision"], "files": known["files"] | found}
        if entry != known and not self.frozen:
            self.entries[source] = entry
            with replacing(self.path) as whole:
                whole.write_text(json.dumps(self.entries, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def sha256(path: str | Path) -> str:
    """Of the file's bytes, in hexadecimal; read once a process as long as size and time stay the same."""
    found = os.stat(path)
    return _digest(os.path.realpath(path), found.st_size, found.st_mtime_ns)


@functools.cache
def _digest(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
