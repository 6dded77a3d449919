"""What one query takes at the paper's sizes, in FLOPs counted on shapes alone: nothing is fetched, little computed.

CLIP ViT-L/14 is open_clip's own definition. BLIP-2 OPT-2.7B is transformers' default vision tower (ViT-g) and
Q-Former with a text model of OPT's published shape (Zhang et al., arXiv:2205.01068, Tab. 1).
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import open_clip
import pandas as pd
import torch
import transformers as hf
from torch.utils.flop_counter import FlopCounterMode

from mscke.classifier import ScopeClassifier
from mscke.models.clip import WORDS, Features

OPT_2_7B = {
    "hidden_size": 2560, "word_embed_proj_dim": 2560, "ffn_dim": 10240, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 50272,
}  # fmt: skip


@torch.no_grad()
def paper_sizes(
    fusions: tuple[str, ...] = ("dot", "grounded"), tokens: int = 20, side: int = 364
) -> pd.DataFrame:
    """GFLOPs of one query, and as a share of the base model's: a row for the base model and for each fusion's
    classifier. ``tokens``: of the question and its answer; ``side``: of the base model's image, in pixels.
    """
    with torch.device("meta"):
        clip = open_clip.CLIP(**open_clip.get_model_config("ViT-L-14"))
        image, text = torch.empty(1, 3, 224, 224), torch.zeros(1, clip.context_length, dtype=torch.long)
        vision = hf.Blip2VisionConfig(image_size=side)
        parts = {"vision_config": vision, "qformer_config": hf.Blip2QFormerConfig()}
        config = hf.Blip2Config(**parts, text_config=hf.OPTConfig(**OPT_2_7B))
        base = hf.Blip2ForConditionalGeneration(config)
        picture, words = torch.empty(1, 3, side, side), config.num_query_tokens + tokens

        def answer() -> None:
            seen = base.vision_model(pixel_values=picture).last_hidden_state
            base.qformer(query_embeds=base.query_tokens, encoder_hidden_states=seen)
            base.language_model(inputs_embeds=torch.empty(1, words, OPT_2_7B["hidden_size"]))

        towers = _gflops(lambda: (clip.encode_image(image), clip.encode_text(text)))
        found = {"base model": _gflops(answer)}
    for fusion in fusions:
        found[fusion] = towers + _gflops(_head(clip, fusion))
    table = pd.DataFrame({"gflops": found}).rename_axis("part")
    return table.assign(share=table["gflops"] / table["gflops"]["base model"])


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
