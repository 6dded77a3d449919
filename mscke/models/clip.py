"""A frozen CLIP, loaded through open_clip, and the features of (image, text) pairs that it gives.

Nothing here is trained. A scope classifier (:mod:`mscke.classifier`) reads :class:`Features`, whoever made
them: anything with ``text_dim``, ``dim``, ``patch_dim``, ``word_dim``, ``model`` and this call may stand for a CLIP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import open_clip
import regex as re
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import text_global_pool
from torch import Tensor

from mscke.benchmark.pictures import open_image
from mscke.benchmark.sample import Query
from mscke.models.attention import patch_cosine
from mscke.models.features import FeatureTable, ImageTable
from mscke.models.names import fingerprint
from mscke.models.room import Room

WORDS = 32  # of a text, that are kept: those of a real CLIP have room for 77


@dataclass(frozen=True)
class Features:
    """Frozen CLIP features of (B) pairs; (I) distinct images are shared between pairs.

    ``text`` (B, d) and ``pooled`` (I, d) lie in CLIP's joint space; ``tokens`` (I, P, d_v) are the
    images' patch tokens; ``image`` (B,) says which image a pair has, −1 for none; ``cosine`` (B, P) is
    that of the text with each patch of its image in the joint space (anything without an image).
    ``words`` (U, T, d_w) are the states of the words of distinct texts, zero where a text has ended;
    ``said`` (B,) says which of them a pair has.
    """

    text: Tensor
    image: Tensor
    pooled: Tensor
    tokens: Tensor
    cosine: Tensor
    words: Tensor
    said: Tensor

    def select(self, rows: Tensor) -> Features:
        per_pair = ("text", "image", "cosine", "said")
        return replace(self, **{name: getattr(self, name)[rows] for name in per_pair})

    def distinct(self, seen: bool = True) -> tuple[Features, Tensor]:
        """The pairs without their repetitions, in text alone unless the image is ``seen``; each one's place (B,) long.

        There are many: every record asks one of a few text-only questions.
        """
        if len(self.said) == 1:
            return self, torch.zeros(1, dtype=torch.long)
        key = self.said + len(self.words) * (self.image + 1) if seen else self.said
        found, place = key.unique(return_inverse=True)
        rows = torch.empty_like(found).scatter_(0, place, torch.arange(len(key)))
        return self.select(rows), place

    def parts(self) -> list[Features]:
        """To be computed one after the other: all pairs, or 1,024 at a time of those in half precision."""
        rows = torch.arange(len(self.text)).split(1024)
        return [self] if self.tokens.dtype == torch.float32 else [self.select(part) for part in rows]

    def to(self, device: torch.device) -> Features:
        """In float32 on ``device``, with the images and the words of these pairs alone."""
        if device.type == "cpu" and self.tokens.dtype == torch.float32:
            return self
        images, place = self.image.clamp(min=0).unique(return_inverse=True)
        image = torch.where(self.image >= 0, place, -1)
        texts, said = self.said.unique(return_inverse=True)
        seen = self.pooled[images], self.tokens[images]
        parts = [part.to(device) for part in (self.text, image, *seen, self.cosine, self.words[texts], said)]
        return Features(*(part.float() if part.is_floating_point() else part for part in parts))  # halves cross


class ClipEncoder:
    """A frozen CLIP loaded through open_clip; every image and every text is encoded once.

    ``name`` is anything ``open_clip.create_model`` takes: ``"ViT-L-14"`` with ``pretrained="openai"``,
    or ``"local-dir:<folder>"``. ``cache``: a folder in which the features survive the process. ``half``:
    images' features are kept in float16 and pairs read them where they lie, without a copy of their own.

    A CLIP reads so many tokens of a text and no more. A question that is cut is told of in a warning and counted
    (``room.cut``); an edit that would be cut is refused, for its answer stands last.
    """

    def __init__(self, name: str, pretrained: str | None = None, cache: Path | None = None, device="cpu", half=False):
        self.device, self.half = torch.device(device), half
        model = open_clip.create_model(name, pretrained, device=self.device)
        self.model = model.eval().requires_grad_(False)
        self.model.visual.output_tokens = True
        self.tokenizer = text_only(open_clip.get_tokenizer(name))
        self.room = Room(f"CLIP {Path(name).name}", self.tokenizer.context_length, self._lengths)
        picture = PreprocessCfg(**self.model.visual.preprocess_cfg)
        self.preprocess = image_transform_v2(picture, is_train=False)
        self.patch_dim, self.dim = self.model.visual.proj.shape
        self.text_dim, self.word_dim = self.dim, self.model.token_embedding.embedding_dim
        key = fingerprint(self.model)
        kept = {"dtype": torch.float16} if half else {}
        texts, images = (f"clip-{kind}-{key}{'-half' * half}" for kind in ("text", "image"))
        self.texts = FeatureTable(self._encode_texts, cache and cache / texts, **kept)
        self.images = ImageTable(self._encode_images, cache and cache / images, **kept)

    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Of tokenised texts (B, T): their embeddings (B, d), and the last states of their words (B, T, d_w).

        Of no more than :data:`WORDS` words: a question has fewer.
        """
        found = self.model.forward_intermediates(
            text=tokens, text_indices=1, normalize=False, normalize_intermediates=True
        )
        place = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens).unsqueeze(-1)
        end = text_global_pool(place, tokens, self.model.text_pool_type, self.model.text_eos_id)
        words = found["text_intermediates"][0] * (place <= end.unsqueeze(1))
        return found["text_features"], words[:, :WORDS]

    def _lengths(self, texts: list[str]) -> list[int]:
        """How many tokens they have, begin and end included, if nothing is cut."""
        if (words := getattr(self.tokenizer, "tokenizer", None)) is None:
            return [len(self.tokenizer.encode(text)) + 2 for text in texts]
        return [len(ids) for ids in words([self.tokenizer.clean_fn(text) for text in texts])["input_ids"]]

    def _encode_texts(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        return self.read(self.tokenizer(texts).to(self.device))

    def _encode_images(self, paths: list[str]) -> tuple[Tensor, Tensor]:
        pixels = torch.stack([self.preprocess(open_image(p)) for p in paths])
        return self.model.visual(pixels.to(self.device))

    @torch.no_grad()
    def __call__(self, queries: Sequence[Query], answers: Sequence[str] | None = None) -> Features:
        """Encode (B) queries; ``answers`` are appended to the text on the edit side.

        Raises :class:`mscke.models.prompts.TooLong` for an edit that would be cut.
        """
        texts = side_texts(queries, answers)
        self.room.check(texts, stored=answers is not None)
        paths = list(dict.fromkeys(q.image for q in queries if q.image is not None))
        said = self.texts(texts)
        embeddings, words = self.texts.columns
        text = embeddings[said].float()
        if not paths:
            nothing = torch.zeros(1, self.dim), torch.zeros(1, 1, self.patch_dim), torch.zeros(len(texts), 1)
            return Features(text, torch.full((len(texts),), -1), *nothing, words, said)
        rows = self.images(paths)
        if self.half:
            place = dict(zip(paths, rows.tolist(), strict=True))
        else:
            place = {path: i for i, path in enumerate(paths)}
        image = torch.tensor([place.get(q.image, -1) for q in queries])
        pooled, tokens = self.images.columns if self.half else (c[rows] for c in self.images.columns)
        found = Features(text, image, pooled, tokens, torch.zeros(len(text), 1), words, said)
        return replace(found, cosine=torch.cat([self._point(part) for part in found.parts()]))

    def _point(self, f: Features) -> Tensor:
        """Cosine of each text with its image's patches."""
        f = f.to(self.device)
        return patch_cosine(f.text, f.tokens @ self.model.visual.proj, f.image).cpu()


def text_only(tokenizer):
    """One of open_clip's tokenizers, from now on blind to its control tokens in what it is given."""
    if (words := getattr(tokenizer, "tokenizer", None)) is not None:  # a tokenizer of transformers in open_clip's coat
        words.split_special_tokens = True
    else:  # OpenAI's: its pattern begins with them
        marks = "|".join(tokenizer.decoder[i] for i in tokenizer.all_special_ids) + "|"
        pattern = tokenizer.pat.pattern.removeprefix(marks)
        tokenizer.pat = re.compile(pattern, tokenizer.pat.flags)
    return tokenizer


def side_texts(queries: Sequence[Query], answers: Sequence[str] | None) -> list[str]:
    """The text of each pair: t for a query, "t_e y_e" for an edit (§3)."""
    texts = [q.question for q in queries]
    return texts if answers is None else [f"{t} {a}" for t, a in zip(texts, answers, strict=True)]
