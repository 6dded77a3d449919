"""The mini CLIPs, defined as open_clip configs: image–text contrast plus a region term.

The contrast is CLIP's, on the log-sum-exp of a phrase over an image's patches and, with less weight, on
the pooled image; an image on which the phrase fits as well is not counted as a negative. The region term
asks that a phrase's embedding *point at* the patches of what it names: a softmax of the phrase over its
image's own patch embeddings. For that a patch must know where it is and what lies next to it, which the
dense stage before it teaches. Real CLIPs acquire such things from scale; here they are taught, relations
("just left of the owl") with them.

``clip-mini-s`` is the light one, a fifth of ``clip-mini-l`` and taught for nearly five times as many steps. Pointing needs to
know which thing is meant and not what is asked of it, and nothing in it keeps "where" and "what" apart. So the states
of its words must also foretell the next word, as a captioner's do (CoCa, arXiv 2205.01917).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from mscke.benchmark.questions import Question, Reference, Unanswerable, references
from mscke.benchmark.scenes import HELD_OUT_FOLD, KINDS, PRETRAINING_FOLDS, Scene
from mscke.models.mllm import MEAN, STD
from mscke.pretraining.loop import train
from mscke.pretraining.questions import REFERENCE_WEIGHTS, pick, sample_question
from mscke.pretraining.text import build_tokenizer
from mscke.pretraining.vision import DenseHeads, cells_of_patches, draw, pixels, pretrain_vision

PATCH = 16
BY_NAME = 0.15  # share of phrases that name a thing directly, beside those drawn among all references
TEXT_WIDTH = 128
SIZES = {  # vision width, vision layers, text layers
    "clip-mini-b": (128, 4, 3),
    "clip-mini-l": (192, 5, 3),
    "clip-mini-s": (96, 2, 1),
}
NEXT_WORD = {"clip-mini-s": 0.3}  # weight of foretelling the next word; none for the others


def write_config(folder: Path, name: str) -> None:
    """Write an open_clip model config and tokenizer that ``create_model("local-dir:…")`` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    width, vision_layers, text_layers = SIZES[name]
    tokenizer = build_tokenizer()
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = {
        "model_cfg": {
            "embed_dim": width,
            "vision_cfg": {
                "image_size": 96, "layers": vision_layers, "width": width, "head_width": width // 4,
                "patch_size": PATCH, "output_tokens": True,
            },
            "text_cfg": {
                "context_length": 24, "vocab_size": len(tokenizer), "width": TEXT_WIDTH, "heads": 4,
                "layers": text_layers, "hf_tokenizer_name": name, "pool_type": "eos",
                "eos_id": eos, "pad_id": pad,
            },
        },
        "preprocess_cfg": {"mean": list(MEAN), "std": list(STD), "interpolation": "bicubic"},
    }  # fmt: skip
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", eos)])
    tokenizer.save_pretrained(folder)


def sample_phrase(rng: np.random.Generator, scene: Scene, by_name: float = 0.0) -> tuple[str, int, Reference]:
    """A text about one entity: (text, its cell, reference). Bare, as a question, or as an edit.

    ``by_name``: share of texts that ask for, or whether there is, something by its name.
    """
    while True:
        if by_name and rng.random() < by_name:
            entity = pick(rng, scene.entities)
            reference = Reference("name", entity.kind)
            exists = Question("exists", value=entity.kind, wording=int(rng.integers(6)))
            text = exists.text() if rng.random() < 0.5 else reference.phrase(int(rng.integers(2)))
            return text, entity.cell, reference
        if rng.random() < 0.4:
            entity = pick(rng, scene.entities)
            found = references(scene, entity)
            relations = [r for r in found if r.kind == "relation"]
            reference = pick(rng, relations if relations and rng.random() < 0.4 else found)
            return reference.phrase(int(rng.integers(2))), entity.cell, reference
        question: Question = sample_question(rng, scene)
        exists = question.attribute == "exists"
        reference = Reference("name", question.value) if exists else question.reference
        if reference is None or not fits(reference, scene):
            continue
        text = question.text()
        if question.attribute == "name" and rng.random() < 0.5:  # the form of an edit: prompt and new answer
            text += " " + pick(rng, tuple(KINDS))
        return text, reference.resolve(scene)[0].cell, reference


def fits(reference: Reference, scene: Scene) -> bool:
    try:
        reference.resolve(scene)
    except Unanswerable:
        return False
    return True


def encode(model, tokens: Tensor, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Text (T, d), pooled image (B, d) and patches (B, P, d) in the joint space; patch tokens (B, P, d_v); states
    of the words (T, L, d_w)."""
    with torch.autocast("cpu", torch.bfloat16):
        pooled, seen = model.visual(images)
        read = model.forward_intermediates(text=tokens, text_indices=1, normalize=False, normalize_intermediates=True)
        texts, words = read["text_features"], read["text_intermediates"][0]
        encoded = texts, pooled, seen @ model.visual.proj, seen, words
    return tuple(e.float() for e in encoded)


def next_word(words: Tensor, tokens: Tensor, embedding: Tensor, pad: int) -> Tensor:
    """Mean cross-entropy of each next token (T, L) given the word states (T, L, d_w), by the embeddings (V, d_w)."""
    return F.cross_entropy((words[:, :-1] @ embedding.T).flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=pad)


def pretrain_clip(name: str, folder: Path, work: Path, dense_steps: int, steps: int, seed: int):
    """Pretrain one mini CLIP and return it; its config and tokenizer are in ``folder``."""
    torch.manual_seed(seed)
    write_config(folder, name)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    width, init = SIZES[name][0], torch.nn.init
    for parameter in model.visual.transformer.parameters():
        if parameter.ndim == 2:
            init.normal_(parameter, std=0.8 * width**-0.5)
    init.normal_(model.token_embedding.weight, std=TEXT_WIDTH**-0.5)
    init.normal_(model.positional_embedding, std=0.5 * TEXT_WIDTH**-0.5)
    init.normal_(model.visual.positional_embedding, std=0.5)
    heads = DenseHeads(width, PATCH)
    pretrain_vision(model.visual, lambda x: model.visual(x)[1], heads, f"{name}-dense", dense_steps, work, seed)
    where = torch.from_numpy(cells_of_patches(PATCH))

    def batch(rng, n, folds, by_name=0.0):
        scenes = draw(rng, n, folds)
        phrases = [sample_phrase(rng, s, by_name) for s in scenes for _ in range(4)]
        return scenes, phrases, tokenizer([t for t, _, _ in phrases])

    def scores_of(texts, patches):
        """Similarity of every phrase to every patch of every image: (T, B, P)."""
        flat = F.normalize(patches, dim=-1).flatten(0, 1)
        return (20 * F.normalize(texts, dim=-1) @ flat.T).unflatten(1, patches.shape[:2])

    def pointing(scores, phrases):
        """Of each phrase over its own image: (scores (T, P), is the patch on what it names? (T, P))."""
        own = scores[torch.arange(len(phrases)), torch.arange(len(phrases)) // 4]
        return own, where == torch.tensor([cell for _, cell, _ in phrases]).unsqueeze(1)

    def step(rng: np.random.Generator, progress: float) -> dict[str, Tensor]:
        scenes, phrases, tokens = batch(rng, 40, PRETRAINING_FOLDS, by_name=BY_NAME)
        texts, pooled, patches, seen, words = encode(model, tokens, pixels(scenes))
        every = scores_of(texts, patches)
        scores, inside = pointing(every, phrases)
        region = -scores.log_softmax(-1).masked_fill(~inside, -torch.inf).logsumexp(-1).mean()
        own = torch.arange(len(phrases)) // 4
        ignored = torch.tensor([[fits(r, s) for s in scenes] for _, _, r in phrases])
        ignored[torch.arange(len(phrases)), own] = False
        contrast = F.cross_entropy(every.logsumexp(-1).masked_fill(ignored, -torch.inf), own)
        logits = model.logit_scale.exp() * F.normalize(texts, dim=-1) @ F.normalize(pooled, dim=-1).T
        pooled_contrast = F.cross_entropy(logits.masked_fill(ignored, -torch.inf), own)
        dense = heads(seen, scenes)["loss"]  # or the tower forgets what no phrase asks for at first
        losses = {
            "loss": region + contrast + 0.1 * pooled_contrast + dense,
            "region": region, "contrast": contrast, "pooled": pooled_contrast, "dense": dense,
        }  # fmt: skip
        if name in NEXT_WORD:
            losses["words"] = next_word(words, tokens, model.token_embedding.weight, tokenizer.tokenizer.pad_token_id)
            losses["loss"] = losses["loss"] + NEXT_WORD[name] * losses["words"]
        return losses

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        rng = np.random.default_rng([seed, 98])
        scenes, phrases, tokens = batch(rng, 200, HELD_OUT_FOLD)
        texts, _, patches, *_ = encode(model, tokens, pixels(scenes))
        scores, inside = pointing(scores_of(texts, patches), phrases)
        hit = inside.gather(1, scores.argmax(-1, keepdim=True)).squeeze(1)
        kinds = [r.kind for _, _, r in phrases]
        result = {"pointing": float(hit.float().mean())}
        for kind in REFERENCE_WEIGHTS:
            result[f"pointing_{kind}"] = float(hit[[k == kind for k in kinds]].float().mean())
        return result

    train(name, {"clip": model, "heads": heads.heads}, step, steps, 1e-3, work, seed, evaluate)
    return model
