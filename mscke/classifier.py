"""The multimodal scope classifier (§3 of the paper): is a query within the scope of an edit?

Three things differ from the authors' code: CLIP stays frozen (theirs is trained), ``dot`` attends over patches, as §3 has
it (theirs over pooled images), and ρ is logistic in the squared distance (theirs is exp(−d²)); their forms are options.

CLIP encodes image and text. A *fusion* turns the two into one embedding z. The squared distance of two embeddings gives
ρ ∈ (0, 1). A pair (image, text) has one embedding, so a memory of edits is a matrix::

    classifier = ScopeClassifier("local-dir:…/clip-mini-l", fusion="dot")
    z_edit = classifier.embed([Query(t_e, i_e)], answers=[y_e])     # (1, d)
    z_test = classifier.embed(queries)                              # (B, d)
    rho = classifier.similarity(z_test, z_edit)                     # (B, 1)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from mscke.benchmark.sample import Query
from mscke.models.attention import attend_folded, sum_patches
from mscke.models.clip import ClipEncoder, Features
from mscke.models.names import fingerprint
from mscke.storage.revision import SAME

FUSIONS = ("text", "concat", "dot_pooled", "cross", "dot")  # those that the paper speaks of
OURS = ("grounded",)
BLIND = ("text", "concat", "dot_pooled")  # to which thing of one picture is meant
SIMILARITIES = ("logistic", "exponential")


class ScopeClassifier(nn.Module, PyTorchModelHubMixin):
    """ρ(edit, query) from image and text, on a frozen CLIP. Only what is trained here is saved.

    ``fusion``: how the text h_t and the image h_i become z.

    * ``text``: the text alone.
    * ``concat``: [h_t; h_i], with the pooled image, through one head.
    * ``dot_pooled``: the authors' released form. The text attends over *pooled* images. Of a single image there is one
      key, so the attention gives that image, whatever the text. Two pairs on one image then differ in their text halves
      alone: ρ cannot depend on what the picture shows.
    * ``cross``: the text attends over the patch tokens, by learned multi-head cross-attention.
    * ``dot``: the text attends over the patches by dot products in CLIP's joint space. Of that only a
      temperature is learned. z = head([text; attended patches; pooled image]).
    * ``grounded`` (ours): ``dot``, and a few learned readers of the text's words. CLIP's one vector a text is made to find
      a thing in a picture. It tells *which* thing is meant better than *what* is asked of it. The states of the words tell both.

    ``similarity``: how d² = ‖z_e − z_q‖² becomes ρ.

    * ``logistic`` (default): ρ = σ(s·(m − d²)) on unit vectors; s and m are learned. Where a pair is on the wrong side,
      its log-likelihood is linear in d², so it goes on training.
    * ``exponential``: ρ = exp(−d²) on vectors of any length, as released. At d² ≈ 60 a loss on ρ has no gradient left, so
      both forms are trained through :meth:`logit`.
    """

    readers = 4  # of ``grounded``

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
        if fusion not in FUSIONS + OURS or similarity not in SIMILARITIES:
            raise ValueError(f"fusion must be one of {FUSIONS + OURS} and similarity one of {SIMILARITIES}")
        self.fusion, self.kind = fusion, similarity
        self.dim = 2 * width if fusion == "dot_pooled" else width
        encoder = encoder or ClipEncoder(clip, pretrained)
        object.__setattr__(self, "encoder", encoder)  # frozen and shared: not part of the state
        d_t, d, d_v = encoder.text_dim, encoder.dim, encoder.patch_dim
        self.no_image = nn.Parameter(torch.randn(d_v) * d_v**-0.5)  # stands for "there is no picture"
        self.temperature = nn.Parameter(torch.tensor(3.0))  # log; of the dot-product attention
        inputs = {"text": d_t, "dot_pooled": d_t, "concat": d_t + d}.get(fusion, d_t + d + d_v)
        inputs += self.readers * encoder.word_dim * (fusion == "grounded")
        self.head = nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width))
        if fusion == "dot_pooled":
            self.image_head = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, width))
        if fusion == "cross":
            self.query = nn.Linear(d_t, d_v)
            self.attention = nn.MultiheadAttention(d_v, 4, batch_first=True)
        if fusion == "grounded":
            self.reader = nn.Linear(encoder.word_dim, self.readers, bias=False)
        self.scale = nn.Parameter(torch.tensor(1.5))  # log s
        self.margin = nn.Parameter(torch.tensor(1.0))  # m

    def forward(self, f: Features) -> Tensor:
        """Embeddings z (B, dim) of encoded pairs; unit vectors under ``logistic``."""
        f, place = f.distinct(seen=self.fusion != "text")
        return self._fuse(f.to(self.scale.device)).index_select(0, place.to(self.scale.device))

    def _fuse(self, f: Features) -> Tensor:
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
        read = [self.read(f)[0]] if self.fusion == "grounded" else []
        return self._unit(self.head(torch.cat([f.text, attended, pooled, *read], -1)))

    def attend(self, f: Features) -> tuple[Tensor, Tensor]:
        """What the text attends to: (attended patch tokens (B, d_v), weights (B, P))."""
        f = f.to(self.scale.device)
        if self.fusion == "cross":
            return attend_folded(self.attention, self.query(f.text), f.tokens, f.image)
        weights = (self.temperature.exp() * f.cosine).softmax(-1)
        return sum_patches(weights, f.tokens, f.image), weights

    def read(self, f: Features) -> tuple[Tensor, Tensor]:
        """What the readers take from a text: (their word states side by side (B, readers · d_w), weights (B, T, readers))."""
        words = f.words[f.said]
        ended = ~words.any(-1, keepdim=True)
        weights = self.reader(words).masked_fill(ended, -torch.inf).softmax(1)
        return (weights.mT @ words).flatten(1), weights

    def _unit(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=-1) if self.kind == "logistic" else z

    def logit(self, distance: Tensor) -> Tensor:
        """log ρ/(1−ρ) from squared distances of any shape."""
        if self.kind == "logistic":
            return self.scale.exp() * (self.margin - distance)
        distance = distance.clamp(min=1e-6)
        return -distance - torch.log(-torch.expm1(-distance))

    @property
    def within(self) -> float:
        """Squared distance up to which two edits on one picture state the same fact (:mod:`mscke.storage.revision`).

        0 for a fusion that sees no more of a picture than its pooled vector.
        """
        edge = self.margin.item() if self.kind == "logistic" else math.log(2)  # where ρ is 0.5
        return 0.0 if self.fusion in BLIND else max(0.0, SAME * edge)

    @torch.inference_mode()
    def embed(self, queries: Sequence[Query], answers: Sequence[str] | None = None) -> Tensor:
        """z (B, dim) of queries, or of edits when their ``answers`` are given."""
        if not queries:
            return torch.empty(0, self.dim)
        return self.embed_features(self.encoder(queries, answers))

    @torch.inference_mode()
    def embed_features(self, f: Features) -> Tensor:
        """z (B, dim) of encoded pairs, on the CPU."""
        return torch.cat([self(part).cpu() for part in f.parts()])

    @torch.inference_mode()
    def similarity(self, a: Tensor, b: Tensor) -> Tensor:
        """ρ (B, N) in (0, 1) between embeddings a (B, dim) and b (N, dim)."""
        return self.score(torch.cdist(a, b).square())

    @torch.inference_mode()
    def score(self, distance: Tensor) -> Tensor:
        """ρ from squared distances, as :class:`mscke.memory.EditMemory` returns them."""
        logit = self.logit(distance.to(self.scale.device))
        return logit.clamp(-80, 15).sigmoid().cpu()  # beyond, float32 knows only 0 and 1

    def fingerprint(self) -> str:
        """Identifies what embeds, the frozen encoder included: a memory of one classifier is not read by another."""
        kinds = (type(part).__name__ for part in (self, self.encoder))
        made = (*kinds, self.fusion, self.kind, fingerprint(self), fingerprint(self.encoder.model))
        return hashlib.sha256(repr(made).encode()).hexdigest()[:16]
