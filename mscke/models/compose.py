"""MiniGPT-4 as the paper has it, composed of its published parts, and what a model needs of a GPU.

MiniGPT-4 (Zhu et al., arXiv:2304.10592) is BLIP-2's frozen vision tower and Q-Former, those of the
FlanT5-XXL checkpoint, one linear projection of its own, and Vicuna-7B. :func:`compose_minigpt4` puts the
three into one ``Blip2ForConditionalGeneration`` with a Llama text model, tensor for tensor as published:
nothing is rounded, and all of it stays mapped from disk but for the tensor being written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Size, Tensor
from transformers import (
    AddedToken,
    AutoConfig,
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from mscke.fetching.hub import SEEING, read_index
from mscke.models.prompts import IMAGE_TOKEN

TEXT, PROJECTION, LLAMA_PROJECTION = "language_model.", "language_projection.", "llama_proj."
WORDS = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")  # a row each token
SAVED = ("model.safetensors", "pytorch_model.bin")  # the names transformers saves by, best first
TOKENIZERS = ("tokenizer.json", "tokenizer.model")


def compose_minigpt4(blip2: Path, minigpt4: Path, vicuna: Path, target: Path, shard: str = "2GB") -> Path:
    """Write MiniGPT-4 to the folder ``target``, or leave the one that is there; returns ``target``.

    ``blip2``: a folder of ``Salesforce/blip2-flan-t5-xxl``; the shards that see suffice. ``minigpt4``: MiniGPT-4's
    7B checkpoint, a .pth file. ``vicuna``: a folder of Vicuna-7B with its tokenizer. ``shard``: the size of the files
    that are written.

    Raises FileNotFoundError, ValueError or FetchError, naming file and tensor, if a part is missing, damaged or does
    not fit the others; ``target`` appears only when complete.
    """
    if target.exists():
        return target
    tokenizer, config = open_tokenizer(vicuna), combine_configs(blip2, vicuna)
    model = outline(config)
    shapes = {n: t.shape for n, t in model.state_dict().items() if n not in model.all_tied_weights_keys}
    state = gather(blip2, {name: shape for name, shape in shapes.items() if name.startswith(SEEING)})
    for source, prefix, published in ((minigpt4, PROJECTION, LLAMA_PROJECTION), (vicuna, TEXT, "")):
        names = {published + name.removeprefix(prefix): name for name in shapes if name.startswith(prefix)}
        found = gather(source, {theirs: shapes[ours] for theirs, ours in names.items()})
        state |= {names[theirs]: tensor for theirs, tensor in found.items()}
    add_image_token(tokenizer, config, state)
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        folder = Path(scratch) / target.name
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        save_torch_state_dict(state, folder, max_shard_size=shard)
        folder.rename(target)
    return target


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``. Raises FileNotFoundError or ValueError that says what to fetch or install."""
    if not any((folder / name).is_file() for name in TOKENIZERS):  # transformers would make an empty one up
        raise FileNotFoundError(f"{folder}: no {' and no '.join(TOKENIZERS)}")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError, ImportError) as error:
        advice = "a tokenizer.model is read with `pip install sentencepiece protobuf`"
        raise ValueError(f"{folder}: its tokenizer cannot be read; {advice} ({error})") from None


def combine_configs(blip2: Path, vicuna: Path) -> Blip2Config:
    """BLIP-2's configuration with Vicuna in the place of its text model."""
    eyes, text = AutoConfig.from_pretrained(blip2), AutoConfig.from_pretrained(vicuna)
    for folder, config, wanted in ((blip2, eyes, "blip-2"), (vicuna, text, "llama")):
        if config.model_type != wanted:
            raise ValueError(f"{folder}/config.json: a model of type {config.model_type!r}, not {wanted!r}")
    return Blip2Config(
        vision_config=eyes.vision_config, qformer_config=eyes.qformer_config, text_config=text,
        num_query_tokens=eyes.num_query_tokens, architectures=["Blip2ForConditionalGeneration"],
    )  # fmt: skip


def add_image_token(tokenizer: PreTrainedTokenizerBase, config: Blip2Config, state: dict[str, Tensor]) -> None:
    """Give all three a placeholder for visual tokens, and the tokenizer a padding token if it has none.

    New rows of the word matrices are the mean of the old ones: no likelier than the average word. Their
    number is made a multiple of 64, as the hub's BLIP-2 has it, for matrix products are faster then.
    """
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    text = config.text_config
    text.vocab_size = -(-max(text.vocab_size, len(tokenizer)) // 64) * 64
    for name in WORDS:
        if name in state:
            rows = state[name]
            mean = rows.mean(0, keepdim=True, dtype=torch.float32).to(rows.dtype)
            state[name] = torch.cat([rows, mean.expand(text.vocab_size - len(rows), -1)])


def locate(source: Path) -> dict[str, Path]:
    """The file that holds each tensor of ``source``: a file of weights, or a folder as transformers saves."""
    if source.is_dir():
        for name in SAVED:
            if (index := source / f"{name}.index.json").is_file():
                return {tensor: source / file for tensor, file in read_index(index).items()}
            if (source / name).is_file():
                return locate(source / name)
        raise FileNotFoundError(f"{source}: no {' and no '.join(SAVED)}, whole or with an index of shards")
    return dict.fromkeys(open_weights(source), source)


def gather(source: Path, shapes: Mapping[str, Size]) -> dict[str, Tensor]:
    """The tensors of ``source`` that ``shapes`` names; only the files that hold them are opened.

    Raises ValueError naming file and tensor if one is not there or has another shape.
    """
    where, found = locate(source), {}
    files = {path: open_weights(path) for path in sorted({where[n] for n in shapes if n in where})}
    for name, shape in shapes.items():
        path = where.get(name, source)
        if name not in files.get(path, ()):
            raise ValueError(f"{path}: has no tensor {name!r}")
        found[name] = tensor = files[path][name]
        if tensor.shape != shape:
            raise ValueError(f"{path}: {name!r} has shape {tuple(tensor.shape)}, not {tuple(shape)}")
    return found


def open_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of one file by name, mapped from disk: what is not used is not read.

    A .safetensors file, or a pickle of nothing but tensors, under the key ``model`` or at its top. Raises
    FileNotFoundError, and ValueError for a file that is cut off or a pickle of anything else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # SafetensorError, RuntimeError, EOFError; UnpicklingError for code in a pickle
        refused = type(error).__name__ == "UnpicklingError"
        what = "refused, for it holds more than tensors" if refused else "cut off or damaged; fetch it again"
        raise ValueError(f"{path}: {what} ({error})") from None
    return loaded.get("model", loaded)


def outline(config: Blip2Config) -> Blip2ForConditionalGeneration:
    """The model without its weights: names and shapes only, on the meta device."""
    with torch.device("meta"):
        return Blip2ForConditionalGeneration(config)


def memory_needed(config: Blip2Config, dtype: torch.dtype) -> int:
    """Bytes of a model's weights and buffers in ``dtype``, float32 or bfloat16; activations come on top."""
    with torch.device("meta"):
        return Blip2ForConditionalGeneration._from_config(config, dtype=dtype).get_memory_footprint()
