"""What an edit's gradient is taken of: questions and answers as a language model reads them, and the gradient itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mscke.benchmark.sample import Query
from mscke.editors.deltas import Deltas, LowRank
from mscke.models.mllm import MLLM
from mscke.models.prompts import embed


@dataclass(frozen=True)
class Reading:
    """Prompts and their answers as a language model reads them, padded on the left.

    ``embedded`` (B, L, d), ``mask`` and ``places`` (B, L) long: where there is a token, and its position as the model
    counts; the last T positions predict the answers and their end token: ``labels`` (B, T) long, −100 where an
    answer is shorter.
    """

    embedded: Tensor
    mask: Tensor
    places: Tensor
    labels: Tensor

    def __getitem__(self, rows: Tensor | slice) -> Reading:
        return Reading(self.embedded[rows], self.mask[rows], self.places[rows], self.labels[rows])

    @property
    def inputs(self) -> dict:
        """What to call a language model with for logits (B, T, vocabulary)."""
        return {
            "inputs_embeds": self.embedded, "attention_mask": attended(self.mask), "position_ids": self.places,
            "use_cache": False, "logits_to_keep": self.labels.shape[1],
        }  # fmt: skip

    def loss(self, logits: Tensor) -> Tensor:
        """Cross-entropy (B), mean over each answer's tokens."""
        per_token = F.cross_entropy(logits.float().mT, self.labels, reduction="none")
        return per_token.sum(1) / (self.labels >= 0).sum(1)


def attended(mask: Tensor) -> Tensor:
    """What each token attends to, (B, 1, L, L) bool, of a ``mask`` (B, L): the real ones up to it, and itself.

    Padding too attends to something then. Where it attends to nothing, the gradient that a GPU's attention leaves
    there may be no number, and spreads. Without padding the mask is returned as it is: that is quicker.
    """
    if mask.all():
        return mask
    here = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=mask.device)
    return (here.tril() & mask[:, None, None].bool()) | torch.eye(len(here), dtype=torch.bool, device=mask.device)


@torch.no_grad()
def read(base: MLLM, queries: Sequence[Query], answers: Sequence[str]) -> Reading:
    """Questions and answers (B) in the base model's prompt format, on its device."""
    encoder, language_model = base.encoder, base.model.language_model
    ids = [encoder.answer(a) for a in answers]
    batch, device = encoder.collate(base.prompts(queries), ids, left=True), language_model.device
    embedded = embed(language_model, batch.ids.to(device), encoder.image_id, base.see(queries))
    labels = batch.labels[:, -max(map(len, ids)) :]
    if hasattr(language_model.get_decoder(), "embed_positions"):  # OPT's begin with the first token
        places = batch.mask.cumsum(1) * batch.mask - 1
    else:
        places = torch.arange(batch.mask.shape[1]).expand_as(batch.mask)
    return Reading(embedded, *(part.to(device) for part in (batch.mask, places, labels)))


def gradient(language_model: nn.Module, names: Sequence[str], reading: Reading) -> tuple[Tensor, Deltas]:
    """Each row's loss (B) and its gradient by the named matrices, in its rank-one factors.

    A linear map's gradient is Σ_t δ_t u_tᵀ: ``left`` the loss's gradient δ by the map's outputs,
    ``right`` its inputs u, at every position t but those where no row's loss feels it. Both float32.
    """
    seen = {}

    def keeps(name: str) -> Callable:
        def hook(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            seen[name] = args[0].detach(), output.requires_grad_()

        return hook

    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for name in names:
            stack.enter_context(language_model.get_submodule(name).register_forward_hook(keeps(name)))
        losses = reading.loss(language_model(**reading.inputs).logits)
        left = torch.autograd.grad(losses.sum(), [output for _, output in seen.values()])
    factors, rows = {}, len(losses)
    for (name, (u, _)), y in zip(seen.items(), left, strict=True):
        y, u = (f.reshape(rows, -1, f.shape[-1]) for f in (y, u))
        real = reading.mask[:, -y.shape[1] :, None].bool()  # padding is no part of the edit, whatever is there
        y, u = (torch.where(real, f, 0) for f in (y, u))
        felt = y.any(-1).any(0)  # by the last layer's MLP only where the answer is predicted
        factors[name] = LowRank(y[:, felt].float(), u[:, felt].float())
    return losses.detach(), factors
