"""What is frozen is computed once: a table of features by key, in memory and, if asked, on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from mscke.system.files import replacing

_NAMED: WeakKeyDictionary[nn.Module, tuple[tuple, str]] = WeakKeyDictionary()  # frozen ones, as they were then


def fingerprint(module: nn.Module) -> str:
    """Sixteen hex digits that name a module's weights. Those of a frozen one are hashed once, and again only where
    torch has seen one of them change since."""
    tensors = sorted(module.state_dict().items())
    frozen = not any(p.requires_grad for p in module.parameters())
    now = tuple((name, t.data_ptr(), None if t.is_inference() else t._version) for name, t in tensors)
    if frozen and (known := _NAMED.get(module)) and known[0] == now:
        return known[1]
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(name.encode() + tensor.detach().cpu().float().contiguous().numpy().tobytes())
    _NAMED[module] = now, digest.hexdigest()[:16]
    return _NAMED[module][1]


class FeatureTable:
    """Rows of features by key (a text, say), computed in batches when first asked for.

    ``compute`` maps a list of keys to a tuple of tensors, each (B, …). With a ``path`` the table is
    read from that safetensors file if it is there, and written back whenever it has grown; what another
    process has written there is read before anything is computed.
    """

    def __init__(
        self,
        compute: Callable[[list[str]], tuple[Tensor, ...]],
        path: Path | None = None,
        batch_size: int = 256,
        dtype: torch.dtype = torch.float32,
    ):
        self.compute, self.path, self.batch_size, self.dtype = compute, path, batch_size, dtype
        self.rows: dict[str, int] = {}
        self.stamps: dict[str, str] = {}
        self.columns: tuple[Tensor, ...] = ()
        self._version = 0  # of the file, as it was read or written last
        self._read()

    def _read(self) -> None:
        """Take what the file holds, if another process has written it since, instead of what is here."""
        if (version := self._written()) in (0, self._version):
            return
        self._version = version
        try:
            with safe_open(self.path, "pt") as file:
                header = file.metadata()
                columns = tuple(file.get_tensor(name) for name in sorted(file.keys()))
        except SafetensorError:  # cut off by a crash: compute it again
            self.path.unlink()
            return
        keys, stamps = (json.loads(header.get(name, "{}")) for name in ("keys", "stamps"))
        valid = [i for i, key in enumerate(keys) if stamps.get(key, "") == self.stamp(key)]
        self.rows = {keys[i]: row for row, i in enumerate(valid)}
        self.stamps = {key: stamps[key] for key in self.rows if key in stamps}
        self.columns = columns if len(valid) == len(keys) else tuple(c[valid] for c in columns)

    def _written(self) -> int:
        """When the file was written (ns since 1970); 0 where there is none."""
        return self.path.stat().st_mtime_ns if self.path is not None and self.path.exists() else 0

    def stamp(self, key: str) -> str:
        """What must stay as it was for a row on disk to be good still; nothing by default."""
        return ""

    @torch.inference_mode()
    def __call__(self, keys: Sequence[str]) -> Tensor:
        """Row numbers (B,) of ``keys`` in :attr:`columns`, after computing those not there yet."""
        if any(key not in self.rows for key in keys):
            self._read()
        new = [key for key in dict.fromkeys(keys) if key not in self.rows]
        new.sort(key=len)  # texts of one length share a batch; the order of rows is of no consequence
        stamps = {key: stamp for key in new if (stamp := self.stamp(key))}  # taken before it is read
        parts = [self.columns] if self.columns else []
        starts = range(0, len(new), self.batch_size)
        for i in tqdm(starts, desc="encoding", leave=False, disable=len(new) < 2000 or None):
            found = self.compute(new[i : i + self.batch_size])
            parts.append(tuple(column.to("cpu", self.dtype) for column in found))
        if new:
            self.columns = tuple(torch.cat(column) for column in zip(*parts, strict=True))
            self.rows.update({key: len(self.rows) + i for i, key in enumerate(new)})
            self.stamps.update(stamps)
            self._save()
        return torch.tensor([self.rows[key] for key in keys], dtype=torch.long)

    def _save(self) -> None:
        if self.path is None:
            return
        columns = {f"{i:02d}": column.contiguous() for i, column in enumerate(self.columns)}
        header = {"keys": json.dumps(list(self.rows)), "stamps": json.dumps(self.stamps)}
        with replacing(self.path) as whole:
            save_file(columns, whole, metadata=header)
            self._version = whole.stat().st_mtime_ns


class ImageTable(FeatureTable):
    """The keys are paths of images. On disk the features of a file that was written anew since are void; within a
    process an image is taken to stay as it was when it was first asked for."""

    def stamp(self, key: str) -> str:
        try:
            found = os.stat(key)
        except OSError:
            return "not there"
        return f"{found.st_size} {found.st_mtime_ns}"
