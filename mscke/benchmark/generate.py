"""FGVEdit-Scenes: records in FGVEdit's own JSON schema, with scope decided by program.

A record edits the identity of one entity of a scene. Its in-scope question reaches the edited entity by *another*
reference than the edit prompt. Its out-of-scope question is about another entity. Both use the same kinds of
reference and ask for the same attributes, so that the text alone does not tell them apart. A few out-of-scope
questions reuse the edit's very wording, or ask another attribute of the edited entity. A quarter of the edits
correct a real error: the picture shows a kind that the base models never saw. The rest are counterfactual.
"""

from __future__ import annotations

import zlib
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from mscke.benchmark.facts import locality_facts
from mscke.benchmark.questions import IDENTITY, OPPOSITE, Question, Reference, fact, in_scope, references
from mscke.benchmark.scenes import (
    HELD_OUT,
    KINDS,
    KNOWN,
    PLACES,
    RECORD_FOLD,
    Entity,
    Scene,
    neighbours,
    sample_scene_of,
)
from mscke.benchmark.write import write_records

SIZES = {"train": 8334, "test": 2778}
CORRECTIONS = 0.25  # share of edits that name a held-out kind rightly
SAME_CATEGORY = 0.4  # share of counterfactual edits that stay within the category
EDIT_REFERENCES = {"colour": 0.4, "place": 0.3, "relation": 0.3}
ATTRIBUTES = {
    "name": 0.52, "category": 0.22, "flies": 0.04, "animal": 0.04, "food": 0.04, "exists": 0.09, "count": 0.05,
}  # fmt: skip
OUT_OF_SCOPE = {"other_entity": 0.82, "same_wording": 0.08, "other_attribute": 0.10}


def choice(rng: np.random.Generator, options):
    """One of ``options``: a sequence (uniform) or a dict of weights."""
    if isinstance(options, dict):
        weights = np.fromiter(options.values(), float)
        return list(options)[int(np.searchsorted(np.cumsum(weights), rng.random() * weights.sum(), side="right"))]
    return options[int(rng.integers(len(options)))]


def _cells(reference: Reference) -> set[int]:
    """Where the text alone allows what ``reference`` means to lie."""
    if reference.kind == "place":
        return {PLACES.index(reference.value)}
    if reference.kind == "relation":  # what is left of something is not in the right column
        return {c for c in range(len(PLACES)) if OPPOSITE[reference.value] in neighbours(c)}
    return set(range(len(PLACES)))


def _candidates(scene: Scene, entity: Entity, edit: Reference) -> list[Reference]:
    """References to ``entity`` that, from their text, might mean what ``edit`` means."""
    found = references(scene, entity, tuple(EDIT_REFERENCES))
    other = [r for r in found if r.kind != edit.kind or (r.kind == "relation" and r.anchor != edit.anchor)]
    return [r for r in other if _cells(r) & _cells(edit)]


def ask(
    rng: np.random.Generator, scene: Scene, attribute: str, entity: Entity, twin: Entity, edit: Reference
) -> Question | None:
    """A question about ``entity``, by a kind of reference that ``twin`` has as well: one of the two is the edited
    entity, and the text may not tell which. None if there is no such kind."""
    wording = int(rng.integers(6))
    if attribute == "exists":
        return Question("exists", value=entity.kind, wording=wording)
    if attribute == "count":
        return Question("count", value=KINDS[entity.kind].category, wording=wording)
    found = _candidates(scene, entity, edit)
    shared = {r.kind for r in found} & {r.kind for r in _candidates(scene, twin, edit)}
    reference = _weighed(rng, [r for r in found if r.kind in shared])
    return Question(attribute, reference, wording=wording) if reference else None


def _weighed(rng: np.random.Generator, found: list[Reference]) -> Reference | None:
    """One of ``found``: its kind by the weights of :data:`EDIT_REFERENCES`, then any of that kind."""
    weights = {k: w for k, w in EDIT_REFERENCES.items() if any(r.kind == k for r in found)}
    if not weights:
        return None
    kind = choice(rng, weights)
    return choice(rng, [r for r in found if r.kind == kind])


def new_kind(rng: np.random.Generator, scene: Scene, target: Entity, attribute: str) -> str:
    """What a counterfactual edit makes of ``target``, so that the answer to ``attribute`` changes."""
    taken, old = {e.kind for e in scene.entities}, KINDS[target.kind]
    pool = [k for k in KNOWN if k not in taken]
    if attribute in IDENTITY[1:]:
        pool = [k for k in pool if fact(k, attribute) != fact(old.name, attribute)]
    elif attribute == "count":
        pool = [k for k in pool if KINDS[k].category != old.category]
    elif rng.random() < SAME_CATEGORY:
        pool = [k for k in pool if KINDS[k].category == old.category]
    return choice(rng, pool)


def _hardness(question: Question) -> str:
    if question.reference is None:
        return "presence"
    return "other_reference" if question.attribute == "name" else "derived"


def build_record(rng: np.random.Generator, facts: list[tuple[str, str]]) -> tuple[Scene, dict]:
    """Draw one record: (the scene to paint, FGVEdit's keys without ``image``, plus ``meta``).

    What kind of record it is to be is drawn first, and scenes until one allows it, so that in-scope and
    out-of-scope questions have the same distribution of attributes.
    """
    correction = bool(rng.random() < CORRECTIONS)
    # whether a kind is present, or how many of a category, has no counterpart for an unknown entity
    attributes = {a: w for a, w in ATTRIBUTES.items() if a in IDENTITY} if correction else ATTRIBUTES
    asked_inside, asked_outside = choice(rng, attributes), choice(rng, attributes)
    hardness = choice(rng, OUT_OF_SCOPE)
    while True:
        scene = sample_scene_of(rng, RECORD_FOLD, n=int(rng.integers(3, 5)))
        target, other = (scene.entities[i] for i in rng.permutation(len(scene.entities))[:2])
        if correction:
            edited = choice(rng, HELD_OUT)
            scene = after = scene.with_kind(target.cell, edited)
            before = scene.with_kind(target.cell, None)
        else:
            edited = new_kind(rng, scene, target, asked_inside)
            before, after = scene, scene.with_kind(target.cell, edited)
        target = before.at(target.cell)
        found = references(before, target, tuple(EDIT_REFERENCES))
        reference = _weighed(rng, found)
        wording = int(rng.integers(3))
        prompt = Question("name", reference, wording=wording)
        # another template and the other noun phrase
        rephrase = Question("name", reference, wording=(wording + int(rng.integers(1, 3))) % 3 + 3)
        inside = ask(rng, before, asked_inside, target, other, reference)
        if hardness == "same_wording":
            alike = references(before, other, (reference.kind,))
            outside = Question("name", choice(rng, alike), wording=wording) if alike else None
        elif hardness == "other_attribute":
            attribute = choice(rng, [a for a in ("colour", "place") if a != reference.kind])
            left = [r for r in found if r.kind != attribute]
            outside = Question(attribute, choice(rng, left), wording=int(rng.integers(6))) if left else None
        else:
            outside = ask(rng, before, asked_outside, other, target, reference)
        asked, sides = (prompt, rephrase, inside, outside), (scene, before, after)
        if row := as_row(rng, sides, target.cell, asked, facts, hardness):
            return scene, row


def as_row(
    rng: np.random.Generator,
    sides: tuple[Scene, Scene, Scene],
    cell: int,
    asked: tuple[Question, Question, Question | None, Question | None],
    facts: list[tuple[str, str]],
    hardness: str,
) -> dict | None:
    """FGVEdit's keys without ``image``, plus ``meta``; None unless both questions do for the scope that they stand for.

    ``sides``: what the picture shows, and the scenes before and after the edit, which is made in ``cell``. ``asked``:
    the edit prompt, its rephrasing, the in-scope and the out-of-scope question. ``hardness`` is the latter's.
    """
    (scene, before, after), (prompt, rephrase, inside, outside) = sides, asked
    if not inside or not outside:
        return None
    if in_scope(inside, before, after, cell) is not True or in_scope(outside, before, after, cell) is not False:
        return None
    original, edited = before.at(cell).kind, after.at(cell).kind
    locality = choice(rng, facts)
    return {
        "src": prompt.text(), "alt": edited, "rephrase": rephrase.text(),
        "fg_gen_q": inside.text(), "fg_gen_a": inside.answer(after),
        "fg_loc_q": outside.text(), "fg_loc_a": outside.answer(after),
        "loc": locality[0], "loc_ans": locality[1],
        "meta": {
            "correction": original is None, "original": original, "edited": edited, "cell": cell,
            "reference": {"edit": _kind(prompt), "in_scope": _kind(inside), "out_of_scope": _kind(outside)},
            "attribute": {"in_scope": inside.attribute, "out_of_scope": outside.attribute},
            "hardness": {"in_scope": _hardness(inside), "out_of_scope": hardness},
            "scene": asdict(scene),
        },
    }  # fmt: skip


def _kind(question: Question) -> str:
    return question.reference.kind if question.reference else "none"


def record(split: str, number: int, seed: int = 0) -> tuple[Scene, dict]:
    """The ``number``-th record of ``split``, counted from 0: (the scene to paint, its JSON object)."""
    rng, facts = np.random.default_rng([seed, sorted(SIZES).index(split), number]), locality_facts(split)
    while True:
        scene, row = build_record(rng, facts)
        if side(scene) == split:
            return scene, {"image": f"{split}/{number:06d}.png"} | row


def generate(root: Path, split: str, size: int, seed: int = 0) -> Path:
    """Write ``root/<split>_data.json`` and its images (:func:`write_records`); return the JSON's path.

    The same seed gives the same bytes, and a smaller ``size`` the same first records.
    """
    return write_records(root / f"{split}_data.json", size, partial(record, split, seed=seed))


def side(scene: Scene) -> str:
    """Which split may use ``scene``: decided by its content, so that train and test share none."""
    content = sorted((e.cell, e.card) for e in scene.entities)
    return "test" if zlib.crc32(repr(content).encode()) % 4 == 0 else "train"
