"""Random questions about a scene, to pretrain on, and every word of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from mscke.benchmark.questions import OPPOSITE, PLURALS, WORDINGS, Question, Reference, references
from mscke.benchmark.scenes import CARDS, CATEGORIES, KINDS, PLACES, Scene

Item = TypeVar("Item")


def sample_question(
    rng: np.random.Generator,
    scene: Scene,
    mix: dict[str, float] | None = None,
    kinds: tuple[str, ...] = (),
    weights: dict[str, float] | None = None,
) -> Question:
    """A random answerable question: any entity, any reference (of ``kinds``), any attribute that makes sense.

    ``mix`` weighs attributes, ``weights`` kinds of reference.
    """
    weights, mix = weights or REFERENCE_WEIGHTS, mix or PRETRAINING_MIX
    attribute = tuple(mix)[_draw(rng, mix)]
    wording = int(rng.integers(6))
    if attribute == "exists":
        known = [k.name for k in KINDS.values() if not k.held_out]
        value = pick(rng, scene.entities).kind if rng.random() < 0.5 else pick(rng, known)
        return Question("exists", value=value, wording=wording)
    if attribute == "count":
        there = rng.random() < 0.7
        value = KINDS[pick(rng, scene.entities).kind].category if there else pick(rng, CATEGORIES)
        return Question("count", value=value, wording=wording)
    taken = {"category": ("category", "name"), "colour": ("colour",), "place": ("place",)}.get(attribute, ("name",))
    while True:
        found = [r for r in references(scene, pick(rng, scene.entities), kinds) if r.kind not in taken]
        present = {k: weights[k] for k in sorted({r.kind for r in found})}
        if present:
            kind = tuple(present)[_draw(rng, present)]
            return Question(attribute, pick(rng, [r for r in found if r.kind == kind]), wording=wording)


PRETRAINING_MIX = {
    "name": 0.34, "category": 0.14, "flies": 0.05, "animal": 0.05, "food": 0.05,
    "colour": 0.12, "place": 0.12, "exists": 0.07, "count": 0.06,
}  # fmt: skip


REFERENCE_WEIGHTS = {"colour": 1.0, "place": 1.0, "relation": 2.0, "category": 1.0, "name": 1.0}


def pick(rng: np.random.Generator, items: Sequence[Item]) -> Item:
    return items[int(rng.integers(len(items)))]


def _draw(rng: np.random.Generator, weights: dict[str, float]) -> int:
    values = np.fromiter(weights.values(), float)
    return int(np.searchsorted(np.cumsum(values), rng.random() * values.sum(), side="right"))


def vocabulary() -> list[str]:
    """Every word that scene questions and answers use, for the tokenizer."""
    texts = [*KINDS, *CATEGORIES, *CARDS, *PLACES, "yes", "no", *map(str, range(5))]
    for attribute, forms in WORDINGS.items():
        texts += [f.format(np="the thing", a="an", v=attribute) for f in forms]
    for kind, value in (("colour", "red"), ("place", "top left"), ("name", "owl")):
        texts += [Reference(kind, value).phrase(i) for i in (0, 1)]
    for direction in OPPOSITE:
        texts += [Reference("relation", direction, "owl").phrase(i) for i in (0, 1)]
    texts += [PLURALS.get(c, c + "s") for c in CATEGORIES]
    return texts
