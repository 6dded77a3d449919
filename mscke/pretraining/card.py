"""The model card: what the mini models can do, measured on scenes that no training saw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.stats import binomtest

from mscke.benchmark.facts import world_facts
from mscke.benchmark.questions import ATTRIBUTES, Question, references
from mscke.benchmark.sample import Query
from mscke.benchmark.scenes import HELD_OUT, HELD_OUT_FOLD
from mscke.models.decoding import generate
from mscke.models.mllm import MLLM
from mscke.pretraining.clip import SIZES, encode, sample_phrase
from mscke.pretraining.questions import REFERENCE_WEIGHTS, sample_question
from mscke.pretraining.vision import cells_of_patches, draw, pixels


def interval(right: list[bool] | np.ndarray) -> dict[str, float]:
    """Share in per cent with a 95 % Wilson interval, and n."""
    found = binomtest(int(np.sum(right)), len(right)).proportion_ci(method="wilson")
    shares = {"value": np.mean(right), "lo": found.low, "hi": found.high}
    return {name: round(100 * float(share), 2) for name, share in shares.items()} | {"n": len(right)}


@torch.inference_mode()
def hits(mllm: MLLM, scenes: list, questions: list[Question], batch: int = 250) -> list[bool]:
    """Whether greedy answers from rendered pixels are right, one question a scene."""
    answers = []
    for i in range(0, len(scenes), batch):
        visual = mllm.model.language_projection(mllm.look(pixels(scenes[i : i + batch])))
        prompts = [mllm.encoder.prompt(q.text(), True) for q in questions[i : i + batch]]
        answers += generate(mllm.model.language_model, mllm.encoder, prompts, visual)
    return [a == q.answer(s) for a, q, s in zip(answers, questions, scenes, strict=True)]


def measure_mllm(mllm: MLLM, n: int = 3000, seed: int = 7) -> dict[str, dict]:
    """Accuracy in per cent on held-out scenes: overall, by reference kind, by attribute, facts, held-out kinds."""
    rng = np.random.default_rng(seed)
    scenes = draw(rng, n, HELD_OUT_FOLD)
    questions = [sample_question(rng, s) for s in scenes]
    right = np.array(hits(mllm, scenes, questions))
    reference = np.array([q.reference.kind if q.reference else "none" for q in questions])
    attribute = np.array([q.attribute for q in questions])
    result = {"all questions": interval(right)}
    result |= {f"reference: {k}": interval(right[reference == k]) for k in REFERENCE_WEIGHTS}
    result |= {f"attribute: {k}": interval(right[attribute == k]) for k in ATTRIBUTES}
    facts = world_facts()
    answers = mllm.answer([Query(q) for q, _ in facts])
    result["world facts"] = interval([a == f.lower() for a, (_, f) in zip(answers, facts, strict=True)])
    unseen = []
    for scene in scenes[:600]:
        cell = scene.entities[0].cell
        changed = scene.with_kind(cell, HELD_OUT[int(rng.integers(len(HELD_OUT)))])
        unseen.append((changed, Question("name", references(changed, changed.at(cell), ("colour",))[0])))
    result["held-out kinds named"] = interval(hits(mllm, *map(list, zip(*unseen, strict=True))))
    return result


@torch.inference_mode()
def measure_clip(folder: Path, n: int = 500, seed: int = 7) -> dict[str, dict]:
    """Pointing accuracy in per cent: the best patch of a phrase lies on what it names."""
    name = f"local-dir:{folder}"
    model, tokenizer = open_clip.create_model(name), open_clip.get_tokenizer(name)
    rng = np.random.default_rng(seed)
    scenes = draw(rng, n, HELD_OUT_FOLD)
    phrases = [sample_phrase(rng, s) for s in scenes for _ in range(4)]
    text, _, patches, *_ = encode(model.eval(), tokenizer([t for t, _, _ in phrases]), pixels(scenes))
    scores = F.normalize(text, dim=-1).unflatten(0, (-1, 4)) @ F.normalize(patches, dim=-1).mT
    found = cells_of_patches(16)[scores.flatten(0, 1).argmax(-1).numpy()]
    right = found == np.array([cell for _, cell, _ in phrases])
    kinds = np.array([r.kind for _, _, r in phrases])
    of_kinds = {f"reference: {k}": interval(right[kinds == k]) for k in REFERENCE_WEIGHTS}
    return {"all phrases": interval(right)} | of_kinds


def measure(assets: Path) -> dict[str, dict]:
    """Everything the card reports, model by model."""
    mllms = {name: MLLM.from_pretrained(assets / PARTS[name][0], name) for name in ("BLIP-2-mini", "MiniGPT-4-mini")}
    measured = {name: measure_mllm(mllm) for name, mllm in mllms.items()}
    return measured | {name: measure_clip(assets / name) for name in SIZES}


PARTS = {
    "BLIP-2-mini": ("blip2-mini", ("vision", "opt", "opt-neighbours", "blip2-distil", "blip2-join")),
    "MiniGPT-4-mini": ("minigpt4-mini", ("llama", "llama-neighbours", "minigpt4-distil", "minigpt4-join")),
} | {name: (name, (f"{name}-dense", name)) for name in SIZES}


def render(measured: dict[str, dict], assets: Path) -> str:
    """The card as Markdown: the introduction that ``assets/README.md`` has, what was measured, and the curves' ends."""
    parts = [(assets / "README.md").read_text(encoding="utf-8").partition("\n\n## ")[0]]
    for name, (folder, stages) in PARTS.items():
        parts.append(f"\n## {name} (`{folder}/`)\n\n| stage | steps | minutes |\n|---|---:|---:|")
        for stage in stages:
            last = pd.read_csv(assets / "curves" / f"{stage}.csv").iloc[-1]
            parts.append(f"| {stage} | {int(last['step'])} | {last['seconds'] / 60:.1f} |")
        parts.append("\n| measured on held-out scenes | % | 95 % interval | n |\n|---|---:|---:|---:|")
        for what, m in measured[name].items():
            parts.append(f"| {what} | {m['value']:.1f} | {m['lo']:.1f} – {m['hi']:.1f} | {m['n']} |")
    return "\n".join(parts) + "\n"
