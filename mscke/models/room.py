"""Texts that a model has no room for: refused by name, or told of where they are cut; never cut in silence."""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Callable, Sequence

from mscke.benchmark.sample import SHOWN, EditRecord, RecordError
from mscke.models.mllm import MLLM
from mscke.models.prompts import IN_CONTEXT, TEMPLATE, PromptEncoder, TooLong

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
    encoder, lines = base.encoder, {}
    asked = [(record, role, *_read(record, role)) for record in records for role in FIELDS]
    tokens = _count(encoder, [text for *_, read, fields in asked for text in (*read, *fields.values())])
    for record, role, read, fields in asked:
        *told, answer = (tokens[text] for text in read)
        total = sum(told) + max(answer, encoder.reserve)
        room = encoder.positions - encoder.prefix_length(record.queries[role].image is not None)
        if total > room:
            field = max(fields, key=lambda name: tokens[fields[name]])
            lines.setdefault(
                (record.id, field),
                f'  record {record.id}, field "{field}": {tokens[fields[field]]:,} tokens, {total:,} with edit, question '
                f"and answer; {base.name} has room for {room:,}",
            )
    if lines:
        more = [f"  … and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        head = "these records are too long (counted from 0); shorten the fields, or leave the records out:"
        raise RecordError("\n".join([head, *list(lines.values())[:SHOWN], *more]))


def _read(record: EditRecord, role: str) -> tuple[tuple[str, str, str], dict[str, str]]:
    """What is read together in a prompt (context, question and answer), and the fields that it is made of."""
    edit, question, answer = record.edit, record.queries[role].question, record.answers[role]
    read = IN_CONTEXT.format(edit.prompt, edit.answer), TEMPLATE.format(question), " " + answer
    return read, {"src": edit.prompt, "alt": edit.answer} | dict(zip(FIELDS[role], (question, answer), strict=True))


def _count(encoder: PromptEncoder, texts: Sequence[str]) -> dict[str, int]:
    texts = list(dict.fromkeys(texts))
    return dict(zip(texts, map(len, encoder.text_ids(texts)), strict=True)) if texts else {}
