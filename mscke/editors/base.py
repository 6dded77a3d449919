"""One interface for every editor: ``Editor.edit(records) -> EditedModel``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from mscke.benchmark.sample import EditRecord, Query
from mscke.models.decoding import Forced


class EditedModel(Protocol):
    """A model after some edits.

    ``among`` (B,) long names, for each query, the one edit that is in force for it (by its place in
    the edited records): the paper's protocol of one edit at a time, for many records in one batch.
    Without it every edit is in force.
    """

    def answer(self, queries: Sequence[Query], among: Tensor | None = None) -> list[str]:
        """Greedy answers (B), normalised."""

    def force(
        self, queries: Sequence[Query], answers: Sequence[str], among: Tensor | None = None
    ) -> list[Forced]:
        """Teacher-forced predictions of the answers' tokens (B)."""


class Editor(Protocol):
    """Makes edits. ``name`` is what tables call the method."""

    name: str

    def edit(self, records: Sequence[EditRecord]) -> EditedModel: ...
