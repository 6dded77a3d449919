"""What a language model reads: questions in a backbone's prompt format, as token ids, with visual tokens in their places."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AddedToken, PreTrainedTokenizerBase

TEMPLATE = "Question: {} Short answer:"
IN_CONTEXT = "New Fact: {} {}\nPrompt: "
IMAGE_TOKEN = "<image>"


class TooLong(ValueError):
    """A text has more tokens than its model has room for; the message names the text, its tokens and the room."""


@dataclass(frozen=True)
class PromptFormat:
    """How a backbone wraps its visual tokens: ``start`` ``before`` <visual tokens> ``after`` question.

    Each piece is tokenised by itself, as the releases do: Llama's tokens differ after a start token.
    A generated answer ends at ``stop``. Only these pieces hold control tokens. Where a vocabulary has no token for
    a piece, as Vicuna has none for "###Human:", the same words of a user are the same plain tokens.
    """

    start: str
    before: str
    after: str
    stop: str


BLIP2_FORMAT = PromptFormat("", "", "</s>", stop="\n")  # visual tokens first, then OPT's start token
MINIGPT4_FORMAT = PromptFormat("<s>", "###Human: <Img>", "</Img> ", stop="###")
FORMATS = {"opt": BLIP2_FORMAT, "llama": MINIGPT4_FORMAT}


@dataclass(frozen=True)
class Batch:
    """Token sequences, padded on one side.

    All (B, L) long. ``mask`` is 1 on real tokens; ``labels``: the token to be predicted *at* each position of the
    answer, −100 elsewhere.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor


class PromptEncoder:
    """Turns questions (and answers) into token ids, with placeholders for the visual tokens.

    Questions, answers and contexts are text, whatever they say: "</s>" in one is four characters.
    ``positions``: how many tokens the model has room for; a prompt leaves ``reserve`` of them to its answer.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: PromptFormat, n_visual: int, positions: float = math.inf,
        reserve: int = 0,
    ):  # fmt: skip
        self.tokenizer, self.n_visual, self.stop = tokenizer, n_visual, prompt.stop
        self.positions, self.reserve = positions, reserve
        # as transformers' processor of BLIP-2 does; nothing is added where it is there already
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
        self.image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.eos_id, self.pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        # here, and only here, "</s>" is a control token
        pieces = tokenizer([prompt.start, prompt.before, prompt.after], add_special_tokens=False)["input_ids"]
        self._image_prefix = [*pieces[0], *pieces[1], *[self.image_id] * n_visual, *pieces[2]]
        self._text_prefix = [tokenizer.bos_token_id]
        self._memo: dict[str, list[int]] = {}

    def text_ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts; no control token is among them."""
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def tokens(self, text: str) -> list[int]:
        """Token ids of ``text``, remembered: questions repeat."""
        if text not in self._memo:
            if len(self._memo) > 500_000:
                self._memo.clear()
            (self._memo[text],) = self.text_ids([text])
        return self._memo[text]

    def prompt(self, question: str, has_image: bool, context: str = "") -> list[int]:
        """Ids of the whole prompt. Raises :class:`TooLong` if the model has no room for it."""
        prefix = self._image_prefix if has_image else self._text_prefix
        told = self.text_ids([context])[0] if context else []
        asked = self.tokens(TEMPLATE.format(question))
        room = self.positions - len(prefix) - self.reserve
        if len(told) + len(asked) > room:
            raise TooLong(
                f"question {reprlib.repr(question)} has {len(asked):,} tokens, and its context {len(told):,}; the "
                f"model has room for {room:,} (of {self.positions:,} the picture and the format take "
                f"{len(prefix):,}, the answer {self.reserve:,}): shorten them"
            )
        return prefix + told + asked

    def prefix_length(self, has_image: bool) -> int:
        """How many tokens (visual ones included) precede the text."""
        return len(self._image_prefix if has_image else self._text_prefix)

    def answer(self, text: str, eos: bool = True) -> list[int]:
        """Ids of " answer" (the template's leading space), closed by the end token."""
        return self.tokens(" " + text) + ([self.eos_id] if eos else [])

    def collate(
        self, prompts: Sequence[list[int]], answers: Sequence[list[int]] | None = None, left: bool = False
    ) -> Batch:
        """Pad to the longest sequence: on the right to train and score, on the left to generate.

        Raises :class:`TooLong` if the model has no room for it.
        """
        answers = answers if answers is not None else [[]] * len(prompts)
        # the last answer token is predicted, never read
        rows = [p + a[:-1] if a else p for p, a in zip(prompts, answers, strict=True)]
        width = max(map(len, rows))
        if width > self.positions:
            answer = self.tokenizer.decode(answers[max(range(len(rows)), key=lambda i: len(rows[i]))])
            raise TooLong(
                f"a prompt and its answer have {width:,} tokens, and the model has room for {self.positions:,}: "
                f"shorten the answer {reprlib.repr(answer)}, or its prompt"
            )
        ids = np.full((len(rows), width), self.pad_id, np.int64)
        mask, labels = np.zeros_like(ids), np.full_like(ids, -100)
        for i, (row, prompt, answer) in enumerate(zip(rows, prompts, answers, strict=True)):
            start = width - len(row) if left else 0
            ids[i, start : start + len(row)] = row
            mask[i, start : start + len(row)] = 1
            if answer:
                first = start + len(prompt) - 1
                labels[i, first : first + len(answer)] = answer
        return Batch(torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(labels))


def embed(language_model: nn.Module, ids: Tensor, image_id: int, visual: Tensor | None) -> Tensor:
    """Word embeddings (B, L, d) with ``visual`` (V, n, d) put into the placeholders, row by row.

    ``visual`` holds one entry for each row of ``ids`` that has placeholders, in order.
    """
    embedded = language_model.get_input_embeddings()(ids)
    if visual is None or len(visual) == 0:
        return embedded
    places = (ids == image_id).unsqueeze(-1).expand_as(embedded)
    return embedded.masked_scatter(places, visual.to(embedded.dtype).reshape(-1))
