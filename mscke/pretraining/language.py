"""Language before pixels: the text models learn to look things up in nine symbolic visual tokens.

A visual token is the sum of the word embeddings of what lies in a cell (kind, card colour) and a
learned vector of the cell. The model that reads such tokens needs no pixels to learn binding ("which
cell is on the red card?"), which is what it learns last. The Q-Former is then taught to write the
same tokens from pixels (:mod:`mscke.pretraining.bridge`).

Questions that look one thing up come first, then all of them, then more of those learned last.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from mscke.benchmark.questions import OPPOSITE, Question
from mscke.benchmark.scenes import HELD_OUT_FOLD, Scene, neighbours
from mscke.models.decoding import answer_loss
from mscke.models.prompts import PromptEncoder
from mscke.pretraining.loop import train
from mscke.pretraining.questions import REFERENCE_WEIGHTS, sample_question
from mscke.pretraining.text import sample_episode, sample_fact
from mscke.pretraining.vision import draw

N_CELLS = 9
WIDTH, LAYERS, HEADS = 128, 4, 4
QUESTIONS, EPISODES = 6, 6  # questions a scene; scenes of a batch that are edited in context


def text_model(family: str, tokenizer) -> nn.Module:
    """A new text model of the family of BLIP-2 ("opt") or MiniGPT-4 ("llama")."""
    shared = {
        "vocab_size": len(tokenizer), "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "max_position_embeddings": 1024, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(
            intermediate_size=352, num_key_value_heads=HEADS, initializer_range=WIDTH**-0.5, tie_word_embeddings=True,
            **shared,
        ))  # fmt: skip
    return OPTForCausalLM(OPTConfig(
        word_embed_proj_dim=WIDTH, ffn_dim=4 * WIDTH, dropout=0.0, attention_dropout=0.0, layerdrop=0.0,
        init_std=WIDTH**-0.5, activation_function="gelu", **shared,
    ))  # fmt: skip


EASY_MIX = {"name": 0.5, "colour": 0.25, "place": 0.25}
EASY_REFERENCES = ("colour", "place", "name")
# Reverse look-ups ("where is the owl?"), presence and counts are learned last: they get more weight then.
# Last come what takes two steps: to look a neighbour up and then read it, and to count.
EASY, LATE, LAST = 0.1, 0.4, 0.55
LATE_MIX = {
    "name": 0.22, "category": 0.09, "flies": 0.03, "animal": 0.02, "food": 0.02,
    "colour": 0.18, "place": 0.18, "exists": 0.14, "count": 0.12,
}  # fmt: skip
LATE_REFERENCES = {"colour": 1.0, "place": 1.0, "relation": 2.0, "category": 0.6, "name": 3.0}
LAST_MIX = {
    "name": 0.26, "category": 0.1, "flies": 0.03, "animal": 0.02, "food": 0.02,
    "colour": 0.2, "place": 0.07, "exists": 0.1, "count": 0.2,
}  # fmt: skip
LAST_REFERENCES = {"colour": 0.5, "place": 0.5, "relation": 5.0, "category": 0.5, "name": 2.0}


class SymbolicTokens(nn.Module):
    """Writes a scene as nine visual tokens (B, 9, d) in the language model's embedding space.

    With ``neighbours`` a token also tells what lies next to its cell, as a real image's tokens do. "Just left of the
    owl" is then one look-up (the cell with an owl on its right), not two. Four linear maps, one a direction, are zero
    at first: a model that reads plain tokens can go on from there.
    """

    def __init__(self, language_model: nn.Module, tokenizer, neighbours: bool = False):
        super().__init__()
        self.cells = nn.Parameter(torch.randn(N_CELLS, WIDTH) * WIDTH**-0.5)
        self.empty = nn.Parameter(torch.randn(WIDTH) * WIDTH**-0.5)
        self.maps = nn.Parameter(torch.zeros(len(OPPOSITE), WIDTH, WIDTH)) if neighbours else None
        self._words = language_model.get_input_embeddings  # not a submodule: trained with its owner
        self._id = functools.cache(lambda word: tokenizer(" " + word, add_special_tokens=False)["input_ids"][0])

    def ids(self, scenes: list[Scene]) -> Tensor:
        """Token ids of (kind, card) by cell: long (2, B, 9), −1 where a cell is empty."""
        found = np.full((2, len(scenes), N_CELLS), -1, np.int64)
        for i, scene in enumerate(scenes):
            for e in scene.entities:
                found[:, i, e.cell] = self._id(e.kind), self._id(e.card)
        return torch.from_numpy(found)

    def forward(self, scenes: list[Scene]) -> Tensor:
        kinds, cards = self.ids(scenes)
        words = self._words()
        names = words(kinds.clamp(min=0))
        there = (kinds >= 0).unsqueeze(-1)
        tokens = torch.where(there, names + words(cards.clamp(min=0)), self.empty) + self.cells
        if self.maps is None:
            return tokens
        outside = names.new_zeros(len(names), 1, names.shape[-1])
        around = torch.cat([names * there, outside], 1)[:, NEXT_TO]  # (B, 9, 4, d)
        return tokens + torch.einsum("bcnd,nde->bce", around, self.maps)


# (9, 4): the cell next to each cell by direction; a tenth, empty one stands for "outside"
NEXT_TO = torch.tensor([[neighbours(cell).get(way, N_CELLS) for way in OPPOSITE] for cell in range(N_CELLS)])


class Lesson:
    """Draws training batches and computes their losses, from symbolic or from visual tokens."""

    def __init__(self, language_model, encoder, look):
        self.language_model, self.encoder, self.look = language_model, encoder, look

    def __call__(self, rng: np.random.Generator, progress: float = 1.0) -> dict[str, Tensor]:
        scenes = draw(rng, 16)
        easy = progress < EASY  # look one thing up first; relations, counts and contexts come later
        mix, kinds, weights = (EASY_MIX, EASY_REFERENCES, None) if easy else (None, (), None)
        if progress >= LATE:
            mix, weights = (LAST_MIX, LAST_REFERENCES) if progress >= LAST else (LATE_MIX, LATE_REFERENCES)
        questions = [(s, sample_question(rng, s, mix, kinds, weights)) for s in scenes for _ in range(QUESTIONS)]
        prompts, answers = prompted(self.encoder, questions)
        for question, answer in (sample_fact(rng) for _ in range(6)):
            prompts.append(self.encoder.prompt(question, False))
            answers.append(self.encoder.answer(answer))
        batch = self.encoder.collate(prompts, answers)
        visual = self.look(scenes)
        loss, hits = answer_loss(self.language_model, self.encoder, batch, visual.repeat_interleave(QUESTIONS, 0))
        told = visual.new_zeros(()) if easy else self._episodes(rng, scenes[:EPISODES], visual[:EPISODES])
        return {"loss": loss + 0.3 * told, "answer": loss, "episode": told, "hits": hits.float().mean()}

    def _episodes(self, rng: np.random.Generator, scenes: list[Scene], visual: Tensor) -> Tensor:
        """Loss of in-context edits ("New Fact: … Prompt: …")."""
        drawn = [sample_episode(rng, s) for s in scenes]
        prompts = [self.encoder.prompt(q.text(), True, context) for context, q, _ in drawn]
        answers = [self.encoder.answer(a) for _, _, a in drawn]
        return answer_loss(self.language_model, self.encoder, self.encoder.collate(prompts, answers), visual)[0]


def prompted(encoder: PromptEncoder, asked: list[tuple[Scene, Question]]) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the questions, and of their answers."""
    return [encoder.prompt(q.text(), True) for _, q in asked], [encoder.answer(q.answer(s)) for s, q in asked]


@torch.no_grad()
def accuracy(lesson: Lesson, n: int = 600, seed: int = 1) -> dict[str, float]:
    """Share of held-out scenes' questions whose every answer token is right, by reference kind."""
    rng = np.random.default_rng([seed, 99])
    scenes = draw(rng, n, HELD_OUT_FOLD)
    asked, right = [(s, sample_question(rng, s)) for s in scenes], []
    for i in range(0, n, 200):
        batch = lesson.encoder.collate(*prompted(lesson.encoder, asked[i : i + 200]))
        _, hits = answer_loss(lesson.language_model, lesson.encoder, batch, lesson.look(scenes[i : i + 200]))
        right += [bool(h.all()) for h in hits.split((batch.labels >= 0).sum(1).tolist())]
    kinds = [q.reference.kind if q.reference else q.attribute for _, q in asked]
    result = {"accuracy": float(np.mean(right))}
    for kind in (*REFERENCE_WEIGHTS, "exists", "count"):
        result[kind] = float(np.mean([r for r, k in zip(right, kinds, strict=True) if k == kind]))
    return result


def pretrain_language(language_model, symbols, encoder, name: str, steps: int, folder: Path, seed: int) -> None:
    """Train a text model on symbolic tokens; where they tell of neighbours, on the last mix of questions throughout."""
    lesson = Lesson(language_model, encoder, symbols)
    step = lesson if symbols.maps is None else lambda rng, _: lesson(rng)
    modules = {"language_model": language_model, "symbols": symbols}
    train(name, modules, step, steps, 1e-3, folder, seed, lambda: accuracy(lesson), muon=2e-3)
