"""Names of weights. What is frozen is hashed once: a process remembers it, and for the next one it stands on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from mscke.system.files import replacing

KEPT = "names.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")  # how files of weights end
_NAMED: WeakKeyDictionary[nn.Module, tuple[tuple, str]] = WeakKeyDictionary()  # frozen ones, as they were then
_LOADED: WeakKeyDictionary[nn.Module, tuple[tuple, Path, str]] = WeakKeyDictionary()


def fingerprint(module: nn.Module) -> str:
    """Sixteen hex digits that name a module's weights. Those of a frozen one are hashed once, and again only where
    torch has seen one of them change since."""
    tensors = sorted(module.state_dict().items())
    now, frozen = _stand(tensors), not any(p.requires_grad for p in module.parameters())
    if frozen and (known := _NAMED.get(module)) and known[0] == now:
        return known[1]
    as_loaded, path, of = _LOADED.get(module, (None, None, ""))
    kept = _read(path) if frozen and as_loaded == now else {}
    if not (name := kept.get(of)):
        name = _hash(tensors)
        if frozen and as_loaded == now:
            with replacing(path) as whole:
                whole.write_text(json.dumps(_read(path) | {of: name}, indent=1) + "\n", encoding="utf-8")
    _NAMED[module] = now, name
    return name


def loaded_from(folder: str | Path, module: nn.Module, cache: Path, how: str = "") -> None:
    """``module`` was loaded just now from the files of weights in ``folder``: names of it and of its children, as long as
    nothing changes them, are kept in ``cache``. They hold for these files, by size and time, loaded in the same way
    (``how``: rounded, say)."""
    files = sorted(p for p in Path(folder).iterdir() if p.suffix in WEIGHTS)
    found = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    key = hashlib.sha256(repr((str(Path(folder).resolve()), found, how)).encode()).hexdigest()[:16]
    for part, child in [("", module), *module.named_children()]:
        dtypes = sorted({str(t.dtype) for t in child.state_dict().values()})
        of = " ".join([key, part or "all", *dtypes])
        _LOADED[child] = _stand(sorted(child.state_dict().items())), cache / KEPT, of


def _stand(tensors: Iterable[tuple[str, Tensor]]) -> tuple:
    return tuple((name, t.data_ptr(), None if t.is_inference() else t._version) for name, t in tensors)


def _hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(name.encode() + tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _read(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # none yet, or damaged: hash again
        return {}
