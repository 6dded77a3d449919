"""What a judge is asked about an edit and another question on the image, and what its verdicts are worth.

The paper's two stages (§4, specificity data), in our words: its prompts are not published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mscke.construction.judge import Judge, NoReply, Request, Task
from mscke.construction.vqa import Pair

_EDIT = """An edit changes what a vision-language model knows about a picture: from now on, the right answer to
the edit's question is its new answer. Suppose that the picture shows it so, and everything else as it is."""
_TEXT = {"type": "string"}

SCOPE = Task(
    "scope",
    f"""{_EDIT}
You are given the picture and, as JSON, the edit and another question about the same picture. Your verdict is
"entailed" if the other question's answer follows from the edit and the picture: it is read off what the edit
changes, whether or not its words change;
"independent" if the other question is about something that the edit leaves as it is, so its old answer holds;
"neither" if its answer cannot be told after the edit, or it no longer fits the picture.
First give a reason in one sentence, then the verdict, then the other question's answer after the edit, in as
few words as its old answer ("" for "neither").""",
    {"reason": _TEXT, "verdict": {"type": "string", "enum": ["entailed", "independent", "neither"]}, "answer": _TEXT},
)
TEXT_SCOPE = Task(
    "text_scope",
    f"""{_EDIT}
You are given, as JSON, the edit and another question about the same picture, but not the picture. Your verdict is
"entailed" if the words alone tell that the other question's answer is read off what the edit changes;
"independent" if the words alone tell that it is about something that the edit leaves as it is;
"unsettled" if one would have to see the picture to know.
First give a reason in one sentence, then the verdict.""",
    {"reason": _TEXT, "verdict": {"type": "string", "enum": ["entailed", "independent", "unsettled"]}},
)


@dataclass(frozen=True)
class Judged:
    """A pair that can be used: its ``scope`` and the candidate's ``answer`` after the edit."""

    pair: Pair
    scope: str  # entailed (in scope) | independent (out of scope)
    answer: str
    hard: bool  # the text alone does not lead to the same verdict


def judge_pairs(
    judge: Judge, pairs: Sequence[Pair], images: Path, repeat: int = 200, seed: int = 0
) -> tuple[list[Judged], dict[str, dict], list[dict]]:
    """Both stages: (the usable ones of ``pairs``, in order; the judge's :func:`agreement` with itself over ``repeat``
    questions, by stage; the pairs without a verdict, named by :func:`left_out`).

    Pairs judged to be neither in scope nor out of it are not usable.
    """
    first = [_scope_request(pair, images) for pair in pairs]
    seen = judge.ask_all(first, "image and text")
    usable = [(pair, *found) for pair, reply in zip(pairs, seen, strict=True) if (found := _scope(pair, reply))]
    missing = left_out("image and text", pairs, seen)
    second = [_text_request(pair) for pair, *_ in usable]
    read = judge.ask_all(second, "text alone")
    judged = [
        Judged(pair, scope, answer, hard=reply["verdict"] != scope)
        for (pair, scope, answer), reply in zip(usable, read, strict=True)
        if reply
    ]
    missing += left_out("text alone", [pair for pair, *_ in usable], read)
    agreed = {
        "image_and_text": agreement(judge, first, seen, repeat, seed),
        "text_alone": agreement(judge, second, read, repeat, seed),
    }
    return judged, agreed, missing


def left_out(stage: str, pairs: Sequence[Pair], replies: Sequence[dict | NoReply]) -> list[dict]:
    """Which of ``pairs`` have no reply at this ``stage``, and why: "refused" or "unanswered"."""
    return [
        {
            "stage": stage, "why": reply.value, "image": pair.edited.image,
            "edit": pair.edited.id, "question": pair.candidate.id,
        }
        for pair, reply in zip(pairs, replies, strict=True) if not reply
    ]  # fmt: skip


def _scope_request(pair: Pair, images: Path) -> Request:
    edit = {"question": pair.edited.question, "old_answer": pair.edited.answer, "new_answer": pair.answer}
    other = {"question": pair.candidate.question, "old_answer": pair.candidate.answer}
    return Request(SCOPE, {"edit": edit, "other": other}, images / pair.edited.image)


def _text_request(pair: Pair) -> Request:
    """What a scope classifier gets, but for the image: the edit with its answer, a question without."""
    edit = {"question": pair.edited.question, "new_answer": pair.answer}
    return Request(TEXT_SCOPE, {"edit": edit, "other": {"question": pair.candidate.question}})


def _scope(pair: Pair, reply: dict | NoReply) -> tuple[str, str] | None:
    """(scope, the candidate's answer after the edit), if there are both."""
    if not reply or reply["verdict"] == "neither":
        return None
    inside = reply["verdict"] == "entailed"
    answer = reply["answer"].strip() if inside else pair.candidate.answer
    return (reply["verdict"], answer) if answer else None


# ------------------------------------------------------------------------------- agreement


def cohen_kappa(a: Sequence, b: Sequence) -> float:
    """Agreement beyond chance of two sequences of labels (Cohen 1960); NaN when both hold one label only."""
    labels, codes = np.unique([a, b], return_inverse=True)
    table = np.zeros((len(labels), len(labels)), int)
    np.add.at(table, tuple(codes.reshape(2, -1)), 1)
    observed, chance = np.trace(table) / len(a), table.sum(0) @ table.sum(1) / len(a) ** 2
    return float((observed - chance) / (1 - chance)) if len(labels) > 1 else float("nan")


def agreement(
    judge: Judge, requests: Sequence[Request], replies: Sequence[dict | NoReply], n: int = 200, seed: int = 0
) -> dict[str, float | None]:
    """Ask ``n`` of ``requests`` once more, their facts in the other order, and compare the verdicts.

    The order carries no meaning, and keeps a judge at temperature 0 from just repeating itself. Returns kappa with its
    95 % interval lo, hi (bootstrap over what was asked twice), None where there is no such number, and n.
    """
    rng = np.random.default_rng(seed)
    drawn = [i for i in rng.permutation(len(requests)) if replies[i]][:n]
    turned = [replace(requests[i], facts=dict(reversed(requests[i].facts.items()))) for i in drawn]
    again = zip(drawn, judge.ask_all(turned, "once more"), strict=True)
    pairs = np.array([(replies[i]["verdict"], reply["verdict"]) for i, reply in again if reply])
    if len(np.unique(pairs)) < 2:
        return {"kappa": None, "lo": None, "hi": None, "n": len(pairs)}
    resampled = [cohen_kappa(*pairs[rng.integers(len(pairs), size=len(pairs))].T) for _ in range(2000)]
    lo, hi = np.nanpercentile(resampled, (2.5, 97.5))
    return {"kappa": cohen_kappa(*pairs.T), "lo": float(lo), "hi": float(hi), "n": len(pairs)}
