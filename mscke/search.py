"""The nearest of many embeddings: exactly, or after a first look at eight-bit codes of their principal axes.

An exact search reads the whole matrix, a kilobyte an edit. The codes are a twentieth of that; the few hundred
edits that they take for the nearest are then compared in full precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

AXES = 40  # that are coded, of the embeddings' 256
SAMPLE = 100_000  # embeddings, at most, that the axes are taken from
CANDIDATES = 500  # that are compared in full precision
BLOCK = 64  # codes that are ranked together at first, by what the best can be: a million take longer than to score
AT_ONCE = 512  # queries: their products with the matrix stay in the processor's cache
PIECES = 8  # of the product with a single query, so that all threads read


def nearest(queries: Tensor, k: int, matrix: Tensor, squares: Tensor) -> Tensor:
    """Places (B, k) of the embeddings nearest to each query (B, dim), the nearest first.

    ``matrix`` (N, dim) float32: the embeddings; ``squares`` (N,): their squared lengths, infinite where one is
    not to be found.
    """
    return torch.cat([_some(part, k, matrix, squares) for part in queries.split(AT_ONCE)])


def _some(queries: Tensor, k: int, matrix: Tensor, squares: Tensor) -> Tensor:
    """:func:`nearest` of a few; of a single query too at the speed of memory."""
    n = len(matrix) // PIECES * PIECES
    if len(queries) == 1 and n:
        parts = torch.bmm(matrix[:n].view(PIECES, -1, matrix.shape[1]), queries.T.expand(PIECES, -1, 1))
        product = torch.cat([parts.flatten(), matrix[n:] @ queries[0]])
        distance = torch.add(squares, product, alpha=-2).unsqueeze(0)  # and ‖query‖², the same in a row
    else:
        distance = torch.addmm(squares, queries, matrix.T, alpha=-2)
    return distance.topk(k, largest=False)[1]


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

    def look(self, squares: Tensor) -> None:
        """Search by these squared lengths (N,) from now on: infinite where an embedding is not to be found."""
        whole = len(squares) // BLOCK * BLOCK
        self.squares, self.least = squares, squares[:whole].view(-1, BLOCK).amin(1)

    def nearest(self, query: Tensor, k: int, matrix: Tensor) -> Tensor:
        """Places (k,) of the embeddings nearest to one query (dim,), the nearest first: approximately.

        ``matrix`` (N, dim) float32: the embeddings.
        """
        step = (query @ self.axes).abs().max().clamp(min=1e-12) / 127
        product = torch._int_mm(self._code(query.unsqueeze(0), step), self.codes.T)[0]
        scale, n, whole = -2 * float(self.step * step), max(k, CANDIDATES), len(self.least) * BLOCK
        bound = torch.add(self.least, product[:whole].view(-1, BLOCK).amax(1), alpha=scale)
        best = bound.topk(min(n, len(bound)), largest=False)[1]
        places = (best.unsqueeze(1) * BLOCK + torch.arange(BLOCK)).flatten()
        places = torch.cat([places, torch.arange(whole, len(product))])
        estimate = torch.add(self.squares[places], product[places], alpha=scale)  # of ‖z − q‖² − ‖q‖²
        places = places[estimate.topk(min(n, len(places)), largest=False)[1]]
        squared = self.squares[places] - 2 * (matrix[places] @ query)
        return places[squared.topk(k, largest=False)[1]]
