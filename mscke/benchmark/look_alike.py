"""Look-alikes: a slice of FGVEdit-Scenes, held out, in which only the drawing tells one entity from another.

Records come in pairs that mirror each other. Both pictures have the same cards in the same places; on one
card lies an entity, on another its look-alike, the kind of the same category whose drawing is nearest. In
the pair's second picture the two have changed places, and both edits have the same prompt. So a record
has a look-alike twice: in its own picture, where its out-of-scope question is about it, and in a memory
that holds both edits, where the other's lies on the same card, at the same place, in the same words.
"""

from __future__ import annotations

import functools

import numpy as np

from mscke.benchmark.facts import locality_facts
from mscke.benchmark.generate import ATTRIBUTES, EDIT_REFERENCES, as_row, ask, choice, new_kind, side
from mscke.benchmark.load import load_records
from mscke.benchmark.questions import IDENTITY, Question, Reference, references
from mscke.benchmark.sample import EditRecord
from mscke.benchmark.scenes import KINDS, KNOWN, RECORD_FOLD, Scene, fold, sample_scene, sprite
from mscke.benchmark.write import write_records
from mscke.config import Track

SHARE = 4  # test records for each of these
ASKED = {attribute: ATTRIBUTES[attribute] for attribute in IDENTITY}  # of one entity: no existence, no counts
STREAM = 2  # of random numbers, beside those of test and train


@functools.cache
def look_alike(kind: str) -> str:
    """The known kind of the same category whose drawing, in one pose, differs least from that of ``kind``."""
    others = [k for k in KNOWN if k != kind and KINDS[k].category == KINDS[kind].category]
    return min(others, key=lambda other: float(np.abs(sprite(kind, 0) - sprite(other, 0)).mean()))


def _mirrored(rng: np.random.Generator) -> tuple[Scene, Scene, int, int] | None:
    """Two scenes, the cell that is edited in both, and the cell of the look-alike; None if the draw has no such pair."""
    scene = sample_scene(rng, n=int(rng.integers(3, 5)))
    target, other = (scene.entities[i] for i in rng.permutation(len(scene.entities))[:2])
    first = scene.with_kind(other.cell, look_alike(target.kind))
    second = first.with_kind(other.cell, target.kind).with_kind(target.cell, look_alike(target.kind))
    distinct = len({e.kind for e in first.entities}) == len(first.entities)
    ours = {fold(first), fold(second)} <= RECORD_FOLD and side(first) == "test"
    return (first, second, target.cell, other.cell) if distinct and ours else None


def _row(rng: np.random.Generator, scene: Scene, cell: int, other: int, edit: Reference, wording: int) -> dict | None:
    """One record of a pair without its image; None if a question that is drawn does not do."""
    target, twin, attribute = scene.at(cell), scene.at(other), choice(rng, ASKED)
    after = scene.with_kind(cell, new_kind(rng, scene, target, attribute))
    inside = ask(rng, scene, attribute, target, twin, edit)
    outside = ask(rng, scene, choice(rng, ASKED), twin, target, edit)
    prompt, rephrase = (Question("name", edit, wording=w) for w in (wording, wording + 3))
    asked, sides = (prompt, rephrase, inside, outside), (scene, scene, after)
    return as_row(rng, sides, cell, asked, locality_facts("test"), "look_alike")


@functools.lru_cache(maxsize=2)  # the two of a pair are asked for one after the other
def pair(number: int, seed: int = 0) -> tuple[tuple[Scene, dict], tuple[Scene, dict]]:
    """The ``number``-th pair, counted from 0: twice (the scene to paint, its JSON object)."""
    rng = np.random.default_rng([seed, STREAM, number])
    while True:
        if (drawn := _mirrored(rng)) is None:
            continue
        *scenes, cell, other = drawn
        means = [references(s, s.at(cell), tuple(EDIT_REFERENCES)) for s in scenes]
        edit, wording = choice(rng, [r for r in means[0] if r in means[1]]), int(rng.integers(3))
        rows = [_row(rng, scene, cell, other, edit, wording) for scene in scenes]
        if all(rows) and rows[0]["alt"] != rows[1]["alt"]:
            names = (f"look_alike/{2 * number + i:06d}.png" for i in (0, 1))
            return tuple((s, {"image": name} | row) for s, name, row in zip(scenes, names, rows, strict=True))


def load_look_alikes(track: Track) -> list[EditRecord]:
    """The track's look-alikes, generated beside its records unless they are there; pairs stand together."""
    size = 2 * (track.n_test // (2 * SHARE))
    make = functools.partial(_of_a_pair, seed=track.seed)
    path = write_records(track.data / "look_alike_data.json", size, make)
    return load_records(path, track.data).records


def _of_a_pair(number: int, seed: int) -> tuple[Scene, dict]:
    return pair(number // 2, seed)[number % 2]
