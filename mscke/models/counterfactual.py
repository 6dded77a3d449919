"""The counterfactual model f_cfr(t_e, y_e, i, t): small, trainable, answers what is in scope.

It sees the image through the base model's frozen Q-Former and its *own trained* projection (the
authors' release re-draws that projection at random for every edit), and reads the retrieved edit in
its context: ``New Fact: t_e y_e`` before the question.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from mscke.benchmark.sample import Edit, Query
from mscke.models.mllm import IN_CONTEXT, MLLM, Batch, Forced, embed, generate, in_batches, teacher_force


class CounterfactualModel(nn.Module, PyTorchModelHubMixin):
    """A small text model of the base model's family, with a visual projection of its own.

    ``text_config`` is a transformers text config as a dict; ``visual_width`` the Q-Former's width.
    Use :meth:`beside` to make a fresh one for a base model, and :meth:`attach` after loading.
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

    def attach(self, base: MLLM) -> CounterfactualModel:
        """Share ``base``'s tokenizer and image features."""
        object.__setattr__(self, "base", base)  # not a submodule: the base model is not ours to train
        return self

    def prompts(self, queries: Sequence[Query], edits: Sequence[Edit]) -> list[list[int]]:
        contexts = [IN_CONTEXT.format(e.prompt, e.answer) for e in edits]
        return self.base.prompts(queries, contexts)

    def see(self, queries: Sequence[Query]) -> Tensor | None:
        """Visual tokens (V, n, d) of the queries that have an image, through the own projection."""
        paths = [q.image for q in queries if q.image is not None]
        return self.projection(self.base.features(paths)) if paths else None

    def loss(self, queries: Sequence[Query], edits: Sequence[Edit], answers: Sequence[str]) -> Tensor:
        """Mean cross-entropy of the answers' tokens, to be minimised on in-scope queries."""
        encoder = self.base.encoder
        batch: Batch = encoder.collate(self.prompts(queries, edits), [encoder.answer(a) for a in answers])
        embedded = embed(self.language_model, batch.ids, encoder.image_id, self.see(queries))
        hidden = self.language_model.model(inputs_embeds=embedded, attention_mask=batch.mask, use_cache=False)
        where = batch.labels >= 0
        logits = self.language_model.lm_head(hidden.last_hidden_state[where])
        return nn.functional.cross_entropy(logits, batch.labels[where])

    @torch.inference_mode()
    def answer(self, queries: Sequence[Query], edits: Sequence[Edit], batch_size: int = 512) -> list[str]:
        """Greedy answers to (B) queries, each under its own edit."""
        answers = []
        for part in in_batches(len(queries), batch_size):
            prompts = self.prompts(queries[part], edits[part])
            answers += generate(self.language_model, self.base.encoder, prompts, self.see(queries[part]))
        return answers

    @torch.inference_mode()
    def force(
        self, queries: Sequence[Query], edits: Sequence[Edit], answers: Sequence[str], batch_size: int = 512
    ) -> list[Forced]:
        """Teacher-forced predictions of (B) gold answers, each under its own edit."""
        encoder, forced = self.base.encoder, []
        for part in in_batches(len(queries), batch_size):
            prompts = self.prompts(queries[part], edits[part])
            ids = [encoder.answer(a, eos=False) for a in answers[part]]
            forced += teacher_force(self.language_model, encoder, prompts, ids, self.see(queries[part]))
        return forced
