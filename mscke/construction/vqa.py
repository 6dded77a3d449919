"""Visual questions in VQAv2's format and text questions in NQ-open's, and the edits one can make of them."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mscke.benchmark.answers import is_text, normalise_answer
from mscke.benchmark.sample import RecordError

COCO_NAME = "{subtype}/COCO_{subtype}_{image_id:012d}.jpg"
DRAWS = 20  # tries for an answer that no annotator gave
KINDS = {str: "text", list: "a list", (int, str): "a whole number or text"}


@dataclass(frozen=True)
class VisualQuestion:
    """A question of VQAv2 with its most common answer."""

    id: int | str
    image: str  # relative to the image folder
    question: str
    answer: str
    kind: tuple[str, str]  # ("other", "what color is the"): type of the answer, beginning of the question
    given: frozenset[str]  # what any annotator answered


@dataclass(frozen=True)
class Pair:
    """The edit that answers ``edited`` with ``answer``, and another question on the same image."""

    edited: VisualQuestion
    answer: str
    candidate: VisualQuestion


def read_vqa(questions: str | Path, annotations: str | Path, name: str = COCO_NAME) -> list[VisualQuestion]:
    """The questions of one VQAv2 split, in file order; ``name`` makes an image's path of its number.

    Ids may be numbers or text. Of rows that are the same one is taken. Raises :class:`RecordError`, naming file, row
    and field, when a file is not whole, not VQAv2, or does not answer the other's questions.
    """
    _, answers = _rows(annotations, "annotations")
    file, asked = _rows(questions, "questions")
    found = []
    for number, (at, row) in asked.items():
        with _named(f'{questions}, "questions" {at}'):
            text, image = _text(row, "question"), _get(row, "image_id", (int, str))
        if number not in answers:
            fault = f'no annotation for question_id {number!r} of {questions}, "questions" {at}'
            raise RecordError(f"{annotations}: {fault}; give the annotations of the same split")
        at, row = answers[number]
        with _named(f'{annotations}, "annotations" {at}'):
            answer = _text(row, "multiple_choice_answer")
            kind = (_text(row, "answer_type"), _text(row, "question_type"))
            given = frozenset([answer, *(_text(each, "answer") for each in _get(row, "answers", list))])
        path = _path(name, file.get("data_subtype", ""), image)
        found.append(VisualQuestion(number, path, text, answer, kind, given))
    return found


def read_nq(path: str | Path) -> list[tuple[str, str]]:
    """(question, first answer) of each line of NQ-open's JSON lines, every question once, in file order.

    Empty lines are passed over. Raises :class:`RecordError` naming the first other line that is not
    ``{"question": …, "answer": [… , …]}``, and its field.
    """
    pairs = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            with _named(f"{path}, line {number}", "mend it, or fetch NQ-open again"):
                row = _json(line)
                question = _text(row, "question").strip()
                if not (answers := _get(row, "answer", list)):
                    raise ValueError('field "answer": empty')
                answer = _text({"answer": answers[0]}, "answer").strip()
            if question and answer:
                pairs.setdefault(question, answer)
    return list(pairs.items())


def propose(
    questions: Iterable[VisualQuestion],
    n_images: int | None = None,
    edits_per_image: int = 2,
    answer_types: Sequence[str] = ("other",),
    seed: int = 0,
) -> list[Pair]:
    """Edits and, beside each, every other question on its image; the pairs of one edit stand together.

    A new answer is drawn from those to questions of the same kind, as often as each is given there. It is none that
    :func:`normalise_answer` takes for one that an annotator gave: "Gray" is no edit of "gray". Questions whose answer
    is of ``answer_types`` are edited: "yes/no" and "number" name no entity. ``n_images`` bounds how many images are
    drawn.
    """
    for name, value in {"n_images": n_images, "edits_per_image": edits_per_image}.items():
        if value is not None and value < 0:
            raise ValueError(f"{name} is {value}; give 0 or more")
    by_image, answers = defaultdict(list), defaultdict(list)
    for question in questions:
        if question.question.strip() and question.answer.strip():
            by_image[question.image].append(question)
            answers[question.kind].append(question.answer)
    pairs, order = [], sorted(by_image)
    for i in np.random.default_rng(seed).permutation(len(order))[:n_images]:
        group = by_image[order[i]]
        rng = np.random.default_rng([seed, _entropy(group[0].id)])  # an image's edits do not depend on other images'
        group = [group[j] for j in rng.permutation(len(group))]
        edits = [(q, _another_answer(rng, q, answers[q.kind])) for q in group if q.kind[0] in answer_types]
        for edited, answer in [(q, answer) for q, answer in edits if answer][:edits_per_image]:
            asked = normalise_answer(edited.question)
            others = [q for q in group if normalise_answer(q.question) != asked]
            pairs += [Pair(edited, answer, candidate) for candidate in others]
    return pairs


def _another_answer(rng: np.random.Generator, question: VisualQuestion, answers: list[str]) -> str | None:
    """One of ``answers`` that no annotator gave, in whatever case, form or spelling; None if none is drawn."""
    given = {normalise_answer(answer) for answer in question.given}
    drawn = (answers[int(rng.integers(len(answers)))] for _ in range(DRAWS))
    return next((answer for answer in drawn if normalise_answer(answer) not in given), None)


def _entropy(number: int | str) -> int:
    """A seed that is the id's own: numbers, in whatever way they are written, are theirs."""
    text = str(number)
    return int(text) if text.isdecimal() else int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


# ------------------------------------------------------------------------------- reading


@contextmanager
def _named(where: str, fix: str = "give a questions file and the annotations of the same split of VQAv2"):
    """Faults that are found inside get the place and the fix."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{where}: {error}; {fix}") from None


def _rows(path: str | Path, part: str) -> tuple[dict, dict[int | str, tuple[int, dict]]]:
    """(the file, question id -> (place in its list ``part``, row), in file order)."""
    with _named(str(path), "it may be cut short: fetch it again"):
        file = _json(Path(path).read_bytes())
    with _named(str(path)):
        listed = _get(file, part, list)
    rows = {}
    for at, row in enumerate(listed):
        with _named(f'{path}, "{part}" {at}'):
            number = _get(row, "question_id", (int, str))
            first, same = rows.setdefault(number, (at, row))
            if same != row:
                raise ValueError(f'field "question_id": {number!r} is also that of {first}, which differs')
    return file, rows


def _text(row: object, field: str) -> str:
    text = _get(row, field, str)
    if not is_text(text):
        raise ValueError(f'field "{field}": {text!r} has half a character (lone surrogate)')
    return text


def _get(row: object, field: str, kind: type | tuple[type, ...]):
    if not isinstance(row, dict):
        raise ValueError(f"found {reprlib.repr(row)} where an object is expected")
    if field not in row:
        raise ValueError(f'field "{field}": missing')
    if not isinstance(row[field], kind) or isinstance(row[field], bool):
        raise ValueError(f'field "{field}": found {reprlib.repr(row[field])} where {KINDS[kind]} is expected')
    return row[field]


def _path(name: str, subtype: str, image: int | str) -> str:
    try:
        return name.format(subtype=subtype, image_id=image)
    except (LookupError, ValueError, AttributeError) as error:
        fix = "mend it (--image-name); {image_id} alone takes text, {image_id:012d} numbers"
        raise RecordError(f"{name!r} makes no path of image_id {image!r} ({error!r}); {fix}") from None


def _json(raw: bytes) -> object:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
