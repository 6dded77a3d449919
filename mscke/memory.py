"""The multimodal edit memory: edits beside their embeddings; the base model is never touched."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mscke.benchmark.sample import Edit


class EditMemory:
    """Edits (image, prompt, answer) and a matrix of their embeddings, searched exactly.

    Each edit is embedded once, when it is written; a lookup is one matrix product. Ids are given
    out in order and never used again.
    """

    def __init__(self, dim: int, fingerprint: str = ""):
        self.dim, self.fingerprint = dim, fingerprint
        self._hold(torch.empty(0, dim), [])
        self._edits: dict[int, Edit] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, edit_id: int) -> Edit:
        self._require([edit_id])
        return self._edits[edit_id]

    def _require(self, ids: Iterable[int]) -> None:
        """Raise KeyError, with their numbers, for ids that are not in memory."""
        if missing := set(ids) - self._edits.keys():
            raise KeyError(f"no edit with id {sorted(missing)} in memory")

    def _hold(self, matrix: Tensor, ids: list[int]) -> None:
        """Keep what a lookup needs beside the matrix: ‖z_e‖² of every row, and the ids as a tensor."""
        self._matrix, self._squares = matrix, matrix.square().sum(-1)
        self._ids, self._id_row = ids, torch.tensor(ids, dtype=torch.long)

    @property
    def ids(self) -> Tensor:
        return self._id_row

    @property
    def embeddings(self) -> Tensor:
        """(N, dim) float32, in the order of :attr:`ids`."""
        return self._matrix

    def add(self, edits: Sequence[Edit], embeddings: Tensor) -> list[int]:
        """Store edits with their embeddings (N, dim); returns their ids.

        Raises ValueError when the embeddings have another shape, or are not finite.
        """
        if embeddings.shape != (len(edits), self.dim):
            raise ValueError(
                f"{len(edits)} edits need embeddings of shape ({len(edits)}, {self.dim}), "
                f"got {tuple(embeddings.shape)}: embed them with the classifier of this memory"
            )
        bad = (~embeddings.isfinite()).any(1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"the embeddings of edits {bad[:5]} are not finite; nothing was stored")
        ids = list(range(self._next, self._next + len(edits)))
        matrix = torch.cat([self._matrix, embeddings.detach().to("cpu", torch.float32)])
        self._hold(matrix, self._ids + ids)
        self._edits.update(zip(ids, edits, strict=True))
        self._next += len(edits)
        return ids

    def remove(self, ids: Iterable[int]) -> None:
        """Forget edits. Raises KeyError for an id that is not there; nothing is removed then."""
        gone = set(ids)
        self._require(gone)
        keep = [i for i, edit_id in enumerate(self._ids) if edit_id not in gone]
        self._hold(self._matrix[keep], [self._ids[i] for i in keep])
        for edit_id in gone:
            del self._edits[edit_id]

    def distances(self, embeddings: Tensor, among: Tensor) -> Tensor:
        """Squared distance (B,) of each query to the one edit ``among`` names for it (KeyError if none)."""
        self._require(among.tolist())
        place = {edit_id: i for i, edit_id in enumerate(self._ids)}
        rows = [place[i] for i in among.tolist()]
        return (embeddings - self._matrix[rows]).square().sum(-1)

    def nearest(self, embeddings: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """The k nearest edits of each query: (squared distances, ids), both (B, min(k, N))."""
        k = min(k, len(self))
        if k == 0:
            empty = embeddings.new_empty(len(embeddings), 0)
            return empty, empty.long()
        squared = self._squares - 2 * embeddings @ self._matrix.T  # + ‖query‖², the same in a row
        _, rows = squared.topk(k, largest=False)
        exact = (embeddings.unsqueeze(1) - self._matrix[rows]).square().sum(-1)
        return exact, self.ids[rows]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; edits and fingerprint travel in its header."""
        path = Path(path)
        header = {
            "edits": json.dumps({str(i): asdict(self._edits[i]) for i in self._ids}),
            "ids": json.dumps(self._ids), "next": str(self._next), "fingerprint": self.fingerprint,
        }  # fmt: skip
        temporary = path.with_name(path.name + ".tmp")
        save_file({"embeddings": self._matrix.contiguous()}, temporary, metadata=header)
        os.replace(temporary, path)

    @classmethod
    def open(cls, path: str | Path, fingerprint: str | None = None) -> EditMemory:
        """Read a saved memory. Raises ValueError if another classifier than ``fingerprint`` wrote it."""
        with safe_open(path, "pt") as file:
            header, matrix = file.metadata(), file.get_tensor("embeddings")
        if fingerprint is not None and header["fingerprint"] != fingerprint:
            raise ValueError(
                f"{path} was written by classifier {header['fingerprint']}, not {fingerprint}: "
                "embed its edits again with this classifier (EditMemory.add) to use them"
            )
        memory = cls(matrix.shape[1], header["fingerprint"])
        memory._hold(matrix, json.loads(header["ids"]))
        memory._next = int(header["next"])
        memory._edits = {int(i): Edit(**e) for i, e in json.loads(header["edits"]).items()}
        return memory
