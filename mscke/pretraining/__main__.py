"""``python -m mscke.pretraining [stage …]``: pretrain the mini models, stage by stage, resumably.

Stages, in order: ``vision`` (patches name what lies under them), ``opt`` and ``llama`` (language before
pixels), ``blip2`` and ``minigpt4`` (Q-Former and projection by distillation, then joint training),
``clip-mini-b``, ``clip-mini-l`` and ``clip-mini-s``, ``card``. Each writes its curve as CSV beside the weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
from functools import partial

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Blip2VisionModel

from mscke.config import ASSETS, ROOT
from mscke.models.prompts import FORMATS, PromptEncoder
from mscke.pretraining import bridge, card, clip, language, text, vision

WORK = ROOT / "outputs" / "pretrain"
STEPS = {
    "vision": 700, "opt": 6000, "opt-neighbours": 1200, "llama": 6000, "llama-neighbours": 1200,
    "clip-mini-b": 500, "clip-mini-l": 650, "clip-mini-s": 4000,
    "blip2-distil": 800, "blip2-join": 1200, "minigpt4-distil": 300, "minigpt4-join": 700,
}  # fmt: skip
DENSE_STEPS = {"clip-mini-b": 400, "clip-mini-l": 400, "clip-mini-s": 1000}
SEEDS = {
    "opt": 0, "llama": 1, "vision": 2, "clip-mini-b": 3, "clip-mini-l": 4, "blip2": 5, "minigpt4": 6, "clip-mini-s": 7,
}  # fmt: skip


def encoder(family: str) -> PromptEncoder:
    return PromptEncoder(text.build_tokenizer(), FORMATS[family], language.N_CELLS)


def stage_state(name: str) -> dict[str, dict]:
    """Weights of a finished stage. Raises FileNotFoundError naming the command that makes them."""
    path = WORK / f"{name}.pt"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `python -m mscke.pretraining {name}` first")
    return torch.load(path, weights_only=True)["modules"]


def run_vision() -> None:
    torch.manual_seed(SEEDS["vision"])
    tower = Blip2VisionModel(bridge.vision_config())
    nn.init.normal_(tower.embeddings.position_embedding, std=1.0)  # as loud as the pixels
    look = lambda x: tower(pixel_values=x).last_hidden_state[:, 1:]  # noqa: E731
    heads = vision.DenseHeads(bridge.VISION_WIDTH, 16)
    vision.pretrain_vision(tower, look, heads, "vision", STEPS["vision"], WORK)


def run_language(family: str) -> None:
    torch.manual_seed(SEEDS[family])
    tokenizer = text.build_tokenizer()
    model = language.text_model(family, tokenizer)
    symbols = language.SymbolicTokens(model, tokenizer)
    language.pretrain_language(model, symbols, encoder(family), family, STEPS[family], WORK, seed=0)
    name = f"{family}-neighbours"
    model, symbols = symbolic(family)
    language.pretrain_language(model, symbols, encoder(family), name, STEPS[name], WORK, SEEDS[family])


def symbolic(stage: str) -> tuple[nn.Module, language.SymbolicTokens]:
    """The text model of a finished language stage, and its symbolic tokens, which may tell of their neighbours."""
    tokenizer, state = text.build_tokenizer(), stage_state(stage)
    model = language.text_model(stage.split("-")[0], tokenizer)
    symbols = language.SymbolicTokens(model, tokenizer, neighbours=True)
    model.load_state_dict(state["language_model"])
    symbols.load_state_dict(state["symbols"], strict=stage.endswith("-neighbours"))
    return model, symbols


def run_blip2() -> None:
    """BLIP-2-mini: a new Q-Former between the pretrained vision tower and OPT."""
    torch.manual_seed(seed := SEEDS["blip2"])
    tower = Blip2VisionModel(bridge.vision_config())
    tower.load_state_dict(stage_state("vision")["tower"])
    lm, symbols = symbolic("opt-neighbours")
    model = bridge.assemble(tower, lm, text.build_tokenizer())
    bridge.distil(model, symbols, "blip2-distil", STEPS["blip2-distil"], WORK, seed)
    bridge.join(model, encoder("opt"), "blip2-join", STEPS["blip2-join"], WORK, seed)
    save(model, "blip2-mini")


def run_minigpt4() -> None:
    """MiniGPT-4-mini: BLIP-2-mini's vision tower and Q-Former, frozen; a projection of its own; Llama."""
    torch.manual_seed(seed := SEEDS["minigpt4"])
    tokenizer = text.build_tokenizer()
    tower = Blip2VisionModel(bridge.vision_config())
    blip2 = bridge.assemble(tower, language.text_model("opt", tokenizer), tokenizer)
    blip2.load_state_dict(stage_state("blip2-join")["model"])
    lm, symbols = symbolic("llama-neighbours")
    model = bridge.assemble(blip2.vision_model, lm, tokenizer)
    model.qformer.load_state_dict(blip2.qformer.state_dict())
    model.query_tokens.data.copy_(blip2.query_tokens)
    bridge.distil(model, symbols, "minigpt4-distil", STEPS["minigpt4-distil"], WORK, seed, qformer=False)
    bridge.join(model, encoder("llama"), "minigpt4-join", STEPS["minigpt4-join"], WORK, seed, qformer=False)
    save(model, "minigpt4-mini")


def save(model: nn.Module, name: str) -> None:
    """Write a Blip2ForConditionalGeneration in half precision, with its tokenizer, in Hugging Face form."""
    model.half().save_pretrained(ASSETS / name)
    text.build_tokenizer().save_pretrained(ASSETS / name)


def run_clip(name: str) -> None:
    folder = ASSETS / name
    model = clip.pretrain_clip(name, folder, WORK, DENSE_STEPS[name], STEPS[name], SEEDS[name])
    weights = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors", metadata={"format": "pt"})


def run_card() -> None:
    """Copy the curves beside the weights, measure what the models can do, write the model card."""
    (ASSETS / "curves").mkdir(exist_ok=True)
    for path in sorted(WORK.glob("*.csv")):
        shutil.copy(path, ASSETS / "curves" / path.name)
    measured = card.measure(ASSETS)
    (ASSETS / "measured.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    (ASSETS / "README.md").write_text(card.render(measured, ASSETS), encoding="utf-8")


RUN = {
    "vision": run_vision, "opt": lambda: run_language("opt"), "blip2": run_blip2,
    "llama": lambda: run_language("llama"), "minigpt4": run_minigpt4,
    **{name: partial(run_clip, name) for name in clip.SIZES},
    "card": run_card,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mscke.pretraining", description=__doc__)
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"one of {', '.join(RUN)}; all by default")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if unknown := set(arguments.stages) - set(RUN):
        parser.error(f"unknown stage {sorted(unknown)}; choose from {', '.join(RUN)}")
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)  # tiny gradients cost ten times a normal number's time
    for stage in arguments.stages or RUN:
        RUN[stage]()


if __name__ == "__main__":
    main()
