"""What a language model says to a batch of prompts: greedy answers, or predictions given the gold ones (§5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mscke.benchmark.answers import strict_answer
from mscke.benchmark.sample import Query
from mscke.models.prompts import Batch, PromptEncoder, embed

NEW_TOKENS = 6  # at most, of an answer, unless the track's records have longer ones


@torch.inference_mode()
def generate(
    language_model: nn.Module, encoder: PromptEncoder, prompts: list[list[int]], visual: Tensor | None,
    max_new_tokens: int | None = None,
) -> list[str]:  # fmt: skip
    """Greedy answers, of at most ``max_new_tokens`` (the encoder's ``reserve``, unless given).

    ``visual`` (V, n, d): one entry for each prompt with placeholders, in order.
    """
    batch = encoder.collate(prompts, left=True)
    device = next(language_model.parameters()).device
    ids, mask = batch.ids.to(device), batch.mask.to(device)
    tokens = language_model.generate(
        inputs_embeds=embed(language_model, ids, encoder.image_id, visual), attention_mask=mask,
        max_new_tokens=max_new_tokens or encoder.reserve or NEW_TOKENS, do_sample=False, pad_token_id=encoder.pad_id,
        eos_token_id=encoder.eos_id,
    )  # fmt: skip
    return said(encoder, tokens)


def said(encoder: PromptEncoder, tokens: Tensor | list[list[int]]) -> list[str]:
    """Answers (B) of these token ids, up to where one stops: as said, but in lower case and without a closing stop."""
    texts = encoder.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [strict_answer(text.split(encoder.stop)[0]) for text in texts]


@dataclass(frozen=True)
class Forced:
    """One answer under teacher forcing: ``hits`` (T,) bool by answer token, ``top`` (L, k) token ids
    at every position (visual tokens, prompt, answer), most likely first; ``ends``: the end is predicted after it."""

    hits: np.ndarray
    top: np.ndarray
    ends: bool = False

    def is_greedy(self, limit: int = NEW_TOKENS) -> bool:
        """Whether greedy decoding of at most ``limit`` tokens would say just this: each is the most likely one, and so
        is the end."""
        return bool(self.ends and self.hits.all() and len(self.hits) <= limit)


@torch.inference_mode()
def teacher_force(
    language_model: nn.Module, encoder: PromptEncoder, prompts: list[list[int]], answers: list[list[int]],
    visual: Tensor | None, k: int = 10,
) -> list[Forced]:  # fmt: skip
    """Predict every token given the gold ones before it (the paper's protocol), and whether the answer ends there."""
    batch = encoder.collate(prompts, [[*answer, encoder.eos_id] for answer in answers])
    device = next(language_model.parameters()).device
    ids, mask = batch.ids.to(device), batch.mask.to(device)
    logits = language_model(
        inputs_embeds=embed(language_model, ids, encoder.image_id, visual), attention_mask=mask, use_cache=False
    ).logits
    top = logits.topk(k, -1).indices.cpu().numpy().astype(np.int32)
    labels, lengths = batch.labels.numpy(), batch.mask.sum(1).tolist()
    found = []
    for t, row, n in zip(top, labels, lengths, strict=True):
        *hits, ends = t[row >= 0, 0] == row[row >= 0]
        found.append(Forced(np.array(hits, bool), t[: n - 1], bool(ends)))
    return found


def answer_loss(
    language_model: nn.Module, encoder: PromptEncoder, batch: Batch, visual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the answers' tokens, and whether each of them (all rows in one) is the most likely one."""
    device = next(language_model.parameters()).device
    ids, mask, labels = (part.to(device) for part in (batch.ids, batch.mask, batch.labels))
    embedded = embed(language_model, ids, encoder.image_id, visual)
    hidden = language_model.model(inputs_embeds=embedded, attention_mask=mask, use_cache=False).last_hidden_state
    logits, labels = language_model.lm_head(hidden[labels >= 0]), labels[labels >= 0]
    return F.cross_entropy(logits.float(), labels), logits.argmax(-1) == labels


def in_batches(n: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def by_length(prompts: list[list[int]], ask: Callable[[list[int]], list], size: int) -> list:
    """``ask`` of all rows, ``size`` at a time and about as long as each other; results in the prompts' order."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found = [result for part in in_batches(len(order), size) for result in ask(order[part])]
    return [found[place] for place in sorted(range(len(order)), key=order.__getitem__)]


def ask_all(
    ask: Callable, language_model: nn.Module, encoder: PromptEncoder, queries: Sequence[Query], see: Callable,
    size: int, prompts: list[list[int]], *answers: list[list[int]],
) -> list:  # fmt: skip
    """:func:`generate` or :func:`teacher_force` of (B) queries, ``size`` at a time; ``see`` gives their visual tokens."""

    def some(rows: list[int]) -> list:
        texts = ([text[i] for i in rows] for text in (prompts, *answers))
        return ask(language_model, encoder, *texts, see([queries[i] for i in rows]))

    return by_length(prompts, some, size)
