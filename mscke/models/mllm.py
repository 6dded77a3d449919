"""The multimodal language models that are edited: BLIP-2 and MiniGPT-4, one class for both.

``transformers.Blip2ForConditionalGeneration`` is the model in every case: MiniGPT-4 *is* BLIP-2's
vision tower and Q-Former with its own projection into a Llama text model. What differs between
the two is a :class:`PromptFormat`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AddedToken, AutoTokenizer, Blip2ForConditionalGeneration, PreTrainedTokenizerBase

from mscke.benchmark.sample import Query, open_image
from mscke.models.features import ImageTable, fingerprint

TEMPLATE = "Question: {} Short answer:"
IN_CONTEXT = "New Fact: {} {}\nPrompt: "
IMAGE_TOKEN = "<image>"


MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's and BLIP-2's


def load_pixels(paths: Sequence[str], size: int) -> Tensor:
    """Images as BLIP-2 reads them: resized to ``size``², normalised; float32 (B, 3, size, size)."""
    images = [open_image(p) for p in paths]
    images = [
        i if i.size == (size, size) else i.resize((size, size), Image.Resampling.BICUBIC) for i in images
    ]
    pixels = torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@dataclass(frozen=True)
class PromptFormat:
    """How a backbone wraps its visual tokens: ``start`` ``before`` <visual tokens> ``after`` question.

    Each piece is tokenised by itself, as the releases do: Llama's tokens differ after a start token.
    A generated answer ends at ``stop``.
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

    ``ids`` (B, L) long; ``mask`` (B, L) long, 1 on real tokens; ``labels`` (B, L) long: the token
    to be predicted *at* each position of the answer, −100 elsewhere.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor


class PromptEncoder:
    """Turns questions (and answers) into token ids, with placeholders for the visual tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: PromptFormat, n_visual: int):
        self.tokenizer, self.n_visual, self.stop = tokenizer, n_visual, prompt.stop
        # as transformers' processor of BLIP-2 does; nothing is added where it is there already
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
        self.image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.eos_id, self.pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        visual = [self.image_id] * n_visual
        self._image_prefix = (
            self._ids(prompt.start) + self._ids(prompt.before) + visual + self._ids(prompt.after)
        )
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

    def prefix_length(self, has_image: bool) -> int:
        """How many tokens (visual ones included) precede the text."""
        return len(self._image_prefix if has_image else self._text_prefix)

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
    return " ".join(text.lower().split()).rstrip(". ")


@torch.inference_mode()
def generate(
    language_model: nn.Module,
    encoder: PromptEncoder,
    prompts: list[list[int]],
    visual: Tensor | None,
    max_new_tokens: int = 6,
) -> list[str]:
    """Greedy answers. ``visual`` (V, n, d): one entry for each prompt with placeholders, in order."""
    batch = encoder.collate(prompts, left=True)
    device = next(language_model.parameters()).device
    ids, mask = batch.ids.to(device), batch.mask.to(device)
    tokens = language_model.generate(
        inputs_embeds=embed(language_model, ids, encoder.image_id, visual), attention_mask=mask,
        max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=encoder.pad_id,
        eos_token_id=encoder.eos_id,
    )  # fmt: skip
    texts = encoder.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [normalise_answer(text.split(encoder.stop)[0]) for text in texts]


@dataclass(frozen=True)
class Forced:
    """One answer under teacher forcing: ``hits`` (T,) bool by answer token, ``top`` (L, k) token ids
    at every position (visual tokens, prompt, answer), most likely first."""

    hits: np.ndarray
    top: np.ndarray


@torch.inference_mode()
def teacher_force(
    language_model: nn.Module,
    encoder: PromptEncoder,
    prompts: list[list[int]],
    answers: list[list[int]],
    visual: Tensor | None,
    k: int = 10,
) -> list[Forced]:
    """Predict every token given the gold ones before it (the paper's protocol)."""
    batch = encoder.collate(prompts, answers)
    device = next(language_model.parameters()).device
    ids, mask = batch.ids.to(device), batch.mask.to(device)
    logits = language_model(
        inputs_embeds=embed(language_model, ids, encoder.image_id, visual),
        attention_mask=mask,
        use_cache=False,
    ).logits
    top = logits.topk(k, -1).indices.cpu().numpy().astype(np.int32)
    labels, lengths = batch.labels.numpy(), batch.mask.sum(1).tolist()
    return [
        Forced(t[row >= 0, 0] == row[row >= 0], t[:n]) for t, row, n in zip(top, labels, lengths, strict=True)
    ]


def in_batches(n: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def by_length(prompts: list[list[int]], ask: Callable[[list[int]], list], size: int) -> list:
    """``ask`` of all rows, ``size`` at a time and about as long as each other; results in the prompts' order."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found = [result for part in in_batches(len(order), size) for result in ask(order[part])]
    return [found[place] for place in sorted(range(len(order)), key=order.__getitem__)]


class MLLM:
    """A frozen multimodal language model that answers questions, in batches.

    What is frozen is remembered: an image's Q-Former features, and the answer to a question that
    was asked before. ``with_context`` prepends text (an in-context edit) to a question.
    ``image_size``: the side of the images it is shown, in pixels, its own if None; at another the vision
    tower's position embeddings are interpolated (the paper shows 364² to towers trained at 224²).
    ``batch_size``: how many queries at once it, and what is built on it, is asked; half as many images.
    """

    def __init__(
        self,
        model: Blip2ForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        cache: Path | None = None,
        image_size: int | None = None,
        batch_size: int = 512,
    ):
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name
        prompt = FORMATS[model.config.text_config.model_type]
        self.encoder = PromptEncoder(tokenizer, prompt, model.config.num_query_tokens)
        if model.config.image_token_index not in (None, self.encoder.image_id):
            raise ValueError(
                f"{name}: {IMAGE_TOKEN} is token {model.config.image_token_index} in the model's config but "
                f"{self.encoder.image_id} in its tokenizer; take both from one revision"
            )
        self.image_size = image_size or model.config.vision_config.image_size
        self.batch_size = batch_size
        table = f"qformer-{self.eyes()}-{self.image_size}.safetensors"
        self.images = ImageTable(self._look, cache and cache / table, max(1, batch_size // 2))
        self._answers: dict[Query, str] = {}
        self._forced: dict[tuple[Query, str], Forced] = {}

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        name: str,
        cache: Path | None = None,
        image_size: int | None = None,
        batch_size: int = 512,
        **kwargs,
    ) -> MLLM:
        """Load a model saved in transformers' own format (safetensors only).

        ``cache``: a folder in which the images' features survive the process. ``kwargs`` go to
        transformers: ``dtype`` (float32 unless told), ``device_map``, ``quantization_config``.
        """
        kwargs = {"dtype": torch.float32} | kwargs
        model = Blip2ForConditionalGeneration.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, **kwargs
        )
        return cls(model, AutoTokenizer.from_pretrained(folder), name, cache, image_size, batch_size)

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
        pixels = load_pixels(paths, self.image_size).to(self.model.device, self.model.dtype)
        states = self.model.vision_model(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
        tokens = self.model.query_tokens.expand(len(paths), -1, -1)
        return (self.model.qformer(query_embeds=tokens, encoder_hidden_states=states)[0],)

    def see(self, queries: Sequence[Query]) -> Tensor | None:
        """Visual tokens (V, n, d) of the queries that have an image, in order."""
        paths = [q.image for q in queries if q.image is not None]
        if not paths:
            return None
        weight = self.model.language_projection.weight
        with torch.inference_mode():
            return self.model.language_projection(self.features(paths).to(weight.device, weight.dtype))

    def prompts(self, queries: Sequence[Query], contexts: Sequence[str] | None = None) -> list[list[int]]:
        contexts = contexts or [""] * len(queries)
        return [
            self.encoder.prompt(q.question, q.image is not None, c)
            for q, c in zip(queries, contexts, strict=True)
        ]

    def answer(self, queries: Sequence[Query], batch_size: int | None = None) -> list[str]:
        """Greedy answers to (B) queries, normalised for exact match."""
        new = [q for q in dict.fromkeys(queries) if q not in self._answers]
        prompts = self.prompts(new)

        def ask(rows: list[int]) -> list[str]:
            visual = self.see([new[i] for i in rows])
            return generate(self.model.language_model, self.encoder, [prompts[i] for i in rows], visual)

        texts = by_length(prompts, ask, batch_size or self.batch_size)
        self._answers.update(zip(new, texts, strict=True))
        return [self._answers[q] for q in queries]

    def force(
        self, queries: Sequence[Query], answers: Sequence[str], batch_size: int | None = None
    ) -> list[Forced]:
        """Teacher-forced predictions of (B) gold answers."""
        pairs = list(zip(queries, answers, strict=True))
        new = [p for p in dict.fromkeys(pairs) if p not in self._forced]
        prompts = self.prompts([query for query, _ in new])
        ids = [self.encoder.answer(answer, eos=False) for _, answer in new]

        def ask(rows: list[int]) -> list[Forced]:
            texts, visual = (
                ([t[i] for i in rows] for t in (prompts, ids)),
                self.see([new[i][0] for i in rows]),
            )
            return teacher_force(self.model.language_model, self.encoder, *texts, visual)

        found = by_length(prompts, ask, batch_size or self.batch_size)
        self._forced.update(zip(new, found, strict=True))
        return [self._forced[p] for p in pairs]
