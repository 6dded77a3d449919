"""Visual questions in VQAv2's format and text questions in NQ-open's, and the edits one can make of them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mscke.benchmark.sample import RecordError

COCO_NAME = "{subtype}/COCO_{subtype}_{image_id:012d}.jpg"
DRAWS = 20  # tries for an answer that no annotator gave


@dataclass(frozen=True)
class VisualQuestion:
    """A question of VQAv2 with its most common answer."""

    id: int
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

    Raises :class:`RecordError` when a file is not whole, not VQAv2, or does not answer the other's questions.
    """
    asked, answered = _read_json(questions), _read_json(annotations)
    try:
        answers = {row["question_id"]: row for row in answered["annotations"]}
        return [
            VisualQuestion(
                row["question_id"],
                name.format(subtype=asked.get("data_subtype", ""), image_id=row["image_id"]),
                row["question"],
                (found := answers[row["question_id"]])["multiple_choice_answer"],
                (found["answer_type"], found["question_type"]),
                frozenset([found["multiple_choice_answer"], *(a["answer"] for a in found["answers"])]),
            )
            for row in asked["questions"]
        ]
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        fault = f"{questions} and {annotations} are not one split of VQAv2 ({type(error).__name__}: {error})"
        raise RecordError(f"{fault}; give a questions file and the annotations of the same split") from error


def read_nq(path: str | Path) -> list[tuple[str, str]]:
    """(question, first answer) of each line of NQ-open's JSON lines, every question once, in file order.

    Raises :class:`RecordError` naming the first line that is not ``{"question": …, "answer": [… , …]}``.
    """
    pairs = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                question, answer = row["question"].strip(), row["answer"][0].strip()
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise RecordError(f"{path}, line {number}: {error!r}; fetch NQ-open again") from error
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

    A new answer is drawn from those to questions of the same kind, as often as each is given there, but
    is none that an annotator gave to this question. Questions whose answer is of ``answer_types`` are
    edited: "yes/no" and "number" name no entity. ``n_images`` bounds how many images are drawn.
    """
    by_image, answers = defaultdict(list), defaultdict(list)
    for question in questions:
        if question.question.strip() and question.answer.strip():
            by_image[question.image].append(question)
            answers[question.kind].append(question.answer)
    pairs, order = [], sorted(by_image)
    for i in np.random.default_rng(seed).permutation(len(order))[:n_images]:
        group = by_image[order[i]]
        rng = np.random.default_rng([seed, group[0].id])  # an image's edits do not depend on other images'
        group = [group[j] for j in rng.permutation(len(group))]
        edits = [(q, _another_answer(rng, q, answers[q.kind])) for q in group if q.kind[0] in answer_types]
        for edited, answer in [(q, answer) for q, answer in edits if answer][:edits_per_image]:
            others = [q for q in group if q.question.lower() != edited.question.lower()]
            pairs += [Pair(edited, answer, candidate) for candidate in others]
    return pairs


def _another_answer(rng: np.random.Generator, question: VisualQuestion, answers: list[str]) -> str | None:
    drawn = (answers[int(rng.integers(len(answers)))] for _ in range(DRAWS))
    return next((answer for answer in drawn if answer not in question.given), None)


def _read_json(path: str | Path) -> dict:
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise RecordError(f"{path} is not JSON: {error}; it may be cut short: fetch it again") from None
