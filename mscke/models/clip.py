"""A frozen CLIP, loaded through open_clip, and the features of (image, text) pairs that it gives.

Nothing here is trained. A scope classifier (:mod:`mscke.classifier`) reads :class:`Features`, whoever made
them: anything with ``text_dim``, ``dim``, ``patch_dim``, ``model`` and this call may stand for a CLIP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor

from mscke.benchmark.sample import Query, open_image
from mscke.models.attention import patch_cosine
from mscke.models.features import FeatureTable, ImageTable, fingerprint


@dataclass(frozen=True)
class Features:
    """Frozen CLIP features of (B) pairs; (I) distinct images are shared between pairs.

    ``text`` (B, d) and ``pooled`` (I, d) lie in CLIP's joint space; ``tokens`` (I, P, d_v) are the
    images' patch tokens; ``image`` (B,) says which image a pair has, −1 for none; ``cosine`` (B, P) is
    that of the text with each patch of its image in the joint space (anything without an image).
    """

    text: Tensor
    image: Tensor
    pooled: Tensor
    tokens: Tensor
    cosine: Tensor

    def select(self, rows: Tensor) -> Features:
        return replace(self, text=self.text[rows], image=self.image[rows], cosine=self.cosine[rows])


class ClipEncoder:
    """A frozen CLIP loaded through open_clip; every image and every text is encoded once.

    ``name`` is anything ``open_clip.create_model`` takes: ``"ViT-L-14"`` with ``pretrained="openai"``,
    or ``"local-dir:<folder>"``. ``cache``: a folder in which the features survive the process.
    """

    def __init__(self, name: str, pretrained: str | None = None, cache: Path | None = None):
        self.model = open_clip.create_model(name, pretrained).eval().requires_grad_(False)
        self.model.visual.output_tokens = True
        self.tokenizer = open_clip.get_tokenizer(name)
        picture = PreprocessCfg(**self.model.visual.preprocess_cfg)
        self.preprocess = image_transform_v2(picture, is_train=False)
        self.patch_dim, self.dim = self.model.visual.proj.shape
        self.text_dim = self.dim
        key = fingerprint(self.model)
        self.texts = FeatureTable(self._encode_texts, cache and cache / f"clip-text-{key}.safetensors")
        self.images = ImageTable(self._encode_images, cache and cache / f"clip-image-{key}.safetensors")

    def _encode_texts(self, texts: list[str]) -> tuple[Tensor]:
        return (self.model.encode_text(self.tokenizer(texts)),)

    def _encode_images(self, paths: list[str]) -> tuple[Tensor, Tensor]:
        return self.model.visual(torch.stack([self.preprocess(open_image(p)) for p in paths]))

    @torch.no_grad()
    def __call__(self, queries: Sequence[Query], answers: Sequence[str] | None = None) -> Features:
        """Encode (B) queries; ``answers`` are appended to the text on the edit side."""
        texts = side_texts(queries, answers)
        paths = list(dict.fromkeys(q.image for q in queries if q.image is not None))
        rows = self.texts(texts)
        text = self.texts.columns[0][rows]
        if not paths:
            nothing = torch.zeros(1, self.dim), torch.zeros(1, 1, self.patch_dim), torch.zeros(len(texts), 1)
            return Features(text, torch.full((len(texts),), -1), *nothing)
        rows = self.images(paths)
        pooled, tokens = (column[rows] for column in self.images.columns)
        place = {path: i for i, path in enumerate(paths)}
        image = torch.tensor([place.get(q.image, -1) for q in queries])
        cosine = patch_cosine(text, tokens @ self.model.visual.proj, image)
        return Features(text, image, pooled, tokens, cosine)


def side_texts(queries: Sequence[Query], answers: Sequence[str] | None) -> list[str]:
    """The text of each pair: t for a query, "t_e y_e" for an edit (§3)."""
    texts = [q.question for q in queries]
    return texts if answers is None else [f"{t} {a}" for t, a in zip(texts, answers, strict=True)]
