"""The counterfactual model f_cfr(t_e, y_e, i, t): trainable, answers what is in scope.

It sees the image through the base model's frozen Q-Former and its *own trained* projection (the
authors' release re-draws that projection at random for every edit), and reads the retrieved edit in
its context: ``New Fact: t_e y_e`` before the question. Its text model is a few fresh layers (the mini
track), a smaller pretrained one (the paper's OPT-125m), or the base model's own with its last layer copied
and trained (the paper's Vicuna).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mscke.benchmark.sample import Edit, Query
from mscke.models.decoding import Forced, answer_loss, ask_all, generate, teacher_force
from mscke.models.mllm import MLLM
from mscke.models.prompts import IN_CONTEXT


class CounterfactualModel(nn.Module, PyTorchModelHubMixin):
    """A small text model of the base model's family, with a visual projection of its own.

    ``text_config``: a transformers text config as a dict; ``visual_width``: the Q-Former's. After loading,
    :meth:`attach` it. Its weights are float32; beside a base model in bfloat16 it computes in mixed precision.
    """

    def __init__(self, text_config: dict, visual_width: int):
        super().__init__()
        config = AutoConfig.for_model(**text_config)
        self.language_model = AutoModelForCausalLM.from_config(config)
        self.projection = nn.Linear(visual_width, config.hidden_size)
        self.base: MLLM | None = None

    @classmethod
    def beside(cls, base: MLLM, layers: int = 2) -> CounterfactualModel:
        """A fresh model of ``layers`` layers; its word embeddings start as the base model's."""
        text = base.model.config.text_config.to_diff_dict() | {"num_hidden_layers": layers}
        model = cls(text, base.model.config.qformer_config.hidden_size).attach(base)
        source = base.model.language_model.get_input_embeddings().weight
        target = model.language_model.get_input_embeddings().weight
        if source.shape == target.shape:
            with torch.no_grad():
                target.copy_(source)
        return model

    @classmethod
    def pretrained(cls, base: MLLM, folder: str | Path) -> CounterfactualModel:
        """The model of the base's family in ``folder``, with its tokenizer and a fresh projection."""
        text = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, weights_only=True)
        return cls.around(base, text)

    @classmethod
    def around(cls, base: MLLM, text: PreTrainedModel) -> CounterfactualModel:
        """The text model ``text`` of the base's family, in float32, with a fresh projection."""
        if text.get_input_embeddings().num_embeddings <= base.encoder.image_id:
            text.resize_token_embeddings(base.encoder.image_id + 1)
        model = cls(text.config.to_diff_dict(), base.model.config.qformer_config.hidden_size)
        model.language_model = text
        return model.attach(base)

    def attach(self, base: MLLM) -> CounterfactualModel:
        """Share ``base``'s tokenizer, image features and device."""
        object.__setattr__(self, "base", base)  # not a submodule: the base model is not ours to train
        return self.to(base.model.device)

    def mixed(self) -> torch.autocast:
        """bfloat16 where the base model computes in it."""
        device, dtype = self.base.model.device, self.base.model.dtype
        return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

    def prompts(self, queries: Sequence[Query], edits: Sequence[Edit]) -> list[list[int]]:
        contexts = [IN_CONTEXT.format(e.prompt, e.answer) for e in edits]
        return self.base.prompts(queries, contexts)

    def see(self, queries: Sequence[Query]) -> Tensor | None:
        """Visual tokens (V, n, d) of the queries that have an image, through the own projection."""
        paths = [q.image for q in queries if q.image is not None]
        return self.projection(self.base.features(paths).to(self.projection.weight.device)) if paths else None

    def unedited(self) -> _Base:
        """What answers where there is no edit: the base model."""
        return _Base(self.base)

    def loss(self, queries: Sequence[Query], edits: Sequence[Edit], answers: Sequence[str]) -> Tensor:
        """Mean cross-entropy of the answers' tokens, to be minimised on in-scope queries."""
        encoder = self.base.encoder
        batch = encoder.collate(self.prompts(queries, edits), [encoder.answer(a) for a in answers])
        with self.mixed():
            return answer_loss(self.language_model, encoder, batch, self.see(queries))[0]

    def answer(self, queries: Sequence[Query], edits: Sequence[Edit], batch_size: int | None = None) -> list[str]:
        """Greedy answers to (B) queries, each under its own edit."""
        return self._ask(generate, queries, edits, batch_size)

    def force(
        self, queries: Sequence[Query], edits: Sequence[Edit], answers: Sequence[str], batch_size: int | None = None
    ) -> list[Forced]:
        """Teacher-forced predictions of (B) gold answers, each under its own edit."""
        gold = [self.base.encoder.answer(a, eos=False) for a in answers]
        return self._ask(teacher_force, queries, edits, batch_size, gold)

    @torch.inference_mode()
    def _ask(self, ask: Callable, queries, edits, batch_size: int | None, *answers: list[list[int]]) -> list:
        prompts, size = self.prompts(queries, edits), batch_size or self.base.batch_size
        with self.mixed():
            return ask_all(ask, self.language_model, self.base.encoder, queries, self.see, size, prompts, *answers)


class _Base:
    """The base model in a counterfactual model's place: it answers as if there were no edit."""

    def __init__(self, base: MLLM):
        self.base = base

    def answer(self, queries: Sequence[Query], edits: Sequence[Edit]) -> list[str]:
        return self.base.answer(queries)

    def force(self, queries: Sequence[Query], edits: Sequence[Edit], answers: Sequence[str]) -> list[Forced]:
        return self.base.force(queries, answers)


class LastLayers(CounterfactualModel):
    """The base's text model, of which only the last ``layers`` decoder layers are copied, and trained.

    All below them, the words and their readout are the base's own tensors: shared, frozen, not saved.
    The projection starts as the base's.
    """

    def __init__(self, base: MLLM, layers: int = 1):
        nn.Module.__init__(self)
        source = base.model.language_model
        kept = [m for m in source.modules() if type(m).__module__.startswith("bitsandbytes")]
        # 8-bit weights move their scales into the module that runs first: such modules are shared themselves
        shared = {id(part): part for part in (*source.parameters(), *source.buffers(), *kept)}
        text = copy.deepcopy(source, shared)  # another arrangement of the same tensors
        decoder = text.get_decoder()
        self.own = nn.ModuleList(copy.deepcopy(layer).float() for layer in decoder.layers[-layers:])
        decoder.layers = nn.ModuleList([*decoder.layers[:-layers], *self.own])
        object.__setattr__(self, "language_model", text)  # not a submodule: what is ours of it is ``own``
        self.projection = copy.deepcopy(base.model.language_projection).float()
        self.requires_grad_(True).attach(base)
