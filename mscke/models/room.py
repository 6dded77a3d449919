"""Texts that a model has no room for: refused by name, or told of where they are cut; never cut in silence."""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Callable, Sequence

from mscke.benchmark.sample import SHOWN, EditRecord, RecordError
from mscke.models.mllm import MLLM
from mscke.models.prompts import IN_CONTEXT, TEMPLATE, TooLong

FIELDS = {  # of a record's JSON: the question and the answer of each role
    "reliability": ("src", "alt"), "generality": ("rephrase", "alt"), "in_scope": ("fg_gen_q", "fg_gen_a"),
    "out_of_scope": ("fg_loc_q", "fg_loc_a"), "locality": ("loc", "loc_ans"),
}  # fmt: skip


class Room:
    """How much an encoder reads of a text: ``limit`` tokens, its marks included; it cuts off the rest.

    ``count`` gives the numbers of tokens of texts before any cut. :attr:`cut` holds the texts that were asked and
    cut, with their numbers.
    """

    def __init__(self, name: str, limit: int, count: Callable[[list[str]], list[int]]):
        self.name, self.limit, self.count = name, limit, count
        self.cut: dict[str, int] = {}
        self._tokens: dict[str, int] = {}

    def check(self, texts: Sequence[str], stored: bool) -> None:
        """Warn of those that are cut, once a text. Raises :class:`TooLong` if they are to be ``stored``.

        An edit's answer stands at its end: without it the edit is near to other questions, and answers them.
        """
        if new := [text for text in dict.fromkeys(texts) if text not in self._tokens]:
            self._tokens.update(zip(new, self.count(new), strict=True))
        known = {} if stored else self.cut
        long = {t: n for t in texts if (n := self._tokens[t]) > self.limit and t not in known}
        if not long:
            return
        told = [f"{reprlib.repr(text)} has {n:,}" for text, n in list(long.items())[:SHOWN]]
        more = f" (and {len(long) - SHOWN:,} more texts)" if len(long) > SHOWN else ""
        found = f"{self.name} reads {self.limit:,} tokens of a text; {', '.join(told)}{more}"
        if stored:
            raise TooLong(f"{found}. An edit's answer would be cut off: shorten it. Nothing was stored")
        self.cut |= long
        warnings.warn(f"{found}. What is beyond them is not read: shorten the question", stacklevel=4)


def check_records(base: MLLM, records: Sequence[EditRecord]) -> None:
    """Raise :class:`RecordError` unless ``base`` has room for every record; it names record, field and tokens.

    Each question must fit in with the record's edit in its context, and with its answer, which may take
    ``encoder.reserve`` tokens at least: so the longest of its prompts is read.
    """
    encoder, asked = base.encoder, [(r, role, _read(r, role)) for r in records for role in FIELDS]
    texts = list({text for *_, read in asked for text in read})
    tokens = dict(zip(texts, map(len, encoder.text_ids(texts)), strict=True)) if texts else {}
    lines = {}
    for record, role, texts in asked:
        *read, answer = (tokens[text] for text in texts)
        room = encoder.positions - encoder.prefix_length(record.queries[role].image is not None)
        if (total := sum(read) + max(answer, encoder.reserve)) > room:
            field, n = _longest(base, record, role)
            lines.setdefault(
                (record.id, field),
                f'  record {record.id}, field "{field}": {n:,} tokens, {total:,} with edit, question and answer; '
                f"{base.name} has room for {room:,}",
            )
    if lines:
        more = [f"  … and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        head = "these records are too long (counted from 0); shorten the fields, or leave the records out:"
        raise RecordError("\n".join([head, *list(lines.values())[:SHOWN], *more]))


def _read(record: EditRecord, role: str) -> tuple[str, str, str]:
    """What is read together in a prompt: context, question and answer."""
    context = IN_CONTEXT.format(record.edit.prompt, record.edit.answer)
    return context, TEMPLATE.format(record.queries[role].question), " " + record.answers[role]


def _longest(base: MLLM, record: EditRecord, role: str) -> tuple[str, int]:
    """The longest of the fields that are read together, and its tokens."""
    values = {"src": record.edit.prompt, "alt": record.edit.answer}
    values |= dict(zip(FIELDS[role], (record.queries[role].question, record.answers[role]), strict=True))
    lengths = dict(zip(values, map(len, base.encoder.text_ids(list(values.values()))), strict=True))
    field = max(lengths, key=lengths.get)
    return field, lengths[field]
