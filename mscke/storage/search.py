"""The nearest of many embeddings, by FAISS (Douze et al., 2024, arXiv 2401.08281): exactly, or after a look at codes.

An exact search reads every embedding, a kilobyte each. A product-quantised code has 32 bytes: four bits for each of 64
parts of an embedding. Among many the search ranks the codes, and then compares the best thousand exactly.
"""

from __future__ import annotations

import math

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

EXACT = 100_000  # embeddings up to which every search is exact; the codes are learnt on as many
PARTS = 64  # of an embedding, each coded by four bits
CANDIDATES = 1000  # of the codes, that are compared exactly
TIES = 8  # more than asked for, whose distances are computed anew: FAISS rounds in batches otherwise than alone
AT_ONCE = 64  # queries, whose candidates are compared together


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

    flops = 0  # of all exact searches in this process: torch's counter does not see FAISS

    def __init__(self, embeddings: Tensor):
        self.here = torch.zeros(0, dtype=torch.bool)
        self._vectors = faiss.IndexFlatL2(embeddings.shape[1])
        self._codes: faiss.IndexPQFastScan | None = None
        self.add(embeddings)
        self.look()

    @property
    def matrix(self) -> Tensor:
        """(N, dim): a view of what FAISS holds, until something is added."""
        n, dim = self._vectors.ntotal, self._vectors.d
        if n == 0:
            return torch.empty(0, dim)
        return torch.from_numpy(faiss.rev_swig_ptr(self._vectors.get_xb(), n * dim).reshape(n, dim))

    def add(self, embeddings: Tensor) -> None:
        """Give new ones (M, dim) their places."""
        self._vectors.add(embeddings.contiguous().numpy())
        self.here = F.pad(self.here, (0, len(embeddings)))
        if self._codes:
            self._codes.add(_padded(embeddings))
        elif self._vectors.ntotal > EXACT:
            self._codes = coded(self.matrix)

    def look(self) -> None:
        """Search from now on what is here."""
        self.ids = self.here.nonzero().flatten()
        bits = np.packbits(self.here.numpy(), bitorder="little")
        chosen = {"sel": faiss.IDSelectorBitmap(bits)} if len(self.ids) < len(self.here) else {}
        self._chosen = faiss.SearchParameters(**chosen)

    def nearest(self, queries: Tensor, k: int, exact: bool) -> tuple[Tensor, Tensor]:
        """(squared distances, places), both (B, min(k, how many are here)), of those nearest to queries (B, dim)."""
        if k < 1 or queries.ndim != 2 or queries.shape[1] != self._vectors.d:
            raise ValueError(
                f"the {k} nearest to queries of shape {tuple(queries.shape)}: give k of 1 or more, and queries "
                f"(B, {self._vectors.d}) of this memory's classifier"
            )
        if not queries.isfinite().all():
            raise ValueError("a query's embedding is not finite: has its classifier been trained, and read whole?")
        k, queries = min(k, len(self.ids)), queries.detach().contiguous()
        if k == 0 or not len(queries):
            return torch.empty(len(queries), k), torch.empty(len(queries), k, dtype=torch.long)
        faiss.omp_set_num_threads(torch.get_num_threads())  # a fork must have one
        approximately = self._codes and not exact and len(self.ids) > EXACT
        places = self._by_codes(queries, k) if approximately else self._exactly(queries, k + TIES)
        parts = [self._ranked(*part, k) for part in zip(queries.split(AT_ONCE), places.split(AT_ONCE), strict=True)]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def _exactly(self, queries: Tensor, n: int) -> Tensor:
        """Places (B, n) of the nearest that are here."""
        Index.flops += 2 * len(self.ids) * queries.numel()
        found = self._vectors.search(queries.numpy(), min(n, len(self.ids)), params=self._chosen)
        return torch.from_numpy(found[1])

    def _by_codes(self, queries: Tensor, k: int) -> Tensor:
        """Places (B, n) of those whose codes are nearest, so many that about :data:`CANDIDATES` of them are here."""
        n = math.ceil((CANDIDATES + k) * len(self.here) / len(self.ids))
        places = torch.from_numpy(self._codes.search(_padded(queries), min(n, len(self.here)))[1])
        few = (self.here[places] & (places >= 0)).sum(1) < k
        if few.any():  # those that were removed are the nearest
            places[few] = -1
            places[few, :k] = self._exactly(queries[few], k)
        return places

    def _ranked(self, queries: Tensor, places: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest of each query's candidates (B, n) that are here; of equal ones the first."""
        places = places.sort(1)[0]
        distance = (queries.unsqueeze(1) - self.matrix[places]).square().sum(-1)
        distance = distance.masked_fill((places < 0) | ~self.here[places], torch.inf)
        rank = distance.argsort(stable=True, dim=1)[:, :k]
        return distance.gather(1, rank), places.gather(1, rank)


def coded(embeddings: Tensor) -> faiss.IndexPQFastScan:
    """Codes of embeddings (N, dim), learnt on the first :data:`EXACT` of them: a memory that has grown since has the same."""
    vectors = _padded(embeddings)
    codes = faiss.IndexPQFastScan(vectors.shape[1], min(PARTS, embeddings.shape[1]), 4)
    codes.train(vectors[:EXACT])
    codes.add(vectors)
    return codes


def _padded(embeddings: Tensor) -> np.ndarray:
    """With zeros up to a width that can be cut into equal parts."""
    return F.pad(embeddings, (0, -embeddings.shape[1] % min(PARTS, embeddings.shape[1]))).numpy()
