"""Attention of one query a row over the patches of an image that many rows share: nothing is copied or
projected patch by patch, which is most of what the plain formula costs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def patch_cosine(text: Tensor, keys: Tensor, image: Tensor, batch_size: int = 1024) -> Tensor:
    """Cosine (B, P) of each text (B, d) with the patches' keys (I, P, d) of its image; in batches, for
    (B, P, d) would fill the memory."""
    keys, text = F.normalize(keys, dim=-1), F.normalize(text, dim=-1).unsqueeze(-1)
    parts = zip(text.split(batch_size), image.split(batch_size), strict=True)
    return torch.cat([(keys[i] @ t).squeeze(-1) for t, i in parts])


def sum_patches(weights: Tensor, tokens: Tensor, image: Tensor) -> Tensor:
    """Σ_p weights[b, p] · tokens[image[b], p]: (B, d) of weights (B, P), tokens (I, P, d), image (B,) long.

    A row without an image (−1) gets that of image 0: a sum to be masked by the caller.
    """
    n = tokens.shape[1]
    patches = image.clamp(min=0).unsqueeze(1) * n + torch.arange(n, device=image.device)
    return F.embedding_bag(patches, tokens.flatten(0, 1), per_sample_weights=weights, mode="sum")


def attend_folded(
    attention: nn.MultiheadAttention, query: Tensor, tokens: Tensor, image: Tensor
) -> tuple[Tensor, Tensor]:
    """``attention`` of each query (B, d) over the tokens (I, P, d) of its ``image`` (B,) long.

    Returns (attended (B, d), weights (B, P), the mean over heads); where there is no image (−1) the weights
    are 0, and what is attended is to be masked by the caller. Keys and values are not formed:
    q·(W_k x) = (W_kᵀ q)·x, the key's bias cancels in the softmax, and Σ w (W_v x) = W_v (Σ w x).
    """
    heads = (attention.num_heads, -1)
    (w_q, w_k, w_v), (b_q, _, b_v) = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    query = F.linear(query, w_q, b_q).unflatten(-1, heads) * attention.head_dim**-0.5
    folded = torch.einsum("bhe,hed->bhd", query, w_k.unflatten(0, heads))
    images, row, place, most = _by_image(image)
    seen, (n, dim) = tokens[images], folded.shape[1:]
    asked = folded.new_zeros(len(images) * most, n, dim).index_copy(0, place, folded[row])
    weights = (asked.view(len(images), most * n, dim) @ seen.mT).softmax(-1)  # (J, most · heads, P)

    def of_rows(x: Tensor) -> Tensor:
        x = x.view(-1, n, x.shape[-1])[place]
        return x.new_zeros(len(query), *x.shape[1:]).index_copy(0, row, x)

    found, weights = of_rows(weights @ seen), of_rows(weights)
    values = torch.einsum("bhd,hed->bhe", found, w_v.unflatten(0, heads))
    return attention.out_proj(values.flatten(1) + b_v), weights.mean(1)


def _by_image(image: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """The images (J,) that occur in ``image`` (B,); the rows (R,) that have one; each one's place when every image
    has room for as many rows as the one that has ``most``; and that number."""
    row = (image >= 0).nonzero().flatten()
    images, whose, count = image[row].unique(return_inverse=True, return_counts=True)
    order = whose.argsort(stable=True)
    nth = torch.empty_like(whose)
    nth[order] = torch.arange(len(row), device=image.device) - (count.cumsum(0) - count)[whose[order]]
    most = int(count.max()) if len(row) else 0
    return images, row, whose * most + nth, most
