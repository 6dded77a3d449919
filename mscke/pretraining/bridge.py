"""The bridge from pixels to language: Q-Former by distillation, then a short joint training.

The Q-Former's nine projected queries are regressed onto the symbolic tokens that the text model
already reads; vision stays frozen. MiniGPT-4-mini keeps BLIP-2-mini's vision tower and Q-Former and
learns a projection of its own, as MiniGPT-4 does.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2QFormerConfig, Blip2VisionConfig

from mscke.benchmark.scenes import HELD_OUT_FOLD, Scene
from mscke.models.prompts import IMAGE_TOKEN
from mscke.pretraining.language import N_CELLS, Lesson, accuracy
from mscke.pretraining.loop import train
from mscke.pretraining.vision import draw, pixels

VISION_WIDTH = 160


def vision_config() -> Blip2VisionConfig:
    return Blip2VisionConfig(
        hidden_size=VISION_WIDTH, intermediate_size=4 * VISION_WIDTH, num_hidden_layers=4,
        num_attention_heads=4, image_size=96, patch_size=16, initializer_range=VISION_WIDTH**-0.5,
    )  # fmt: skip


def assemble(vision_model: nn.Module, language_model: nn.Module, tokenizer) -> Blip2ForConditionalGeneration:
    """A Blip2ForConditionalGeneration around a vision tower and a text model; the Q-Former is new."""
    qformer = Blip2QFormerConfig(
        vocab_size=1, hidden_size=VISION_WIDTH, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=4 * VISION_WIDTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        cross_attention_frequency=1, encoder_hidden_size=VISION_WIDTH, initializer_range=VISION_WIDTH**-0.5,
    )  # fmt: skip
    config = Blip2Config(
        vision_config=vision_model.config, qformer_config=qformer, text_config=language_model.config,
        num_query_tokens=N_CELLS, image_text_hidden_size=VISION_WIDTH,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
    )  # fmt: skip
    model = Blip2ForConditionalGeneration(config)
    nn.init.normal_(model.query_tokens, std=1.0)  # zeros would keep the nine queries equal for ever
    model.vision_model.load_state_dict(vision_model.state_dict())
    model.language_model.load_state_dict(language_model.state_dict())
    return model


def looker(model: Blip2ForConditionalGeneration):
    """A function that paints scenes and returns their visual tokens (B, 9, d). Vision is frozen."""

    def look(scenes: list[Scene]) -> Tensor:
        with torch.no_grad():
            states = model.vision_model(pixel_values=pixels(scenes)).last_hidden_state
        queries = model.query_tokens.expand(len(scenes), -1, -1)
        seen = model.qformer(query_embeds=queries, encoder_hidden_states=states)[0]
        return model.language_projection(seen)

    return look


def freeze(model: Blip2ForConditionalGeneration, qformer: bool) -> None:
    """Freeze the vision tower, and the Q-Former too if asked; everything else trains."""
    model.requires_grad_(True)
    model.vision_model.requires_grad_(False)
    if qformer:
        model.qformer.requires_grad_(False)
        model.query_tokens.requires_grad_(False)


def distil(model, symbols: nn.Module, name: str, steps: int, folder: Path, seed: int, qformer: bool = True) -> None:
    """Regress the projected queries onto ``symbols(scene)``: squared error over the targets' variance."""
    look = looker(model)
    freeze(model, qformer=not qformer)
    model.language_model.requires_grad_(False)

    def error(scenes: list[Scene]) -> Tensor:
        with torch.no_grad():
            target = symbols(scenes)
        return (look(scenes) - target).square().mean() / target.var()

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        return {"held_out": float(error(draw(np.random.default_rng([seed, 97]), 256, HELD_OUT_FOLD)))}

    step = lambda rng, _: {"loss": error(draw(rng, 64))}  # noqa: E731
    train(name, {"model": model}, step, steps, 1e-3, folder, seed, evaluate, muon=2e-3)


def join(model, encoder, name: str, steps: int, folder: Path, seed: int, qformer: bool = True) -> None:
    """Train text model, projection and (for BLIP-2-mini) Q-Former together, from pixels."""
    freeze(model, qformer=not qformer)
    lesson = Lesson(model.language_model, encoder, looker(model))
    step = lambda rng, _: lesson(rng)  # noqa: E731 (the last mix of questions throughout)
    train(name, {"model": model}, step, steps, 5e-4, folder, seed, lambda: accuracy(lesson), muon=1e-3)
