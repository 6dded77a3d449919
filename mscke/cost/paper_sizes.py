"""What one query takes at the paper's sizes: FLOPs counted on shapes alone, and seconds layer by layer. Nothing is fetched.

CLIP ViT-L/14 is open_clip's own definition, BLIP-2 OPT-2.7B is :mod:`mscke.models.shapes`'.

``python -m mscke.cost.paper_sizes`` prints both, and times the models whole, which takes 18 GB of memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import numpy as np
import open_clip
import pandas as pd
import torch
import transformers as hf
from torch.utils.flop_counter import FlopCounterMode

from mscke.classifier import ScopeClassifier
from mscke.cost.components import in_turns
from mscke.models.clip import WORDS, Features
from mscke.models.shapes import OPT_2_7B, blip2_config


@torch.no_grad()
def paper_sizes(fusions: tuple[str, ...] = ("dot", "grounded"), tokens: int = 20, side: int = 364) -> pd.DataFrame:
    """GFLOPs of one query, and as a share of the base model's: a row for the base model and for each fusion's
    classifier. ``tokens``: of the question and its answer; ``side``: of the base model's image, in pixels.
    """
    with torch.device("meta"):
        clip, base = _clip(), _blip2(side)
        found = {"base model": _gflops(_answer(base, tokens, side))}
        towers = _gflops(_encode(clip))
    for fusion in fusions:
        found[fusion] = towers + _gflops(_head(clip, fusion))
    table = pd.DataFrame({"gflops": found}).rename_axis("part")
    return table.assign(share=table["gflops"] / table["gflops"]["base model"])


def _clip() -> open_clip.CLIP:
    return open_clip.CLIP(**open_clip.get_model_config("ViT-L-14"))


def _blip2(side: int) -> hf.Blip2ForConditionalGeneration:
    return hf.Blip2ForConditionalGeneration(blip2_config("opt-2.7b", side))


def _encode(clip: open_clip.CLIP) -> Callable:
    image = torch.zeros(1, 3, 224, 224, device=clip.text_projection.device)
    text = torch.zeros(1, clip.context_length, dtype=torch.long, device=image.device)
    return lambda: (clip.encode_image(image), clip.encode_text(text))


def _answer(base: hf.Blip2ForConditionalGeneration, tokens: int, side: int) -> Callable:
    """One query through the base model: its image, and a prompt of ``tokens`` beside the visual ones."""
    words = base.config.num_query_tokens + tokens
    picture = torch.zeros(1, 3, side, side, device=base.device)
    prompt = torch.zeros(1, words, OPT_2_7B["hidden_size"], device=base.device)

    def answer() -> None:
        seen = base.vision_model(pixel_values=picture).last_hidden_state
        base.qformer(query_embeds=base.query_tokens, encoder_hidden_states=seen)
        base.language_model(inputs_embeds=prompt)

    return answer


@torch.inference_mode()
def whole_seconds(fusion: str = "grounded", repeats: int = 5, tokens: int = 20, side: int = 364) -> pd.DataFrame:
    """Seconds of one query on this processor, float32, through the whole models, of constant weights, in turns.

    Rows base model and classifier (CLIP's towers and the head of ``fusion``); columns seconds (median), lo, hi
    (least and greatest round), and share: of the base model's, round by round.
    """
    with torch.device("meta"):
        models = _blip2(side), _clip()
    base, clip = (_constant(model.to_empty(device="cpu")) for model in models)
    encode, head = _encode(clip), _head(clip, fusion)
    ways = {"base model": _answer(base, tokens, side), "classifier": lambda: (encode(), head())}
    taken = pd.DataFrame(in_turns(ways, repeats))
    columns = {"seconds": taken.median(), "lo": taken.min(), "hi": taken.max()}
    return pd.DataFrame(columns).assign(share=taken.div(taken["base model"], axis=0).median())


def _head(clip, fusion: str) -> Callable:
    """The trained part of a classifier on one pair of this CLIP's features."""
    patch, dim = clip.visual.proj.shape
    width, patches = clip.token_embedding.embedding_dim, clip.visual.grid_size[0] * clip.visual.grid_size[1]
    visual = SimpleNamespace(proj=torch.zeros(patch, dim))
    shapes = SimpleNamespace(
        text_dim=dim, dim=dim, patch_dim=patch, word_dim=width, model=SimpleNamespace(visual=visual)
    )
    classifier = ScopeClassifier("ViT-L-14", fusion=fusion, encoder=shapes)
    one = torch.zeros(1, dtype=torch.long)
    f = Features(
        torch.zeros(1, dim), one, torch.zeros(1, dim), torch.zeros(1, patches, patch),
        torch.zeros(1, patches), torch.ones(1, WORDS, width), one,
    )  # fmt: skip
    return lambda: classifier(f)


def _gflops(run: Callable) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e9


@torch.inference_mode()
def paper_seconds(
    depths: tuple[int, int] = (2, 4), repeats: int = 2, tokens: int = 20, side: int = 364
) -> pd.DataFrame:
    """Seconds of one query on this machine's processor, float32, at the paper's widths: a row a stack of layers.

    Each stack is timed at two ``depths``, in turns; its layers are alike, so that a + b · layers is the time of all.
    Weights are constants, for time does not depend on them. The language model only reads the prompt: further
    tokens of an answer would add to the base model's time. Columns part, stack, layers, seconds (median), and
    lo and hi, the least and greatest of ``repeats`` rounds.
    """
    rows, (low, high) = [], depths
    for part, name, layers, make in _stacks(tokens, side):
        few, more = in_turns({depth: make(depth) for depth in depths}, repeats).values()
        seconds = few + (more - few) / (high - low) * (layers - low)
        spread = {"seconds": np.median(seconds), "lo": seconds.min(), "hi": seconds.max()}
        rows.append({"part": part, "stack": name, "layers": layers} | spread)
    return pd.DataFrame(rows)


def _stacks(tokens: int, side: int) -> list[tuple[str, str, int, Callable[[int], Callable]]]:
    """(part, stack, its layers, what makes one of fewer: a call that passes one query through it)."""
    clip, opt = open_clip.get_model_config("ViT-L-14"), hf.OPTConfig(**OPT_2_7B)
    vision, former = hf.Blip2VisionConfig(image_size=side), hf.Blip2QFormerConfig()
    queries, patches = hf.Blip2Config().num_query_tokens, (side // vision.patch_size) ** 2 + 1

    def see(depth: int) -> Callable:
        model = _of(hf.Blip2VisionModel, vision, depth)
        return lambda: model(pixel_values=torch.rand(1, 3, side, side))

    def query(depth: int) -> Callable:
        model = _of(hf.Blip2QFormerModel, former, depth)
        asked, seen = (1, queries, former.hidden_size), (1, patches, former.encoder_hidden_size)
        return lambda: model(query_embeds=torch.rand(asked), encoder_hidden_states=torch.rand(seen))

    def read(depth: int) -> Callable:
        model = _of(hf.OPTForCausalLM, opt, depth)
        prompt = torch.rand(1, queries + tokens, opt.hidden_size)
        return lambda: model(inputs_embeds=prompt, logits_to_keep=1)

    def tower(of: str, depth: int) -> Callable:
        model = _constant(open_clip.CLIP(**clip | {f"{of}_cfg": clip[f"{of}_cfg"] | {"layers": depth}}))
        words = torch.zeros(1, model.context_length, dtype=torch.long)
        picture = torch.rand(1, 3, 224, 224)
        return lambda: model.encode_image(picture) if of == "vision" else model.encode_text(words)

    return [
        ("base model", "vision (ViT-g)", vision.num_hidden_layers, see),
        ("base model", "Q-Former", former.num_hidden_layers, query),
        ("base model", "language model (OPT-2.7B)", opt.num_hidden_layers, read),
        ("classifier", "CLIP image (ViT-L)", clip["vision_cfg"]["layers"], partial(tower, "vision")),
        ("classifier", "CLIP text", clip["text_cfg"]["layers"], partial(tower, "text")),
    ]


def _of(kind: type, config: hf.PreTrainedConfig, depth: int) -> torch.nn.Module:
    """A model of ``depth`` layers, without the seconds that drawing its weights would take."""
    with torch.device("meta"):
        model = kind(kind.config_class(**config.to_dict() | {"num_hidden_layers": depth}))
    return _constant(model.to_empty(device="cpu"))


def _constant(model: torch.nn.Module) -> torch.nn.Module:
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.fill_(0.01 if tensor.is_floating_point() else 0)
    return model.eval()


if __name__ == "__main__":
    for table in (paper_sizes(), paper_seconds(), whole_seconds()):
        print(table.round(3).to_string(), end="\n\n")
