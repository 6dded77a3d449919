"""``python -m mscke.models.pretrain [stage …]``: pretrain the mini models, stage by stage, resumably."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import Blip2VisionModel, LlamaForCausalLM, OPTForCausalLM

from mscke.models.mllm import BLIP2_FORMAT, MINIGPT4_FORMAT, PromptEncoder
from mscke.models.pretrain import bridge, clip, language, text, vision

WORK = Path("outputs/pretrain")
STEPS = {"opt": 4500, "llama": 4500, "vision": 2000, "clip-mini-b": 1600, "clip-mini-l": 1600}
DENSE_STEPS = 500


def run_language(family: str) -> None:
    torch.manual_seed({"opt": 0, "llama": 1}[family])
    tokenizer = text.build_tokenizer()
    if family == "opt":
        model, prompt = OPTForCausalLM(language.opt_config(tokenizer)), BLIP2_FORMAT
    else:
        model, prompt = LlamaForCausalLM(language.llama_config(tokenizer)), MINIGPT4_FORMAT
    encoder = PromptEncoder(tokenizer, prompt, language.N_CELLS)
    language.pretrain_language(model, encoder, tokenizer, family, STEPS[family], WORK)


def run_vision() -> None:
    torch.manual_seed(2)
    tower = Blip2VisionModel(bridge.vision_config())
    vision.pretrain_vision(
        tower, lambda x: tower(pixel_values=x).last_hidden_state[:, 1:], 160, 16, "vision", STEPS["vision"], WORK
    )


def run_clip(name: str) -> None:
    clip.pretrain_clip(name, WORK / name, WORK, DENSE_STEPS, STEPS[name], seed=3 + list(clip.SIZES).index(name))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", default=["opt", "llama"])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for stage in arguments.stages:
        if stage == "vision":
            run_vision()
        elif stage.startswith("clip"):
            run_clip(stage)
        else:
            run_language(stage)
