"""The nearest of many embeddings: exactly, or after a first look at eight-bit codes of their principal axes.

An exact search reads the whole matrix, a kilobyte an edit. The codes are a sixteenth of that; the thousand or
so that they take for the nearest are then compared in full precision.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EXACT = 100_000  # embeddings of which every search reads all in full precision; among more it looks at codes first
AXES = 64  # that are coded, of the embeddings' 256: integer products are quick in multiples of 64
BLOCK = 32  # codes that are ranked together at first, by what the best can be: a million take longer than to score
CANDIDATES = 1000  # about so many blocks are looked into, and so many edits compared in full precision
STRIDE = 15  # one in so many is looked at to learn how near the nearest are: no divisor of a block
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
    """‖z‖² (N,) of embeddings (N, dim)."""
    return torch.cat([part.square().sum(-1) for part in embeddings.split(AT_ONCE)])  # they stay in the cache


def checked(embeddings: Tensor, n: int, dim: int) -> Tensor:
    """Embeddings of n edits as they are kept: (n, dim) float32 on the CPU; ValueError for another shape, or if not finite."""
    if embeddings.shape != (n, dim):
        raise ValueError(
            f"{n} edits need embeddings of shape ({n}, {dim}), got {tuple(embeddings.shape)}: "
            "embed them with the classifier of this memory"
        )
    z = embeddings.detach().to("cpu", torch.float32)
    if bad := (~z.square().sum(-1).isfinite()).nonzero().flatten().tolist():
        raise ValueError(f"the embeddings of edits {bad[:5]} are not finite; nothing was stored")
    return z


class Index:
    """Embeddings (N, dim) float32 at fixed places, of which some are ``here``, and the search for the nearest of these.

    ``here`` (N,) bool may be set; :meth:`look` then takes note of it, and of what was added. ``ids``: their places.
    """

    def __init__(self, embeddings: Tensor):
        self._room = self.matrix = embeddings.contiguous()
        self._norms, self.here = squared_lengths(embeddings), torch.zeros(len(embeddings), dtype=torch.bool)
        self._codes = Codes(self.matrix, EXACT) if len(embeddings) > EXACT else None
        self.look()

    def add(self, embeddings: Tensor) -> None:
        """Give new ones (M, dim) their places. The matrix grows by doubling: it is not copied for each."""
        n, total = len(self.matrix), len(self.matrix) + len(embeddings)
        if total > len(self._room):
            self._room = F.pad(self.matrix, (0, 0, 0, max(n, total - n)))
        self._room[n:total] = embeddings
        self.matrix = self._room[:total]
        if self._codes:
            self._codes.add(embeddings)
        elif total > EXACT:
            self._codes = Codes(self.matrix, EXACT)
        self._norms = torch.cat([self._norms, squared_lengths(embeddings)])
        self.here = torch.cat([self.here, torch.zeros(len(embeddings), dtype=torch.bool)])

    def look(self) -> None:
        """Search from now on what is here: elsewhere a squared length is infinite."""
        self.ids = self.here.nonzero().flatten()
        self._squares = torch.where(self.here, self._norms, torch.inf)
        if self._codes:
            self._codes.look(self._squares)

    def nearest(self, queries: Tensor, k: int, exact: bool) -> tuple[Tensor, Tensor]:
        """(squared distances, places), both (B, min(k, how many are here)), of those nearest to queries (B, dim)."""
        if k < 1 or queries.ndim != 2 or queries.shape[1] != self.matrix.shape[1]:
            raise ValueError(
                f"the {k} nearest to queries of shape {tuple(queries.shape)}: give k of 1 or more, and queries "
                f"(B, {self.matrix.shape[1]}) of this memory's classifier"
            )
        if not queries.isfinite().all():
            raise ValueError("a query's embedding is not finite: has its classifier been trained, and read whole?")
        k = min(k, len(self.ids))
        if exact or len(self.ids) <= EXACT or not len(queries):
            places = nearest(queries, k, self.matrix, self._squares)
        else:
            places = torch.stack([self._codes.nearest(query, k, self.matrix) for query in queries])
        return (queries.unsqueeze(1) - self.matrix[places]).square().sum(-1), places


class Codes:
    """Codes (N, AXES) int8 of embeddings (N, dim) float32, on the principal axes of the first ``some`` of them.

    These are the same however many have come since, so that a memory opened again finds what it found before.
    """

    def __init__(self, embeddings: Tensor, some: int):
        some = embeddings[:some]
        self.axes = torch.linalg.eigh(some.T @ some)[1][:, -AXES:]  # (dim, AXES), not centred: lengths count
        self.step = (some @ self.axes).abs().max().clamp(min=1e-12) / 127
        self.codes = _eight_bits(embeddings @ self.axes, self.step)

    def add(self, embeddings: Tensor) -> None:
        """Code more of them (M, dim)."""
        self.codes = torch.cat([self.codes, _eight_bits(embeddings @ self.axes, self.step)])

    def look(self, squares: Tensor) -> None:
        """Search by these squared lengths (N,) from now on: infinite where an embedding is not to be found."""
        whole = len(squares) // BLOCK * BLOCK
        self.squares, self.by_block = squares, squares[:whole].view(-1, BLOCK)
        self.least = self.by_block.amin(1)

    def nearest(self, query: Tensor, k: int, matrix: Tensor) -> Tensor:
        """Places (k,) of the embeddings nearest to one query (dim,), the nearest first: approximately.

        ``matrix`` (N, dim) float32: the embeddings.
        """
        coordinates, whole = query @ self.axes, len(self.least) * BLOCK
        n = max(STRIDE * k, CANDIDATES)  # of the sample at least k
        step = coordinates.abs().max().clamp(min=1e-12) / 127
        product = torch._int_mm(_eight_bits(coordinates.unsqueeze(0), step), self.codes.T)[0]
        products, scale = product[:whole].view(-1, BLOCK), -2 * float(self.step * step)
        # ‖z − q‖² − ‖q‖², estimated: at best in each block, then of all in the best blocks
        blocks = _least(torch.add(self.least, products.amax(1), alpha=scale), n)
        squares, products = (each.index_select(0, blocks) for each in (self.by_block, products))
        best = _least(torch.add(squares, products, alpha=scale).flatten(), n)
        places = blocks[best // BLOCK] * BLOCK + best % BLOCK
        places = torch.cat([places, torch.arange(whole, len(product))])  # those that fill no block, all of them
        squared = torch.addmv(self.squares[places], matrix.index_select(0, places), query, alpha=-2)
        return places[squared.topk(k, largest=False)[1]]


def _eight_bits(coordinates: Tensor, step: Tensor) -> Tensor:
    return (coordinates / step).round_().clamp_(-127, 127).to(torch.int8)


def _least(values: Tensor, n: int) -> Tensor:
    """Places, ascending, of about the n least of values (N,): all up to the value that a sample puts there."""
    if n >= len(values):
        return torch.arange(len(values))
    return (values <= values[::STRIDE].kthvalue(-(-n // STRIDE))[0]).nonzero().flatten()
