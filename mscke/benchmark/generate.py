"""FGVEdit-Scenes: records in FGVEdit's own JSON schema, with scope decided by program.

A record edits the identity of one entity of a scene. Its in-scope question reaches the edited
entity by *another* reference than the edit prompt; its out-of-scope question is about another
entity, reached by references of the same kinds and asking for the same attributes, so that the
text alone does not tell the two apart; a few reuse the edit's very wording, or ask another
attribute of the edited entity. A quarter of the edits correct a real error: the picture shows a
kind that the base models never saw. The rest are counterfactual.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from mscke.benchmark.facts import locality_facts
from mscke.benchmark.questions import Question, Reference, in_scope, references
from mscke.benchmark.scenes import (
    CATEGORIES,
    HELD_OUT,
    KINDS,
    KNOWN,
    RECORD_FOLD,
    Entity,
    Scene,
    render,
    sample_scene_of,
)  # fmt: skip

SIZES = {"train": 8334, "test": 2778}
CORRECTIONS = 0.25  # share of edits that name a held-out kind rightly
SAME_CATEGORY = 0.4  # share of counterfactual edits that stay within the category
EDIT_REFERENCES = {"colour": 0.4, "place": 0.3, "relation": 0.3}
ATTRIBUTES = {
    "name": 0.52, "category": 0.22, "flies": 0.04, "animal": 0.04, "food": 0.04, "exists": 0.09, "count": 0.05,
}  # fmt: skip
OUT_OF_SCOPE = {"other_entity": 0.82, "same_wording": 0.08, "other_attribute": 0.10}


def _choice(rng: np.random.Generator, options):
    """One of ``options``: a sequence (uniform) or a dict of weights."""
    if isinstance(options, dict):
        weights = np.fromiter(options.values(), float)
        return list(options)[
            int(np.searchsorted(np.cumsum(weights), rng.random() * weights.sum(), side="right"))
        ]
    return options[int(rng.integers(len(options)))]


def _refer(
    rng: np.random.Generator, scene: Scene, entity: Entity, avoid: Reference | None
) -> Reference | None:
    """A reference to ``entity`` of another kind than ``avoid`` (or by another neighbour)."""
    found = references(scene, entity, ("colour", "place", "relation"))
    if avoid is not None:
        found = [
            r for r in found if r.kind != avoid.kind or (r.kind == "relation" and r.anchor != avoid.anchor)
        ]
    weights = {k: w for k, w in EDIT_REFERENCES.items() if any(r.kind == k for r in found)}
    if not weights:
        return None
    kind = _choice(rng, weights)
    return _choice(rng, [r for r in found if r.kind == kind])


def _ask(rng, before: Scene, after: Scene, entity: Entity, avoid: Reference, inside: bool) -> Question | None:
    """A question about ``entity`` with an attribute drawn alike for both sides of the scope."""
    attribute, wording = _choice(rng, ATTRIBUTES), int(rng.integers(6))
    edited = after.at(entity.cell).kind
    if attribute == "exists":
        there = [e.kind for e in before.entities if e.kind is not None]
        absent = [k for k in KNOWN if k not in there]
        value = (
            (entity.kind or edited) if rng.random() < 0.6 else (edited if inside else _choice(rng, absent))
        )
        return Question("exists", value=value, wording=wording)
    if attribute == "count":
        kinds = [entity.kind or edited, edited] if inside else [entity.kind]
        value = (
            KINDS[_choice(rng, kinds)].category if rng.random() < 0.7 or inside else _choice(rng, CATEGORIES)
        )
        return Question("count", value=value, wording=wording)
    reference = _refer(rng, before, entity, avoid)
    return reference and Question(attribute, reference, wording=wording)


def _hardness(question: Question) -> str:
    if question.reference is None:
        return "presence"
    return "other_reference" if question.attribute == "name" else "derived"


def build_record(rng: np.random.Generator, facts: list[tuple[str, str]]) -> tuple[Scene, dict]:
    """Draw one record: (the scene to paint, FGVEdit's keys without ``image``, plus ``meta``)."""
    while True:
        scene = sample_scene_of(rng, RECORD_FOLD)
        target = _choice(rng, scene.entities)
        others = [e for e in scene.entities if e is not target]
        correction = bool(rng.random() < CORRECTIONS)
        if correction:
            edited = _choice(rng, HELD_OUT)
            scene = after = scene.with_kind(target.cell, edited)
            before = scene.with_kind(target.cell, None)
        else:
            same = rng.random() < SAME_CATEGORY
            taken = {e.kind for e in scene.entities}
            pool = [k for k in KNOWN if k not in taken]
            alike = [k for k in pool if KINDS[k].category == KINDS[target.kind].category]
            edited = _choice(rng, alike if same else pool)
            before, after = scene, scene.with_kind(target.cell, edited)
        target = before.at(target.cell)
        reference = _refer(rng, before, target, None)
        wording = int(rng.integers(3))
        prompt = Question("name", reference, wording=wording)
        # another template and the other noun phrase
        rephrase = Question("name", reference, wording=(wording + int(rng.integers(1, 3))) % 3 + 3)
        inside = _ask(rng, before, after, target, reference, True)
        hardness = _choice(rng, OUT_OF_SCOPE)
        if hardness == "same_wording":
            other = _choice(rng, others)
            alike = references(before, other, (reference.kind,))
            outside = Question("name", _choice(rng, alike), wording=wording) if alike else None
        elif hardness == "other_attribute":
            attribute = _choice(rng, [a for a in ("colour", "place") if a != reference.kind])
            found = [
                r for r in references(before, target, ("colour", "place", "relation")) if r.kind != attribute
            ]
            outside = Question(attribute, _choice(rng, found), wording=int(rng.integers(6)))
        else:
            outside = _ask(rng, before, after, _choice(rng, others), reference, False)
        if not inside or not outside:
            continue
        cell = target.cell
        if (
            in_scope(inside, before, after, cell) is not True
            or in_scope(outside, before, after, cell) is not False
        ):
            continue
        loc, loc_ans = _choice(rng, facts)
        return scene, {
            "src": prompt.text(), "alt": edited, "rephrase": rephrase.text(),
            "fg_gen_q": inside.text(), "fg_gen_a": inside.answer(after),
            "fg_loc_q": outside.text(), "fg_loc_a": outside.answer(after),
            "loc": loc, "loc_ans": loc_ans,
            "meta": {
                "correction": correction, "original": target.kind, "edited": edited, "cell": cell,
                "reference": {"edit": reference.kind, "in_scope": _kind(inside), "out_of_scope": _kind(outside)},
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
    """Write ``root/<split>_data.json`` and its images; return the JSON's path.

    The same seed gives the same bytes, and a smaller ``size`` the same first records. The JSON is
    written last, so its presence means that every image is there; what is there already is kept
    when its length and last record are those of ``size`` and ``seed``.
    """
    path = root / f"{split}_data.json"
    if path.exists():
        there, last = json.loads(path.read_text()), json.dumps(record(split, size - 1, seed)[1])
        if len(there) == size and there[-1] == json.loads(last):
            return path
        path.unlink()  # its images are about to be replaced
    (root / split).mkdir(parents=True, exist_ok=True)
    rows = []
    for number in tqdm(range(size), desc=f"{split} scenes", mininterval=2):
        scene, row = record(split, number, seed)
        Image.fromarray(render(scene)).save(root / row["image"], compress_level=1)
        rows.append(row)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(rows, indent=1))
    os.replace(temporary, path)
    return path


def side(scene: Scene) -> str:
    """Which split may use ``scene``: decided by its content, so that train and test share none."""
    import zlib

    content = sorted((e.cell, e.card) for e in scene.entities)
    return "test" if zlib.crc32(repr(content).encode()) % 4 == 0 else "train"
