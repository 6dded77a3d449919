"""The nearest of many embeddings: exactly, or after a first look at eight-bit codes of their principal axes.

An exact search reads the whole matrix, a kilobyte an edit. The codes are a twentieth of that; the few hundred
edits that they take for the nearest are then compared in full precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

AXES = 48  # that are coded, of the embeddings' 256
SAMPLE = 100_000  # embeddings, at most, that the axes are taken from
CANDIDATES = 500  # that are compared in full precision
BLOCK = 64  # codes of which the best is ranked at first: ranking a million takes longer than scoring them
PIECES = 8  # of the product with a single query, so that all threads read


def products(queries: Tensor, matrix: Tensor) -> Tensor:
    """``queries @ matrix.T`` (B, N) of (B, dim) and (N, dim), at the speed of memory for a single query too."""
    n = len(matrix) // PIECES * PIECES
    if len(queries) != 1 or not n:
        return queries @ matrix.T
    parts = torch.bmm(matrix[:n].view(PIECES, -1, matrix.shape[1]), queries.T.expand(PIECES, -1, 1))
    return torch.cat([parts.flatten(), matrix[n:] @ queries[0]]).unsqueeze(0)


class Codes:
    """Codes (N, AXES) int8 of embeddings (N, dim) float32, on axes that stay those of the first ones."""

    def __init__(self, embeddings: Tensor):
        some = embeddings[:: -(-len(embeddings) // SAMPLE)]
        self.axes = torch.linalg.eigh(some.T @ some)[1][:, -AXES:]  # (dim, AXES), not centred: lengths count
        self.step = (some @ self.axes).abs().max().clamp(min=1e-12) / 127
        self.codes = self._code(embeddings, self.step)

    def _code(self, embeddings: Tensor, step: Tensor) -> Tensor:
        return (embeddings @ self.axes / step).round_().clamp_(-127, 127).to(torch.int8)

    def add(self, embeddings: Tensor) -> None:
        """Code more of them (M, dim)."""
        self.codes = torch.cat([self.codes, self._code(embeddings, self.step)])

    def nearest(self, query: Tensor, k: int, matrix: Tensor, squares: Tensor) -> Tensor:
        """Places (k,) of the embeddings nearest to one query (dim,), the nearest first: approximately.

        ``matrix`` (N, dim) float32: the embeddings; ``squares`` (N,): their squared lengths, infinite where
        one is not to be found.
        """
        step = (query @ self.axes).abs().max().clamp(min=1e-12) / 127
        product = torch._int_mm(self._code(query.unsqueeze(0), step), self.codes.T)[0]
        estimate = torch.add(squares, product, alpha=-2 * float(self.step * step))  # of ‖z − q‖² − ‖q‖²
        n, whole = max(k, CANDIDATES), len(estimate) // BLOCK * BLOCK
        least = estimate[:whole].view(-1, BLOCK).amin(1)
        best = least.topk(min(n, len(least)), largest=False)[1]  # more blocks cannot hold the n nearest
        places = (best.unsqueeze(1) * BLOCK + torch.arange(BLOCK)).flatten()
        places = torch.cat([places, torch.arange(whole, len(estimate))])
        places = places[estimate[places].topk(min(n, len(places)), largest=False)[1]]
        squared = squares[places] - 2 * (matrix[places] @ query)
        return places[squared.topk(k, largest=False)[1]]
