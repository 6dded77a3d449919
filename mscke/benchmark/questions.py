"""Questions about a scene, as programs: a reference picks an entity, an attribute is read off it.

``Question.answer(scene)`` runs the program. Running it on the scene before and after an edit is
what decides the edit's scope (:func:`in_scope`); no judge is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mscke.benchmark.scenes import CARDS, CATEGORIES, KINDS, PLACES, Entity, Scene, neighbours


class Unanswerable(ValueError):
    """The question presupposes something that the scene does not have exactly once."""


@dataclass(frozen=True)
class Reference:
    """A description that should fit exactly one entity: ``("relation", "left of", "owl")``."""

    kind: str  # colour | place | relation | category | name
    value: str
    anchor: str = ""  # relation only: the name of the neighbour

    def resolve(self, scene: Scene) -> tuple[Entity, Entity]:
        """The entity meant, and the one looked up first (the anchor of a relation, else itself)."""
        if self.kind == "relation":
            anchor = _only([e for e in scene.entities if e.kind == self.anchor], self)
            target = scene.at(neighbours(anchor.cell).get(self.value, -1))
            return _only([target] if target else [], self), anchor
        fits = {
            "colour": lambda e: e.card == self.value,
            "place": lambda e: e.place == self.value,
            "category": lambda e: e.kind is not None and KINDS[e.kind].category == self.value,
            "name": lambda e: e.kind == self.value,
        }[self.kind]
        target = _only([e for e in scene.entities if fits(e)], self)
        return target, target

    def phrase(self, wording: int = 0) -> str:
        """A noun phrase; two wordings each."""
        forms = {
            "colour": ("the thing on the {v} card", "the thing whose card is {v}"),
            "place": ("the thing at the {v}", "the thing in the {v} place"),
            "relation": ("the thing just {v} the {a}", "the thing directly {v} the {a}"),
            "category": ("the {v}", "the only {v}"),
            "name": ("the {v}", "the only {v}"),
        }[self.kind]
        noun = "piece of clothing" if self.value == "clothing" else self.value
        return forms[wording % 2].format(v=noun, a=self.anchor)


def _only(found: list[Entity], reference: Reference) -> Entity:
    if len(found) != 1:
        raise Unanswerable(f"{reference} fits {len(found)} entities, not one")
    return found[0]


IDENTITY = ("name", "category", "flies", "animal", "food")  # read off what an edit changes
ATTRIBUTES = (*IDENTITY, "colour", "place", "exists", "count")

WORDINGS = {
    "name": ("What is {np}?", "Name {np}.", "Tell me what {np} is."),
    "category": ("What kind of thing is {np}?", "To which group does {np} belong?"),
    "flies": ("Can {np} fly?", "Is {np} able to fly?"),
    "animal": ("Is {np} an animal?", "Does {np} count as an animal?"),
    "food": ("Is {np} food?", "Is {np} something to eat?"),
    "colour": ("What colour is the card of {np}?", "Which card colour has {np}?"),
    "place": ("Where is {np}?", "In which place is {np}?"),
    "exists": ("Is there {a} {v} here?", "Does the picture show {a} {v}?"),
    "count": ("How many {v} are there?", "What is the number of {v}?"),
}
_PLURALS = {"fruit": "fruits", "clothing": "pieces of clothing"}


def article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


@dataclass(frozen=True)
class Question:
    """``attribute`` of what ``reference`` means; ``exists`` and ``count`` ask about ``value`` instead."""

    attribute: str
    reference: Reference | None = None
    value: str = ""  # exists: a kind; count: a category
    wording: int = 0

    def answer(self, scene: Scene) -> str:
        """Run the program. Raises :class:`Unanswerable` when a presupposition fails."""
        if self.attribute == "exists":
            return "yes" if any(e.kind == self.value for e in scene.entities) else "no"
        if self.attribute == "count":
            kinds = [KINDS[e.kind].category for e in scene.entities if e.kind is not None]
            return str(kinds.count(self.value))
        entity, _ = self.reference.resolve(scene)
        if self.attribute == "colour":
            return entity.card
        if self.attribute == "place":
            return entity.place
        if entity.kind is None:
            raise Unanswerable("the entity's kind is not known")
        return fact(entity.kind, self.attribute)

    def cells(self, scene: Scene) -> tuple[int, int]:
        """(target, anchor) cells that the program looks at; −1 where it looks at none."""
        if self.reference is not None:
            target, anchor = self.reference.resolve(scene)
            return target.cell, anchor.cell
        found = [e.cell for e in scene.entities if e.kind == self.value]
        return (found[0], found[0]) if self.attribute == "exists" and found else (-1, -1)

    def text(self) -> str:
        forms = WORDINGS[self.attribute]
        form = forms[self.wording % len(forms)]
        if self.reference is not None:
            return form.format(np=self.reference.phrase(self.wording // len(forms)))
        noun = self.value
        if self.attribute == "count":
            noun = _PLURALS.get(noun, noun + "s")
        return form.format(v=noun, a=article(noun))


def fact(kind: str, attribute: str) -> str:
    """What is always true of a kind: ``fact("owl", "flies") == "yes"``."""
    k = KINDS[kind]
    value = {
        "name": k.name, "category": k.category,
        "flies": k.flies, "animal": k.animal, "food": k.food,
    }[attribute]  # fmt: skip
    return value if isinstance(value, str) else ("yes" if value else "no")


def references(scene: Scene, entity: Entity, kinds: tuple[str, ...] = ()) -> list[Reference]:
    """Every reference that means ``entity`` in ``scene``, optionally only of the given kinds."""
    candidates = [Reference("colour", entity.card), Reference("place", entity.place)]
    for direction, cell in neighbours(entity.cell).items():
        other = scene.at(cell)
        if other is not None and other.kind is not None:
            candidates.append(Reference("relation", OPPOSITE[direction], other.kind))
    if entity.kind is not None:
        candidates.append(Reference("category", KINDS[entity.kind].category))
        candidates.append(Reference("name", entity.kind))
    found = []
    for reference in candidates:
        if kinds and reference.kind not in kinds:
            continue
        try:
            if reference.resolve(scene)[0] == entity:
                found.append(reference)
        except Unanswerable:
            continue
    return found


OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def in_scope(question: Question, before: Scene, after: Scene, cell: int) -> bool | None:
    """Does the edit that turns ``before`` into ``after`` in ``cell`` bear on ``question``?

    True when the answer differs or is read off the edited entity's identity; False otherwise;
    None when the question has no answer on one of the two sides. An entity of unknown kind
    (``kind=None``, an edit that corrects a misnamed one) is answered for only after the edit.
    """
    try:
        new = question.answer(after)
        target = question.cells(after)[0] if question.reference else -1
    except Unanswerable:
        return None
    if question.attribute in IDENTITY and target == cell:
        try:  # the reference must hold before the edit too
            if question.reference.resolve(before)[0].cell != cell:
                return None
        except Unanswerable:
            return None
        return True
    try:
        return question.answer(before) != new
    except Unanswerable:
        return None


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
    weights = weights or REFERENCE_WEIGHTS
    mix = mix or PRETRAINING_MIX
    attribute = tuple(mix)[_draw(rng, mix)]
    wording = int(rng.integers(6))
    if attribute == "exists":
        if rng.random() < 0.5:
            value = scene.entities[int(rng.integers(len(scene.entities)))].kind
        else:
            pool = [k.name for k in KINDS.values() if not k.held_out]
            value = pool[int(rng.integers(len(pool)))]
        return Question("exists", value=value, wording=wording)
    if attribute == "count":
        if rng.random() < 0.7:
            value = KINDS[scene.entities[int(rng.integers(len(scene.entities)))].kind].category
        else:
            value = CATEGORIES[int(rng.integers(len(CATEGORIES)))]
        return Question("count", value=value, wording=wording)
    while True:
        entity = scene.entities[int(rng.integers(len(scene.entities)))]
        taken = {"name": ("name",), "category": ("category", "name"), "colour": ("colour",),
                 "place": ("place",)}.get(attribute, ("name",))  # fmt: skip
        found = [r for r in references(scene, entity, kinds) if r.kind not in taken]
        present = {k: weights[k] for k in sorted({r.kind for r in found})}
        if not present:
            continue
        kind = tuple(present)[_draw(rng, present)]
        same = [r for r in found if r.kind == kind]
        return Question(attribute, same[int(rng.integers(len(same)))], wording=wording)


PRETRAINING_MIX = {
    "name": 0.34, "category": 0.14, "flies": 0.05, "animal": 0.05, "food": 0.05,
    "colour": 0.12, "place": 0.12, "exists": 0.07, "count": 0.06,
}  # fmt: skip


REFERENCE_WEIGHTS = {"colour": 1.0, "place": 1.0, "relation": 2.0, "category": 1.0, "name": 1.0}


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
    texts += [_PLURALS.get(c, c + "s") for c in CATEGORIES]
    return texts
