"""The multimodal language models that are edited: BLIP-2 and MiniGPT-4, one class for both.

``transformers.Blip2ForConditionalGeneration`` is the model in every case: MiniGPT-4 *is* BLIP-2's
vision tower and Q-Former with its own projection into a Llama text model. What differs between
the two is a :class:`PromptFormat`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from weakref import WeakMethod

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, Blip2ForConditionalGeneration, PreTrainedTokenizerBase

from mscke.benchmark.pictures import open_image
from mscke.benchmark.sample import Query
from mscke.models.decoding import NEW_TOKENS, Forced, ask_all, generate, teacher_force
from mscke.models.features import ImageTable
from mscke.models.names import fingerprint, loaded_from
from mscke.models.prompts import FORMATS, IMAGE_TOKEN, PromptEncoder

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's and BLIP-2's


def load_pixels(paths: Sequence[str], size: int) -> Tensor:
    """Images as BLIP-2 reads them: resized to ``size``², normalised; float32 (B, 3, size, size)."""
    images = [open_image(p) for p in paths]
    images = [i if i.size == (size, size) else i.resize((size, size), Image.Resampling.BICUBIC) for i in images]
    return normalise([np.asarray(i) for i in images])


def normalise(images: Sequence[np.ndarray]) -> Tensor:
    """uint8 images (H, W, 3) as BLIP-2 and CLIP read them: float32 (B, 3, H, W)."""
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


class MLLM:
    """A frozen multimodal language model that answers questions, in batches.

    What is frozen is remembered: an image's Q-Former features, and the answer to a question that
    was asked before. ``with_context`` prepends text (an in-context edit) to a question.
    ``image_size``: the side of the images it is shown, in pixels, its own if None; at another the vision
    tower's position embeddings are interpolated (the paper shows 364² to towers trained at 224²).
    ``batch_size``: how many queries at once it, and what is built on it, is asked; half as many images.
    """

    def __init__(
        self, model: Blip2ForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, name: str,
        cache: Path | None = None, image_size: int | None = None, batch_size: int = 128,
    ):  # fmt: skip
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name
        text, visual = model.config.text_config, model.config.num_query_tokens
        room = (text.max_position_embeddings, NEW_TOKENS)
        self.encoder = PromptEncoder(tokenizer, FORMATS[text.model_type], visual, *room)
        if model.config.image_token_index not in (None, self.encoder.image_id):
            raise ValueError(
                f"{name}: {IMAGE_TOKEN} is token {model.config.image_token_index} in the model's config but "
                f"{self.encoder.image_id} in its tokenizer; take both from one revision"
            )
        self.image_size = image_size or model.config.vision_config.image_size
        self.batch_size, self.cache = batch_size, cache
        self._answers: dict[Query, str] = {}
        self._forced: dict[tuple[Query, str], Forced] = {}

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, name: str, cache: Path | None = None, image_size: int | None = None,
        batch_size: int = 128, **kwargs,
    ) -> MLLM:  # fmt: skip
        """Load a model saved in transformers' own format (safetensors only).

        ``cache``: a folder in which the images' features survive the process. ``kwargs`` go to
        transformers: ``dtype`` (float32 unless told), ``device_map``, ``quantization_config``.
        """
        kwargs = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False} | kwargs
        model = Blip2ForConditionalGeneration.from_pretrained(folder, **kwargs)
        if cache:
            loaded_from(folder, model, cache, repr(kwargs.get("quantization_config")))
        return cls(model, AutoTokenizer.from_pretrained(folder), name, cache, image_size, batch_size)

    @cached_property
    def images(self) -> ImageTable:
        """The table of the images' features. It does not hold the model: this is gone once nobody else does."""
        table = f"qformer-{self.eyes()}-{self.image_size}"
        look = WeakMethod(self._look)
        compute = lambda paths: look()(paths)  # noqa: E731
        return ImageTable(compute, self.cache and self.cache / table, max(1, self.batch_size // 2))

    def make_room(self, answers: Iterable[str]) -> None:
        """Let it generate as many tokens as the longest of ``answers`` has: never fewer than before."""
        texts = sorted(set(answers))
        ids = self.encoder.text_ids([" " + text for text in texts]) if texts else []
        self.encoder.reserve = max([self.encoder.reserve, *map(len, ids)])

    def eyes(self) -> str:
        """Names the weights that see: two models on one vision tower and Q-Former share features."""
        queries = nn.ParameterList([self.model.query_tokens])  # the Q-Former's own, but kept beside it
        parts = (self.model.vision_model, self.model.qformer, queries)
        return "".join(fingerprint(part)[:8] for part in parts)

    def features(self, paths: Sequence[str]) -> Tensor:
        """Q-Former features (B, n, d_q) of images, computed once an image."""
        rows = self.images(paths)
        return self.images.columns[0][rows]

    def _look(self, paths: list[str]) -> tuple[Tensor]:
        return (self.look(load_pixels(paths, self.image_size)),)

    def look(self, pixels: Tensor) -> Tensor:
        """Q-Former features (B, n, d_q) of normalised pixels (B, 3, H, W)."""
        pixels = pixels.to(self.model.device, self.model.dtype)
        states = self.model.vision_model(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
        tokens = self.model.query_tokens.expand(len(pixels), -1, -1)
        return self.model.qformer(query_embeds=tokens, encoder_hidden_states=states)[0]

    def see(self, queries: Sequence[Query]) -> Tensor | None:
        """Visual tokens (V, n, d) of the queries that have an image, in order."""
        if not (paths := [q.image for q in queries if q.image is not None]):
            return None
        weight = self.model.language_projection.weight
        with torch.inference_mode():
            return self.model.language_projection(self.features(paths).to(weight.device, weight.dtype))

    def prompts(self, queries: Sequence[Query], contexts: Sequence[str] | None = None) -> list[list[int]]:
        """Token ids of (B) questions, each after its context if there are any.

        Raises :class:`mscke.models.prompts.TooLong`, naming the question, if the model has no room for one.
        """
        contexts = contexts or [""] * len(queries)
        return [self.encoder.prompt(q.question, q.image is not None, c) for q, c in zip(queries, contexts, strict=True)]

    def answer(self, queries: Sequence[Query], batch_size: int | None = None) -> list[str]:
        """Greedy answers to (B) queries, in lower case and without a closing stop."""
        new = [q for q in dict.fromkeys(queries) if q not in self._answers]
        self._answers.update(zip(new, self._ask(generate, new, batch_size), strict=True))
        return [self._answers[q] for q in queries]

    def force(self, queries: Sequence[Query], answers: Sequence[str], batch_size: int | None = None) -> list[Forced]:
        """Teacher-forced predictions of (B) gold answers."""
        pairs = list(zip(queries, answers, strict=True))
        new = [p for p in dict.fromkeys(pairs) if p not in self._forced]
        gold = [self.encoder.answer(answer, eos=False) for _, answer in new]
        found = self._ask(teacher_force, [query for query, _ in new], batch_size, gold)
        self._forced.update(zip(new, found, strict=True))
        return [self._forced[p] for p in pairs]

    def _ask(self, ask: Callable, queries: list[Query], batch_size: int | None, *answers: list[list[int]]) -> list:
        model, size = self.model.language_model, batch_size or self.batch_size
        return ask_all(ask, model, self.encoder, queries, self.see, size, self.prompts(queries), *answers)
