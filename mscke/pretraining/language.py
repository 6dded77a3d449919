"""Language before pixels: the text models learn to look things up in nine symbolic visual tokens.

A visual token is the sum of the word embeddings of what lies in a cell (kind, card colour) and a
learned vector of the cell. The model that reads such tokens needs no pixels to learn binding ("which
cell is on the red card?"), which is what it learns last. The Q-Former is then taught to write the
same tokens from pixels (:mod:`mscke.pretraining.bridge`).

Questions that look one thing up come first, then all of them, then more of those learned last.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, OPTConfig

from mscke.benchmark.questions import OPPOSITE
from mscke.benchmark.scenes import HELD_OUT_FOLD, KNOWN, PRETRAINING_FOLDS, Scene, neighbours, sample_scene_of
from mscke.models.prompts import Batch, PromptEncoder, embed
from mscke.pretraining.loop import train
from mscke.pretraining.questions import sample_question
from mscke.pretraining.text import sample_episode, sample_fact

N_CELLS = 9
WIDTH, LAYERS, HEADS = 128, 4, 4


def opt_config(tokenizer) -> OPTConfig:
    return OPTConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, word_embed_proj_dim=WIDTH, ffn_dim=4 * WIDTH,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, max_position_embeddings=1024,
        dropout=0.0, attention_dropout=0.0, layerdrop=0.0, init_std=WIDTH**-0.5, activation_function="gelu",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def llama_config(tokenizer) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=352, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=1024,
        initializer_range=WIDTH**-0.5, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


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
    """Writes a scene as nine visual tokens (B, 9, d) in the language model's embedding space."""

    def __init__(self, language_model: nn.Module, tokenizer, width: int):
        super().__init__()
        self.cells = nn.Parameter(torch.randn(N_CELLS, width) * width**-0.5)
        self.empty = nn.Parameter(torch.randn(width) * width**-0.5)
        self._words = language_model.get_input_embeddings  # not a submodule: trained with its owner
        self._id = lambda word: tokenizer(" " + word, add_special_tokens=False)["input_ids"][0]
        self._memo: dict[str, int] = {}

    def ids(self, scenes: list[Scene]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of (kind, card) by cell: two (B, 9) long arrays, −1 where a cell is empty."""
        kinds, cards = np.full((2, len(scenes), N_CELLS), -1, np.int64)
        for i, scene in enumerate(scenes):
            for e in scene.entities:
                for array, word in ((kinds, e.kind), (cards, e.card)):
                    if word not in self._memo:
                        self._memo[word] = self._id(word)
                    array[i, e.cell] = self._memo[word]
        return kinds, cards

    def forward(self, scenes: list[Scene]) -> Tensor:
        kinds, cards = (torch.from_numpy(a) for a in self.ids(scenes))
        words = self._words()
        names = words(kinds.clamp(min=0))
        there = (kinds >= 0).unsqueeze(-1)
        content = torch.where(there, names + words(cards.clamp(min=0)), self.empty)
        return content + self.cells + self.beside(names * there)

    def beside(self, names: Tensor) -> Tensor | float:
        """What a cell's token says of the cells next to it; ``names`` (B, 9, d), zero where empty."""
        return 0.0


class NeighbourTokens(SymbolicTokens):
    """Symbolic tokens that also tell what lies next to their cell, as a real image's tokens do.

    "Just left of the owl" is then one look-up (the cell with an owl on its right), not two. Four linear
    maps, one a direction, zero at first: a model that reads plain tokens can go on from there.
    """

    def __init__(self, language_model: nn.Module, tokenizer, width: int):
        super().__init__(language_model, tokenizer, width)
        self.maps = nn.Parameter(torch.zeros(len(OPPOSITE), width, width))

    def beside(self, names: Tensor) -> Tensor:
        nothing = names.new_zeros(len(names), 1, names.shape[-1])
        around = torch.cat([names, nothing], 1)[:, NEXT_TO]  # (B, 9, 4, d)
        return torch.einsum("bcnd,nde->bce", around, self.maps)


# (9, 4): the cell next to each cell by direction; a tenth, empty one stands for "outside"
NEXT_TO = torch.tensor([[neighbours(cell).get(way, N_CELLS) for way in OPPOSITE] for cell in range(N_CELLS)])


def answer_loss(
    language_model: nn.Module, encoder: PromptEncoder, batch: Batch, visual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy on answer tokens. Returns (loss, hits by token)."""
    embedded = embed(language_model, batch.ids, encoder.image_id, visual)
    out = language_model.model(inputs_embeds=embedded, attention_mask=batch.mask, use_cache=False)
    where = batch.labels >= 0
    logits = language_model.lm_head(out.last_hidden_state[where])
    labels = batch.labels[where]
    return F.cross_entropy(logits.float(), labels), logits.argmax(-1) == labels


class Lesson:
    """Draws training batches and computes their losses, from symbolic or from visual tokens."""

    def __init__(self, language_model, encoder, look, scenes=16, questions=6, facts=6, episodes=6, easy=0.0):
        self.language_model, self.encoder, self.look = language_model, encoder, look
        self.scenes, self.questions, self.facts, self.episodes, self.easy = (scenes, questions, facts, episodes, easy)

    def __call__(self, rng: np.random.Generator, progress: float = 1.0) -> dict[str, Tensor]:
        scenes = [sample_scene_of(rng, PRETRAINING_FOLDS, KNOWN) for _ in range(self.scenes)]
        easy = progress < self.easy  # look one thing up first; relations, counts and contexts come later
        mix, kinds, weights = (EASY_MIX, EASY_REFERENCES, None) if easy else (None, (), None)
        if progress >= LATE:
            mix, weights = (LAST_MIX, LAST_REFERENCES) if progress >= LAST else (LATE_MIX, LATE_REFERENCES)
        questions = [(s, sample_question(rng, s, mix, kinds, weights)) for s in scenes for _ in range(self.questions)]
        encoder = self.encoder
        prompts = [encoder.prompt(q.text(), True) for _, q in questions]
        answers = [encoder.answer(q.answer(s)) for s, q in questions]
        for question, answer in (sample_fact(rng) for _ in range(self.facts)):
            prompts.append(encoder.prompt(question, False))
            answers.append(encoder.answer(answer))
        batch = encoder.collate(prompts, answers)
        visual = self.look(scenes)
        seen = visual.repeat_interleave(self.questions, 0)
        loss, hits = answer_loss(self.language_model, encoder, batch, seen)
        told = visual.new_zeros(()) if easy else self._episodes(rng, scenes, visual)
        total = loss + 0.3 * told
        return {"loss": total, "answer": loss, "episode": told, "hits": hits.float().mean()}

    def _episodes(self, rng: np.random.Generator, scenes: list[Scene], visual: Tensor) -> Tensor:
        """Loss of in-context edits ("New Fact: … Prompt: …") on the first few scenes."""
        drawn = [sample_episode(rng, s) for s in scenes[: self.episodes]]
        prompts = [self.encoder.prompt(q.text(), True, context) for context, q, _ in drawn]
        answers = [self.encoder.answer(a) for _, _, a in drawn]
        batch = self.encoder.collate(prompts, answers)
        return answer_loss(self.language_model, self.encoder, batch, visual[: self.episodes])[0]


@torch.no_grad()
def accuracy(lesson: Lesson, n: int = 600, seed: int = 1) -> dict[str, float]:
    """Share of held-out scenes' questions whose every answer token is right, by reference kind."""
    rng = np.random.default_rng([seed, 99])
    scenes = [sample_scene_of(rng, HELD_OUT_FOLD, KNOWN) for _ in range(n)]
    questions = [sample_question(rng, s) for s in scenes]
    encoder, right = lesson.encoder, []
    for i in range(0, n, 200):
        part = list(zip(scenes[i : i + 200], questions[i : i + 200], strict=True))
        batch = encoder.collate(
            [encoder.prompt(q.text(), True) for _, q in part], [encoder.answer(q.answer(s)) for s, q in part]
        )
        visual = lesson.look([s for s, _ in part])
        _, hits = answer_loss(lesson.language_model, encoder, batch, visual)
        counts = (batch.labels >= 0).sum(1).tolist()
        right += [bool(h.all()) for h in hits.split(counts)]
    kinds = [q.reference.kind if q.reference else q.attribute for q in questions]
    result = {"accuracy": float(np.mean(right))}
    for kind in ("colour", "place", "relation", "category", "name", "exists", "count"):
        chosen = [r for r, k in zip(right, kinds, strict=True) if k == kind]
        result[kind] = float(np.mean(chosen))
    return result


def pretrain_language(language_model, encoder, tokenizer, name: str, steps: int, folder: Path, seed: int = 0):
    """Train a text model on symbolic tokens. Returns (language model, symbolic tokens)."""
    symbols = SymbolicTokens(language_model, tokenizer, WIDTH)
    lesson = Lesson(language_model, encoder, symbols, easy=EASY)
    modules = {"language_model": language_model, "symbols": symbols}
    train(name, modules, lesson, steps, 1e-3, folder, seed, lambda: accuracy(lesson), muon=2e-3)
    return language_model, symbols


def learn_neighbours(language_model, symbols: NeighbourTokens, encoder, name: str, steps: int, folder, seed=0):
    """Go on with tokens that tell of their neighbours, on the last stage's mix of questions."""
    lesson = Lesson(language_model, encoder, symbols)
    modules = {"language_model": language_model, "symbols": symbols}
    train(name, modules, lambda rng, _: lesson(rng), steps, 1e-3, folder, seed, lambda: accuracy(lesson), muon=2e-3)
