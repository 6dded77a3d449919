"""The multimodal scope classifier (§3 of the paper): is a query within the scope of an edit?

CLIP encodes image and text; a *fusion* turns the two into one embedding z; the squared distance of
two embeddings gives ρ ∈ (0, 1). One embedding an (image, text) pair, so a memory is a matrix::

    classifier = ScopeClassifier("local-dir:…/clip-mini-l", fusion="dot")
    z_edit = classifier.embed([Query(t_e, i_e)], answers=[y_e])     # (1, d)
    z_test = classifier.embed(queries)                              # (B, d)
    rho = classifier.similarity(z_test, z_edit)                     # (B, 1)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import open_clip
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor, nn
from tqdm.auto import tqdm

from mscke.benchmark.sample import Query, open_image

FUSIONS = ("text", "concat", "dot_pooled", "cross", "dot")
SIMILARITIES = ("logistic", "exponential")


@dataclass(frozen=True)
class Features:
    """Frozen CLIP features of (B) pairs; (I) distinct images are shared between pairs.

    ``text`` (B, d) and ``pooled`` (I, d) lie in CLIP's joint space; ``tokens`` (I, P, d_v) are the
    image's patch tokens and ``keys`` (I, P, d) the same patches in the joint space; ``image`` (B,)
    says which image a pair has, −1 for none.
    """

    text: Tensor
    image: Tensor
    pooled: Tensor
    tokens: Tensor
    keys: Tensor

    def select(self, rows: Tensor) -> Features:
        return Features(self.text[rows], self.image[rows], self.pooled, self.tokens, self.keys)


class ClipEncoder:
    """A frozen CLIP loaded through open_clip; every image and every text is encoded once.

    ``name`` is anything ``open_clip.create_model`` takes: ``"ViT-L-14"`` with ``pretrained="openai"``,
    or ``"local-dir:<folder>"``.
    """

    def __init__(self, name: str, pretrained: str | None = None, batch_size: int = 256):
        self.model = open_clip.create_model(name, pretrained).eval().requires_grad_(False)
        self.model.visual.output_tokens = True
        self.tokenizer = open_clip.get_tokenizer(name)
        config = PreprocessCfg(**self.model.visual.preprocess_cfg)
        self.preprocess = image_transform_v2(config, is_train=False)
        self.batch_size = batch_size
        self._texts: dict[str, int] = {}
        self._images: dict[str, int] = {}
        self._text_table: list[Tensor] = []
        self._image_table: list[tuple[Tensor, Tensor, Tensor]] = []
        self.dim = self.model.visual.proj.shape[1]
        self.patch_dim = self.model.visual.proj.shape[0]

    @torch.inference_mode()
    def _add(self, known: dict[str, int], new: list[str], encode, table: list) -> None:
        for i in tqdm(range(0, len(new), self.batch_size), desc="CLIP", leave=False, disable=len(new) < 2000):
            part = new[i : i + self.batch_size]
            table.append(encode(part))
            known.update({key: len(known) + j for j, key in enumerate(part)})

    def _encode_images(self, paths: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        pixels = torch.stack([self.preprocess(open_image(p)) for p in paths])
        pooled, tokens = self.model.visual(pixels)
        return pooled, tokens, tokens @ self.model.visual.proj

    def __call__(self, queries: Sequence[Query], answers: Sequence[str] | None = None) -> Features:
        """Encode (B) queries; ``answers`` are appended to the text on the edit side."""
        texts = [q.question for q in queries]
        if answers is not None:
            texts = [f"{t} {a}" for t, a in zip(texts, answers, strict=True)]
        paths = [q.image for q in queries if q.image is not None]
        new_texts = [t for t in dict.fromkeys(texts) if t not in self._texts]
        new_paths = [p for p in dict.fromkeys(paths) if p not in self._images]
        encode_text = lambda part: self.model.encode_text(self.tokenizer(part))  # noqa: E731
        self._add(self._texts, new_texts, encode_text, self._text_table)
        self._add(self._images, new_paths, self._encode_images, self._image_table)
        if len(self._text_table) > 1:
            self._text_table[:] = [torch.cat(self._text_table)]
        if len(self._image_table) > 1:
            self._image_table[:] = [tuple(torch.cat(column) for column in zip(*self._image_table, strict=True))]
        text = self._text_table[0][[self._texts[t] for t in texts]]
        image = torch.tensor([self._images.get(q.image, -1) for q in queries])
        if not self._image_table:  # text only so far
            empty = text.new_zeros(1, 1, self.patch_dim)
            return Features(text, image, text.new_zeros(1, self.dim), empty, text.new_zeros(1, 1, self.dim))
        return Features(text, image, *self._image_table[0])


class ScopeClassifier(nn.Module, PyTorchModelHubMixin):
    """ρ(edit, query) from image and text, on a frozen CLIP. Only what is trained here is saved.

    ``fusion``: how text h_t and image h_i become z —

    * ``text``: the text alone;
    * ``concat``: [h_t; h_i], the pooled image, through one head;
    * ``dot_pooled``: the authors' released form, in which the text attends over *pooled* images. Over
      a single image the attention has one key, so it is the image itself: with a head for each half
      the image halves of two pairs on one image cancel, and ρ depends on the text alone;
    * ``cross``: learned multi-head cross-attention of the text over the patch tokens;
    * ``dot``: dot-product attention in CLIP's joint space, of the text over the image's patches.

    ``similarity``: with d² = ‖z_e − z_q‖²,

    * ``logistic`` (default): ρ = σ(s·(m − d²)) on unit vectors, s and m learned. Its log-likelihood
      is linear in d² wherever a pair is on the wrong side, so no pair stops training;
    * ``exponential``: ρ = exp(−d²) on unnormalised z, as released. At d² ≈ 60 its gradient for a pair
      that should be *out* is exact but useless, and ρ itself underflows for pairs that should be in.
    """

    def __init__(
        self,
        clip: str,
        pretrained: str | None = None,
        fusion: str = "dot",
        similarity: str = "logistic",
        width: int = 256,
        encoder: ClipEncoder | None = None,
    ):
        super().__init__()
        if fusion not in FUSIONS or similarity not in SIMILARITIES:
            raise ValueError(f"fusion must be one of {FUSIONS} and similarity one of {SIMILARITIES}")
        self.fusion, self.kind = fusion, similarity
        encoder = encoder or ClipEncoder(clip, pretrained)
        object.__setattr__(self, "encoder", encoder)  # frozen and shared: not part of the state
        d, d_v = encoder.dim, encoder.patch_dim
        self.no_image = nn.Parameter(torch.randn(d_v) * d_v**-0.5)  # stands for "there is no picture"
        self.temperature = nn.Parameter(torch.tensor(3.0))  # log; of the dot-product attention
        inputs = {"text": d, "concat": 2 * d, "dot_pooled": d, "cross": d + d_v + d, "dot": d + d_v + d}[fusion]
        self.head = nn.Sequential(
            nn.LayerNorm(inputs), nn.Linear(inputs, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        if fusion == "dot_pooled":
            self.image_head = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, width))
        if fusion == "cross":
            self.query = nn.Linear(d, d_v)
            self.attention = nn.MultiheadAttention(d_v, 4, batch_first=True)
        self.scale = nn.Parameter(torch.tensor(1.5))  # log s
        self.margin = nn.Parameter(torch.tensor(1.0))  # m

    def forward(self, f: Features) -> Tensor:
        """Embeddings z (B, width) of encoded pairs; unit vectors under ``logistic``."""
        if self.fusion == "text":
            return self._unit(self.head(f.text))
        blank = self.no_image @ self.encoder.model.visual.proj
        seen = (f.image >= 0).unsqueeze(-1)
        pooled = torch.where(seen, f.pooled[f.image], blank)
        if self.fusion == "concat":
            return self._unit(self.head(torch.cat([f.text, pooled], -1)))
        if self.fusion == "dot_pooled":
            halves = self._unit(self.head(f.text)), self._unit(self.image_head(pooled))
            return torch.cat(halves, -1) * (2**-0.5 if self.kind == "logistic" else 1.0)
        attended = torch.where(seen, self.attend(f)[0], self.no_image)
        return self._unit(self.head(torch.cat([f.text, attended, pooled], -1)))

    def attend(self, f: Features) -> tuple[Tensor, Tensor]:
        """What the text attends to: (attended patch tokens (B, d_v), weights (B, P))."""
        tokens = f.tokens[f.image]
        if self.fusion == "cross":
            attended, weights = self.attention(self.query(f.text).unsqueeze(1), tokens, tokens)
            return attended.squeeze(1), weights.squeeze(1)
        keys, query = F.normalize(f.keys[f.image], dim=-1), F.normalize(f.text, dim=-1)
        weights = (self.temperature.exp() * (keys @ query.unsqueeze(-1)).squeeze(-1)).softmax(-1)  # (B, P)
        return (weights.unsqueeze(1) @ tokens).squeeze(1), weights

    def _unit(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=-1) if self.kind == "logistic" else z

    def logit(self, distance: Tensor) -> Tensor:
        """log ρ/(1−ρ) from squared distances of any shape."""
        if self.kind == "logistic":
            return self.scale.exp() * (self.margin - distance)
        distance = distance.clamp(1e-6, 80.0)  # float32: beyond, ρ is 0 and log ρ − log(1−ρ) = −d²
        return -distance - torch.log(-torch.expm1(-distance))

    @torch.inference_mode()
    def embed(self, queries: Sequence[Query], answers: Sequence[str] | None = None) -> Tensor:
        """z (B, width) of queries, or of edits when their ``answers`` are given."""
        return self(self.encoder(queries, answers))

    @torch.inference_mode()
    def similarity(self, a: Tensor, b: Tensor) -> Tensor:
        """ρ (B, N) in (0, 1) between embeddings a (B, width) and b (N, width)."""
        return self.score(torch.cdist(a, b).square())

    @torch.inference_mode()
    def score(self, distance: Tensor) -> Tensor:
        """ρ from squared distances, as :class:`mscke.memory.EditMemory` returns them."""
        return self.logit(distance).sigmoid()

    def fingerprint(self) -> str:
        """Identifies the trained weights: a memory written by one classifier is not read by another."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
        return digest.hexdigest()[:16]
