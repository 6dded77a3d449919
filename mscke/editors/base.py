"""One interface for every editor: ``Editor.edit(records) -> EditedModel``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from mscke.benchmark.sample import Edit, EditRecord, Query
from mscke.models.decoding import Forced


class EditedModel(Protocol):
    """A model after some edits.

    ``among`` (B,) long names, for each query, the one edit that is in force for it (by its place in
    the edited records): the paper's protocol of one edit at a time, for many records in one batch.
    Without it every edit is in force. ``chunk``: of how many edits the updates exist at once, so that all questions
    about them are best asked together; None where nothing is computed for an edit.
    """

    chunk: int | None = None

    def answer(self, queries: Sequence[Query], among: Tensor | None = None) -> list[str]:
        """Greedy answers (B), normalised."""

    def force(self, queries: Sequence[Query], answers: Sequence[str], among: Tensor | None = None) -> list[Forced]:
        """Teacher-forced predictions of the answers' tokens (B)."""

    def unedited(self) -> EditedModel:
        """The model before its edits. Asked the same it makes the same batches, of the same rows and padding.

        In half precision logits depend on a batch's shape: only so does "unchanged" measure the edit alone.
        """


class InScope(Protocol):
    """Answers queries, each under its own edit: what a routed method asks in scope."""

    def answer(self, queries: Sequence[Query], edits: Sequence[Edit]) -> list[str]: ...

    def force(self, queries: Sequence[Query], edits: Sequence[Edit], answers: Sequence[str]) -> list[Forced]: ...

    def unedited(self) -> InScope:
        """The same without the edits, as :meth:`EditedModel.unedited`."""


class Editor(Protocol):
    """Makes edits. ``name`` is what tables call the method."""

    name: str

    def edit(self, records: Sequence[EditRecord]) -> EditedModel: ...
