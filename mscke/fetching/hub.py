"""Models of the paper track on the Hugging Face hub: which of their files are wanted, whole and sound."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

import httpx2
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from mscke.fetching.lock import FetchError


@dataclass(frozen=True)
class Parts:
    """Which files of a model's repository are wanted. Of ``weights``, the first kind that there is.

    Of the shards that an index lists, those that hold a tensor whose name begins as ``tensors`` says. ``size``: of
    the wanted files as they are published, in bytes, where it is known.
    """

    texts: tuple[str, ...] = ("*.json", "*.txt", "*.model")
    weights: tuple[str, ...] = ("*.safetensors", "*.bin")
    tensors: tuple[str, ...] = ("",)
    size: float = 0


SEEING = ("vision_model.", "query_tokens", "qformer.")  # what MiniGPT-4 takes of BLIP-2
_CLIP = Parts(("open_clip_config.json",), ("open_clip*.safetensors", "open_clip*.bin"))
MODELS = {
    "Salesforce/blip2-opt-2.7b": Parts(size=15.0e9),
    "Salesforce/blip2-flan-t5-xxl": Parts(tensors=SEEING, size=10.0e9),
    "Vision-CAIR/vicuna-7b": Parts(size=13.5e9),
    "facebook/opt-125m": Parts(size=0.3e9),
    "timm/vit_base_patch32_clip_224.openai": replace(_CLIP, size=0.6e9),
    "timm/vit_large_patch14_clip_224.openai": replace(_CLIP, size=1.7e9),
}


def snapshot(repo: str, patterns: Iterable[str], revision: str, online: bool, kind: str = "model") -> Path:
    """The hub's cache folder, named after its commit, with the files of ``repo`` that match ``patterns``.

    With ``online=False`` whatever of them the cache holds. Raises :class:`FetchError`.
    """
    try:
        return Path(
            snapshot_download(
                repo, repo_type=kind, revision=revision, allow_patterns=list(patterns), local_files_only=not online
            )
        )
    except (OSError, httpx2.HTTPError) as error:
        first = str(error).partition("\n")[0]
        why = f"cannot be fetched ({first})" if online else "is not in the hub's cache"
        option = "DATA=" if kind == "dataset" else "MODELS="
        raise FetchError(f"{repo} {why}: go online, or give {option} a folder that has it") from error


def fetch_model(repo: str, parts: Parts, revision: str, online: bool) -> Path:
    """:func:`snapshot` of the texts first, for they may say which weights are wanted, then of those."""
    folder = snapshot(repo, parts.texts, revision, online)
    for weights in _options(folder, parts):
        snapshot(repo, [*parts.texts, *weights], folder.name, online)
        if _matching(folder, weights):
            break
    return folder


def model_files(folder: Path, parts: Parts) -> dict[str, Path]:
    """The wanted files of a model's ``folder``, by name. Raises FetchError if one is missing or damaged."""
    options = _options(folder, parts)
    weights = next((found for found in options if _matching(folder, found)), options[0])
    if lacking := [name for name in (parts.texts[0], *weights) if not _matching(folder, [name])]:
        raise FetchError(f"{folder} lacks {', '.join(lacking)}; fetch it again, or complete the folder")
    files = {name: folder / name for name in _matching(folder, [*parts.texts, *weights])}
    for path in files.values():
        _check_sound(path)
    return files


def read_index(path: Path) -> dict[str, str]:
    """The file that holds each tensor, by the tensor's name: a shards' index as transformers writes it."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise FetchError(f"{path} is no index of weights, or cut off ({error!r}); fetch it again") from None


def _options(folder: Path, parts: Parts) -> list[list[str]]:
    """For each kind of weights: the shards that an index in ``folder`` names, else a pattern."""
    found = []
    for pattern in parts.weights:
        where = next(map(read_index, folder.glob(f"{pattern}.index.json")), {})
        shards = sorted({file for name, file in where.items() if name.startswith(parts.tensors)})
        found.append(shards or [pattern])
    return found


def _matching(folder: Path, patterns: Iterable[str]) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def _check_sound(path: Path) -> None:
    """Raise FetchError for a safetensors file that is cut short, or JSON that is none."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
    except (SafetensorError, ValueError) as error:
        raise FetchError(f"{path} is damaged or cut short ({error}); delete it, fetch it again") from None
