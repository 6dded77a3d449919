"""IKE (Zheng et al., EMNLP 2023, arXiv:2305.12740): editing by what stands in the context; nothing is trained.

The prompt holds k demonstrations, then the edit as a new fact, then the question::

    New Fact: {t_k} {y_k}\\nPrompt: Question: {q_k} Short answer: {a_k}\\n\\n      the k-th nearest
    …
    New Fact: {t_e} {y_e}\\nPrompt: Question: {t} Short answer:

The demonstrations are text, as released: only the question's own image is seen. Every question is asked
in this context, whether the edit bears on it or not. What a demonstration asks follows its rank
(:data:`ROTATION`), so that every context shows copying, updating and retaining.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd
from torch import Tensor

from mscke.benchmark.sample import EditRecord, Query
from mscke.editors.choose import judged
from mscke.editors.serac import MiniLMEncoder
from mscke.memory import EditMemory
from mscke.models.decoding import Forced, by_length, generate, teacher_force
from mscke.models.mllm import MLLM
from mscke.models.prompts import IN_CONTEXT, TEMPLATE, TooLong
from mscke.training.scope import ROLES

# What the nearest demonstration asks, the second nearest, …: IKE's 1 copy : 3 updates : 4 retained
ROTATION = (
    "in_scope", "out_of_scope", "generality", "locality", "in_scope", "out_of_scope", "reliability", "locality",
)  # fmt: skip
TOKENS = 64  # of a batch, for each query that the base model takes at once: contexts are long


def demonstration(record: EditRecord, role: str) -> str:
    """One solved case: the record's edit, one of its questions, and what an ideal edited model answers."""
    fact = IN_CONTEXT.format(record.edit.prompt, record.edit.answer)
    return f"{fact}{TEMPLATE.format(record.queries[role].question)} {record.answers[role]}\n\n"


def largest_k(base: MLLM, records: Sequence[EditRecord]) -> int:
    """How many demonstrations drawn from ``records`` fit into the model's positions, whichever they are.

    The edit with its question and answer takes at most the place of one more.
    """
    texts = [demonstration(record, role) for record in records for role in ROLES]
    encoder, longest = base.encoder, max(map(len, base.encoder.text_ids(texts)))
    return max(0, (encoder.positions - encoder.prefix_length(True) - encoder.reserve) // longest - 1)


class InContextModel:
    """The base model with one edit's context before each question; without it where the context is ``off``."""

    chunk = None

    def __init__(
        self, base: MLLM, contexts: list[str], nearest: Callable[[Sequence[Query]], Tensor], off: bool = False
    ):
        self.base, self.contexts, self.nearest, self.off = base, contexts, nearest, off

    def unedited(self) -> InContextModel:
        """The base model, asked in batches of the same queries."""
        return InContextModel(self.base, self.contexts, self.nearest, off=True)

    def prompts(self, queries: Sequence[Query], among: Tensor | None = None) -> list[list[int]]:
        """Token ids of (B) conditioned prompts; without ``among`` the edit whose text is nearest is told.

        Raises :class:`TooLong` for a prompt that the model has not the positions for.
        """
        if not self.contexts:
            return self.base.prompts(queries)
        rows = self.nearest(queries) if among is None else among
        try:
            return self.base.prompts(queries, [self.contexts[i] for i in rows.tolist()])
        except TooLong as error:
            raise TooLong(f"{error}, or lower k (see largest_k)") from None

    def _size(self, prompts: list[list[int]]) -> int:
        """How many prompts a batch has: they are long."""
        return max(1, TOKENS * self.base.batch_size // max(map(len, prompts), default=1))

    def answer(self, queries: Sequence[Query], among: Tensor | None = None) -> list[str]:
        """Greedy answers (B), normalised."""
        prompts, base = self.prompts(queries, among), self.base
        asked = base.prompts(queries) if self.off else prompts

        def ask(rows: list[int]) -> list[str]:
            visual = base.see([queries[i] for i in rows])
            return generate(base.model.language_model, base.encoder, [asked[i] for i in rows], visual)

        return by_length(prompts, ask, self._size(prompts))

    def force(self, queries: Sequence[Query], answers: Sequence[str], among: Tensor | None = None) -> list[Forced]:
        """Teacher-forced predictions of (B) gold answers."""
        prompts, base = self.prompts(queries, among), self.base
        asked = base.prompts(queries) if self.off else prompts
        gold = [base.encoder.answer(a, eos=False) for a in answers]

        def ask(rows: list[int]) -> list[Forced]:
            visual = base.see([queries[i] for i in rows])
            texts = [asked[i] for i in rows], [gold[i] for i in rows]
            return teacher_force(base.model.language_model, base.encoder, *texts, visual)

        return by_length(prompts, ask, self._size(prompts))


class IKE:
    """Tells the base model each edit in context, after the ``k`` nearest of ``demonstrations``.

    Nearest by cosine of all-MiniLM-L6-v2 embeddings of "prompt answer"; the demonstrations' are computed
    once, and a search is one matrix product. They must not be the records that are edited.
    """

    name = "IKE"

    def __init__(self, base: MLLM, demonstrations: Sequence[EditRecord], encoder: MiniLMEncoder, k: int):
        self.base, self.demonstrations, self.encoder, self.k = base, demonstrations, encoder, k
        self.matrix = self._embed(demonstrations)  # (R, 384), unit rows

    def _embed(self, records: Sequence[EditRecord]) -> Tensor:
        return self.encoder([Query(r.edit.prompt) for r in records], [r.edit.answer for r in records]).text

    def neighbours(self, records: Sequence[EditRecord]) -> Tensor:
        """Rows (B, k) of the demonstrations nearest to each record's edit, the nearest first."""
        return (self._embed(records) @ self.matrix.T).topk(min(self.k, len(self.matrix))).indices

    def context(self, record: EditRecord, rows: Sequence[int]) -> str:
        """Demonstrations, the nearest last, and the edit as a new fact."""
        cases = [
            demonstration(self.demonstrations[row], ROTATION[rank % len(ROTATION)]) for rank, row in enumerate(rows)
        ]
        return "".join(reversed(cases)) + IN_CONTEXT.format(record.edit.prompt, record.edit.answer)

    def edit(self, records: Sequence[EditRecord]) -> InContextModel:
        """Write the context of each record's edit; the base model stays as it is. Of one fact the last edit is told."""
        found, memory = self.neighbours(records).tolist(), EditMemory(self.encoder.dim)
        contexts = [self.context(record, rows) for record, rows in zip(records, found, strict=True)]
        memory.add([r.edit for r in records], self._embed(records))
        ids, edits = memory.ids, memory.embeddings
        return InContextModel(self.base, contexts, lambda q: ids[(self.encoder(q).text @ edits.T).argmax(1)])


def choose_k(
    base: MLLM,
    demonstrations: Sequence[EditRecord],
    encoder: MiniLMEncoder,
    validation: Sequence[EditRecord],
    ks: Sequence[int] = (0, 1, 2, 4, 8, 32),
) -> tuple[int, pd.DataFrame]:
    """The number of demonstrations that does best on ``validation``: (k, a row a k that fits).

    Best by :func:`mscke.editors.choose.judged`. A k that does not fit becomes :func:`largest_k`.
    """
    limit = largest_k(base, demonstrations)
    rows = [
        {"k": k} | judged(IKE(base, demonstrations, encoder, k).edit(validation), validation)
        for k in sorted({min(k, limit) for k in ks})
    ]
    table = pd.DataFrame(rows)
    return int(table.loc[table["score"].idxmax(), "k"]), table
