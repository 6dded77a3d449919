"""What the language models read: their tokenizer, world facts, and in-context editing episodes."""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mscke.benchmark.facts import kind_facts, world_facts
from mscke.benchmark.questions import Question, Unanswerable, references
from mscke.benchmark.scenes import KINDS, Scene
from mscke.models.prompts import IN_CONTEXT, TEMPLATE
from mscke.pretraining.questions import pick, sample_question, vocabulary

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<image>", "<Img>", "</Img>", "###Human:", "###Assistant:"]


def build_tokenizer(vocab_size: int = 1536) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer in which the benchmark's words are single tokens."""
    texts = [*vocabulary(), *(" ".join(fact) for fact in (*kind_facts(), *world_facts()))]
    words = " ".join([*texts, (TEMPLATE + IN_CONTEXT).replace("{}", " ")]).split()
    # every distinct word weighs the same, so that rare names become single tokens too
    corpus = [f" {w}" for w in sorted(set(words))] * 4 + [TEMPLATE, IN_CONTEXT] * 40
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIALS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        additional_special_tokens=SPECIALS[4:],
    )  # fmt: skip


def sample_fact(rng: np.random.Generator) -> tuple[str, str]:
    """A text-only question and answer, about the world or about a kind."""
    return pick(rng, world_facts() if rng.random() < 0.6 else kind_facts())


def sample_episode(rng: np.random.Generator, scene: Scene) -> tuple[str, Question, str]:
    """An in-context edit of ``scene``: (context, question, answer after the edit).

    One or two facts make the context, so that the model reads a context of several.
    Half of the questions repeat the edit, reworded or not; the rest are any others.
    """
    context, after = "", scene
    for _ in range(int(rng.integers(1, 3))):
        entity = pick(rng, scene.entities)
        reference = pick(rng, references(scene, entity, ("colour", "place", "relation")))
        prompt = Question("name", reference, wording=int(rng.integers(6)))
        kind = pick(rng, tuple(KINDS))
        if any(e.kind == kind for e in after.entities):
            continue
        after = after.with_kind(entity.cell, kind)
        context += IN_CONTEXT.format(prompt.text(), kind)
        edited = prompt
    if not context:
        return sample_episode(rng, scene)
    if rng.random() < 0.5:
        question = Question("name", edited.reference, wording=int(rng.integers(6)))
    else:
        question = sample_question(rng, scene)
    try:
        return context, question, question.answer(after)
    except Unanswerable:
        return sample_episode(rng, scene)
