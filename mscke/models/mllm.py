"""The multimodal language models that are edited: BLIP-2 and MiniGPT-4, one class for both.

``transformers.Blip2ForConditionalGeneration`` is the model in every case: MiniGPT-4 *is* BLIP-2's
vision tower and Q-Former with its own projection into a Llama text model. What differs between
the two is a :class:`PromptFormat`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, Blip2ForConditionalGeneration, PreTrainedTokenizerBase

TEMPLATE = "Question: {} Short answer:"
IN_CONTEXT = "New Fact: {} {}\nPrompt: "
IMAGE_TOKEN = "<image>"


@dataclass(frozen=True)
class PromptFormat:
    """How a backbone wraps its visual tokens: ``before`` <visual tokens> ``after`` question."""

    before: str
    after: str


BLIP2_FORMAT = PromptFormat("", "</s>")  # visual tokens first, then OPT's start token
MINIGPT4_FORMAT = PromptFormat("<s>###Human: <Img>", "</Img> ")
FORMATS = {"opt": BLIP2_FORMAT, "llama": MINIGPT4_FORMAT}


@dataclass(frozen=True)
class Batch:
    """Token sequences, padded on one side.

    ``ids`` (B, L) long; ``mask`` (B, L) long, 1 on real tokens; ``labels`` (B, L) long: the token
    to be predicted *at* each position of the answer, −100 elsewhere.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor


class PromptEncoder:
    """Turns questions (and answers) into token ids, with placeholders for the visual tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: PromptFormat, n_visual: int):
        self.tokenizer, self.n_visual = tokenizer, n_visual
        self.image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.eos_id, self.pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        visual = [self.image_id] * n_visual
        self._image_prefix = self._ids(prompt.before) + visual + self._ids(prompt.after)
        self._text_prefix = [tokenizer.bos_token_id]
        self._memo: dict[str, list[int]] = {}

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def tokens(self, text: str) -> list[int]:
        """Token ids of ``text``, remembered: questions repeat."""
        if text not in self._memo:
            if len(self._memo) > 500_000:
                self._memo.clear()
            self._memo[text] = self._ids(text)
        return self._memo[text]

    def prompt(self, question: str, has_image: bool, context: str = "") -> list[int]:
        prefix = self._image_prefix if has_image else self._text_prefix
        return prefix + (self._ids(context) if context else []) + self.tokens(TEMPLATE.format(question))

    def answer(self, text: str, eos: bool = True) -> list[int]:
        """Ids of " answer" (the template's leading space), closed by the end token."""
        return self.tokens(" " + text) + ([self.eos_id] if eos else [])

    def collate(
        self, prompts: Sequence[list[int]], answers: Sequence[list[int]] | None = None, left: bool = False
    ) -> Batch:
        """Pad to the longest sequence: on the right to train and score, on the left to generate."""
        answers = answers if answers is not None else [[]] * len(prompts)
        # the last answer token is predicted, never read
        rows = [p + a[:-1] if a else p for p, a in zip(prompts, answers, strict=True)]
        width = max(map(len, rows))
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


def normalise_answer(text: str) -> str:
    """Case, surrounding space and closing stop do not matter; all else does (exact match)."""
    return " ".join(text.lower().strip().rstrip(".").split())


class MLLM:
    """A frozen multimodal language model that answers questions, in batches.

    Visual features are computed once an image (:meth:`see`) and shared by its questions.
    """

    def __init__(self, model: Blip2ForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, name: str):
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        prompt = FORMATS[model.config.text_config.model_type]
        self.encoder = PromptEncoder(tokenizer, prompt, model.config.num_query_tokens)

    @classmethod
    def from_pretrained(cls, folder: str | Path, name: str, **kwargs) -> MLLM:
        """Load a model saved in transformers' own format (safetensors only)."""
        model = Blip2ForConditionalGeneration.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, **kwargs
        )
        return cls(model, AutoTokenizer.from_pretrained(folder), name)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def language_model(self) -> nn.Module:
        return self.model.language_model

    @torch.inference_mode()
    def qformer(self, pixels: Tensor, batch_size: int = 256) -> Tensor:
        """Q-Former output (B, n, d_q) of images (B, 3, H, W): what is frozen, and so cached."""
        outputs = []
        for part in pixels.split(batch_size):
            part = part.to(self.device, self.model.dtype)
            states = self.model.vision_model(pixel_values=part).last_hidden_state
            tokens = self.model.query_tokens.expand(len(part), -1, -1)
            outputs.append(self.model.qformer(query_embeds=tokens, encoder_hidden_states=states)[0])
        return torch.cat(outputs)

    def project(self, features: Tensor) -> Tensor:
        """Visual tokens (B, n, d) of the language model, from Q-Former features."""
        return self.model.language_projection(features.to(self.model.language_projection.weight.dtype))
