"""The nearest of many embeddings: exactly, or after a first look at eight-bit codes of their principal axes.

An exact search reads the whole matrix, a kilobyte an edit. The codes are a sixteenth of that; the thousand or
so that they take for the nearest are then compared in full precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

AXES = 64  # that are coded, of the embeddings' 256: integer products are quick in multiples of 64
SAMPLE = 100_000  # embeddings, at most, that the axes are taken from
BLOCK = 32  # codes that are ranked together at first, by what the best can be: a million take longer than to score
CANDIDATES = 1200  # about so many blocks are looked into, and so many edits compared in full precision
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


def squared_lengths(embeddings: Tensor) -> Tensor:
    """(N,) of embeddings (N, dim)."""
    return torch.cat([part.square().sum(-1) for part in embeddings.split(AT_ONCE)])  # they stay in the cache


class Codes:
    """Codes (N, AXES) int8 of embeddings (N, dim) float32, on axes that stay those of the first ones."""

    def __init__(self, embeddings: Tensor):
        some = embeddings[:: -(-len(embeddings) // SAMPLE)]
        self.axes = torch.linalg.eigh(some.T @ some)[1][:, -AXES:]  # (dim, AXES), not centred: lengths count
        self.step = (some @ self.axes).abs().max().clamp(min=1e-12) / 127
        self.codes = _eight_bits(embeddings @ self.axes, self.step)

    def add(self, embeddings: Tensor) -> None:
        """Code more of them (M, dim)."""
        self.codes = torch.cat([self.codes, _eight_bits(embeddings @ self.axes, self.step)])

    def look(self, squares: Tensor) -> None:
        """Search by these squared lengths (N,) from now on: infinite where an embedding is not to be found."""
        whole = len(squares) // BLOCK * BLOCK  # the rest fills no block
        self.squares, self.by_block = squares, squares[:whole].view(-1, BLOCK)
        self.least = self.by_block.amin(1)

    def nearest(self, query: Tensor, k: int, matrix: Tensor) -> Tensor:
        """Places (k,) of the embeddings nearest to one query (dim,), the nearest first: approximately.

        ``matrix`` (N, dim) float32: the embeddings.
        """
        coordinates, whole = query @ self.axes, len(self.least) * BLOCK
        n = max(8 * k, CANDIDATES)  # of a sample of one in eight at least k
        step = coordinates.abs().max().clamp(min=1e-12) / 127
        product = torch._int_mm(_eight_bits(coordinates.unsqueeze(0), step), self.codes.T)[0]
        products, scale = product[:whole].view(-1, BLOCK), -2 * float(self.step * step)
        # ‖z − q‖² − ‖q‖², estimated: at best in each block, then of all in the best blocks and of the rest
        blocks = _least(torch.add(self.least, products.amax(1), alpha=scale), n, sample=8)
        some = torch.add(self.by_block[blocks], products[blocks], alpha=scale).flatten()
        rest = torch.add(self.squares[whole:], product[whole:], alpha=scale)
        places = (blocks.unsqueeze(1) * BLOCK + torch.arange(BLOCK)).flatten()
        places = torch.cat([places, torch.arange(whole, len(product))])
        places = places[_least(torch.cat([some, rest]), n, sample=8)]
        squared = torch.addmv(self.squares[places], matrix.index_select(0, places), query, alpha=-2)
        return places[squared.topk(k, largest=False)[1]]


def _eight_bits(coordinates: Tensor, step: Tensor) -> Tensor:
    return (coordinates / step).round_().clamp_(-127, 127).to(torch.int8)


def _least(values: Tensor, n: int, sample: int = 1) -> Tensor:
    """Places, ascending, of about the n least of values (N,): all up to the value that one in ``sample`` puts there."""
    if n >= len(values):
        return torch.arange(len(values))
    return (values <= values[::sample].kthvalue(-(-n // sample))[0]).nonzero().flatten()
