"""Where a track's models come from, and how they are loaded. In ``mscke.config`` a source is

* a folder, or for a CLIP what open_clip takes: used as it is;
* ``hub:<repository>``: fetched, locked and verified by :mod:`mscke.fetching.store`;
* ``minigpt4:<BLIP-2>+<Vicuna>``: MiniGPT-4, composed once of these two and its published projection;
* ``shape:<text model>``: the same architecture and sizes with random weights (:mod:`mscke.models.shapes`);
* ``last:<n>``, for a counterfactual model: the base model's own last n decoder layers, copied and trained.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from transformers import AutoConfig, BitsAndBytesConfig

from mscke.config import Track
from mscke.fetching.store import open_store
from mscke.fetching.track import load_benchmark
from mscke.models import shapes
from mscke.models.compose import compose_minigpt4, memory_needed
from mscke.models.counterfactual import CounterfactualModel, LastLayers
from mscke.models.mllm import MLLM

_HELD: WeakValueDictionary[tuple, MLLM] = WeakValueDictionary()  # what is in use is not loaded twice
UNROUNDED = ("vision_model", "qformer", "language_projection", "language_model.lm_head")  # never in 8 bits


def find(track: Track, source: str) -> str:
    """The folder, or open_clip's name, of ``source``; fetched or composed if it is not there yet.

    Raises :class:`mscke.fetching.lock.FetchError`, or what :func:`compose_minigpt4` raises.
    """
    kind, _, what = source.partition(":")
    if kind == "hub":
        folder = open_store(track=track).model(what)
        return f"local-dir:{folder}" if (folder / "open_clip_config.json").exists() else str(folder)
    if kind == "minigpt4":
        if not (target := track.models / "minigpt4").exists():
            store, (blip2, vicuna) = open_store(track=track), what.split("+")
            compose_minigpt4(store.model(blip2), store.minigpt4(), store.model(vicuna), target)
        return str(target)
    return source


def device_of(track: Track) -> torch.device:
    """Where the track's models compute.

    Raises RuntimeError if the track wants a GPU and PyTorch sees none.
    """
    if track.device != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if track.device == "cuda":
        raise RuntimeError(
            f"The track {track.name!r} wants a GPU, and PyTorch sees none: make paper-check says why. "
            "MSCKE_CPU=1 sets out on a CPU all the same, which may take months"
        )
    return torch.device("cpu")


def load_mllm(track: Track, backbone: str, cache: Path | None = None) -> MLLM:
    """The frozen base model ``backbone``: bfloat16 on a GPU or where the track says so, float32 else.

    Where models are fetched, what its weights take is said before they are loaded, and they are loaded once
    as long as anyone holds them. Raises MemoryError if the GPU has not that much left.
    """
    if held := _HELD.get(key := (track.name, backbone, cache)):
        return held
    kind, _, shape = (source := track.backbones[backbone]).partition(":")
    device, options = device_of(track), {"image_size": track.image_size, "batch_size": track.batch_size}
    dtype = torch.bfloat16 if track.half or device.type == "cuda" else torch.float32
    if kind == "shape":
        check_memory(backbone, memory_needed(shapes.blip2_config(shape), dtype), device, rounded=False)
        model = shapes.mllm(shape, list(texts_of(track)), device, dtype, track.seed)
        _HELD[key] = mllm = MLLM(*model, backbone, None, **options)
        return mllm
    folder = find(track, source)
    if device.type == "cuda":
        options["device_map"] = {"": device.index}
    if track.fetched:
        config = AutoConfig.from_pretrained(folder)
        check_memory(backbone, memory_needed(config, dtype), device, track.eight_bit)
        if track.eight_bit and device.type == "cuda":
            options["quantization_config"] = eight_bit(config)
    mllm = MLLM.from_pretrained(folder, backbone, cache, dtype=dtype, **options)
    if track.fetched:
        _HELD[key] = mllm
    return mllm


def texts_of(track: Track) -> set[str]:
    """All that the track's records say."""
    bench = load_benchmark(track)
    records = [*bench.train, *bench.validation, *bench.test]
    asked = {query.question for r in records for query in r.queries.values()}
    return asked | {answer for r in records for answer in r.answers.values()}


def check_memory(name: str, needed: int, device: torch.device, rounded: bool) -> None:
    """Say on stderr what the weights take; MemoryError if they cannot fit on the GPU ``device``."""
    print(f"{name}: {needed / 1e9:.2f} GB of weights on {device}, activations on top", file=sys.stderr)
    if device.type != "cuda" or rounded:  # in 8 bits it is less, by how much bitsandbytes knows
        return
    torch.cuda.empty_cache()  # what is free is free to all
    if (free := torch.cuda.mem_get_info(device)[0]) < needed:
        raise MemoryError(
            f"{name} needs {needed / 1e9:.1f} GB and {device} has {free / 1e9:.1f} GB free; "
            "set MSCKE_8BIT=1, or use a larger GPU"
        )


def eight_bit(config) -> BitsAndBytesConfig:
    """The language model's matrices in 8-bit integers, but for the last layer, which is copied and trained.

    bitsandbytes says at every product in bfloat16 that it casts: from now on it does not.
    """
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "MatMul8bitLt: inputs will be cast")
    decoder = "model.decoder" if config.text_config.model_type == "opt" else "model"
    last = f"language_model.{decoder}.layers.{config.text_config.num_hidden_layers - 1}"
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[*UNROUNDED, last])


def make_counterfactual(track: Track, base: MLLM) -> CounterfactualModel:
    """The counterfactual model beside ``base`` before training: pretrained where the track has a source.

    Raises ValueError if that has fewer positions than ``base``.
    """
    if not (source := track.counterfactuals.get(base.name)):
        return CounterfactualModel.beside(base)
    kind, _, what = source.partition(":")
    if kind == "last":
        return LastLayers(base, int(what))
    if kind == "shape":
        model = CounterfactualModel.around(base, shapes.text_model(what, track.seed))
    else:
        model = CounterfactualModel.pretrained(base, find(track, source))
    positions = model.language_model.config.max_position_embeddings
    if positions < base.encoder.positions:
        raise ValueError(
            f"{source} has {positions:,} positions and {base.name}, whose questions it answers with an edit "
            f"before them, {base.encoder.positions:,}: take one with as many"
        )
    return model
