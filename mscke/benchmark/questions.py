"""Questions about a scene, as programs: a reference picks an entity, an attribute is read off it.

``Question.answer(scene)`` runs the program. Running it on the scene before and after an edit is
what decides the edit's scope (:func:`in_scope`); no judge is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

from mscke.benchmark.scenes import KINDS, Entity, Scene, neighbours


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
        read = {"colour": lambda e: e.card, "place": lambda e: e.place, "category": _category, "name": lambda e: e.kind}
        target = _only([e for e in scene.entities if read[self.kind](e) == self.value], self)
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


def _category(entity: Entity) -> str | None:
    return None if entity.kind is None else KINDS[entity.kind].category


def _only(found: list[Entity], reference: Reference) -> Entity:
    if len(found) != 1:
        raise Unanswerable(f"{reference} fits {len(found)} entities, not one")
    return found[0]


OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
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
PLURALS = {"fruit": "fruits", "clothing": "pieces of clothing"}


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
            return str([_category(e) for e in scene.entities].count(self.value))
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
            noun = PLURALS.get(noun, noun + "s")
        return form.format(v=noun, a=article(noun))


def fact(kind: str, attribute: str) -> str:
    """What is always true of a kind: ``fact("owl", "flies") == "yes"``."""
    value = getattr(KINDS[kind], attribute)
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
    return [r for r in candidates if (not kinds or r.kind in kinds) and _means(r, scene, entity.cell)]


def _means(reference: Reference, scene: Scene, cell: int) -> bool:
    try:
        return reference.resolve(scene)[0].cell == cell
    except Unanswerable:
        return False


def in_scope(question: Question, before: Scene, after: Scene, cell: int) -> bool | None:
    """Does the edit that turns ``before`` into ``after`` in ``cell`` bear on ``question``?

    True when the answer differs or is read off the edited entity's identity; False otherwise;
    None when the question has no answer on one of the two sides. An entity of unknown kind
    (``kind=None``, an edit that corrects a misnamed one) is answered for only after the edit.
    """
    reference = question.reference
    try:
        new = question.answer(after)
        if question.attribute in IDENTITY and _means(reference, after, cell):
            return True if _means(reference, before, cell) else None  # it must hold before the edit too
        return question.answer(before) != new
    except Unanswerable:
        return None
