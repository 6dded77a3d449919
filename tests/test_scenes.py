"""Scenes: what is drawn, where, and which scenes may be used for what."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mscke.benchmark.scenes import (
    BACKGROUNDS,
    CARDS,
    CATEGORIES,
    CELL,
    FOLDS,
    HELD_OUT,
    HELD_OUT_FOLD,
    IMAGE_SIZE,
    KINDS,
    KNOWN,
    N_VARIANTS,
    PLACES,
    PRETRAINING_FOLDS,
    RECORD_FOLD,
    Entity,
    Scene,
    fold,
    neighbours,
    render,
    sample_scene,
    sample_scene_of,
    sprite,
)

SEEDS = st.integers(0, 2**32 - 1)


def scene_of(seed, **options):
    return sample_scene(np.random.default_rng(seed), **options)


def window(cell):
    """The pixels of ``cell``."""
    row, column = divmod(cell, 3)
    return np.s_[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]


# The catalogue


def test_eight_categories_of_eight_with_two_held_out_each():
    assert len(KINDS) == len({k.emoji for k in KINDS.values()}) == 64
    assert len(KNOWN) == 48 and not set(KNOWN) & set(HELD_OUT)
    for category in CATEGORIES:
        members = [k for k in KINDS.values() if k.category == category]
        assert (len(members), sum(k.held_out for k in members)) == (8, 2)


FACTS = {"penguin": "animal", "duck": "flies animal", "caterpillar": "animal", "ladybug": "flies animal",
         "helicopter": "flies", "pear": "food", "garlic": "food", "sock": ""}  # fmt: skip


@pytest.mark.parametrize("name", FACTS)
def test_facts(name):
    assert {fact for fact in ("flies", "animal", "food") if getattr(KINDS[name], fact)} == set(FACTS[name].split())


def test_no_two_drawings_look_alike():
    drawings = {name: sprite(name, 0) for name in KINDS}
    for a, b in itertools.combinations(KINDS, 2):
        assert np.abs(drawings[a] - drawings[b]).mean() > 4, (a, b)  # ant and cockroach: 4.3


# Places


def test_neighbours_are_symmetric_and_one_step_away():
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for cell in range(9):
        for direction, other in neighbours(cell).items():
            assert neighbours(other)[opposite[direction]] == cell
            assert sum(abs(a - b) for a, b in zip(divmod(cell, 3), divmod(other, 3), strict=True)) == 1
    assert sorted(len(neighbours(c)) for c in range(9)) == [2] * 4 + [3] * 4 + [4]


def test_directions_mean_what_they_say():
    assert neighbours(4) == {"left of": 3, "right of": 5, "above": 1, "below": 7}
    places = [PLACES[c] for c in (3, 5, 1, 7)]
    assert places == ["middle left", "middle right", "top centre", "bottom centre"]


# Sampling


@given(seed=SEEDS)
def test_kinds_cards_and_cells_of_a_scene_are_distinct(seed):
    entities = scene_of(seed).entities
    assert 2 <= len(entities) <= 4
    for field in ("kind", "card", "cell"):
        assert len({getattr(e, field) for e in entities}) == len(entities)
    assert {e.kind for e in entities} <= set(KNOWN)
    assert {e.card for e in entities} <= set(CARDS) and {e.cell for e in entities} <= set(range(9))
    assert scene_of(seed) == scene_of(seed)
    for n in (2, 3, 4):  # can be asked for
        assert len(scene_of(seed, n=n).entities) == n


@given(seed=SEEDS, kind=st.sampled_from([*KINDS, None]))
def test_with_kind_changes_one_kind_and_nothing_else(seed, kind):
    before = scene_of(seed)
    cell = before.entities[0].cell
    after = before.with_kind(cell, kind)
    assert after.at(cell) == dataclasses.replace(before.at(cell), kind=kind)
    assert (after.entities[1:], after.background) == (before.entities[1:], before.background)
    assert after.with_kind(cell, before.at(cell).kind) == before


# Pictures


@given(seed=SEEDS)
def test_rendering_is_deterministic_and_paints_inside_the_cells_only(seed):
    scene = scene_of(seed)
    image = render(scene)
    assert (image.shape, image.dtype) == ((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    assert np.array_equal(image, render(scene))
    painted = (image != BACKGROUNDS[scene.background]).any(-1)
    for cell in range(9):
        share = painted[window(cell)].sum() / (CELL - 4) ** 2
        assert (share == 0) if scene.at(cell) is None else (0.3 < share <= 1)  # ink may match the background


@given(seed=SEEDS, kind=st.sampled_from(list(KINDS)))
def test_an_edit_changes_the_pixels_of_its_cell_only(seed, kind):
    before = scene_of(seed)
    cell = before.entities[-1].cell
    changed = (render(before) != render(before.with_kind(cell, kind))).any(-1)
    assert changed.any() == (kind != before.at(cell).kind)
    changed[window(cell)] = False
    assert not changed.any()


@pytest.mark.parametrize("shift", [(-2, -2), (2, 2)])
@pytest.mark.parametrize("cell", [0, 8])
def test_extreme_shifts_stay_inside_the_frame(cell, shift):
    for variant in range(N_VARIANTS):
        image = render(Scene((Entity("bus", "red", cell, shift, variant),)))
        inside = image[window(cell)]
        card = (inside == CARDS["red"]).all(-1)
        assert card.any(0).sum() == card.any(1).sum() == CELL - 4  # the whole card is in the picture


def test_drawings_fit_on_their_card_in_every_pose():
    sizes = [sprite("bus", variant).shape for variant in range(N_VARIANTS)]
    assert all(height == width <= CELL - 4 for height, width, _ in sizes)


# Folds


def test_folds_are_shared_out_once():
    parts = (PRETRAINING_FOLDS, HELD_OUT_FOLD, RECORD_FOLD)
    assert sorted(itertools.chain(*parts)) == list(range(FOLDS))


def test_folds_never_move():
    """Committed weights were pretrained on some folds: the others must stay unseen."""
    found = [fold(scene_of(seed)) for seed in range(16)]
    assert found == [3, 1, 4, 6, 4, 6, 3, 4, 3, 7, 5, 1, 0, 7, 7, 4]


@given(seed=SEEDS, draw=st.data())
def test_fold_depends_on_what_lies_where_alone(seed, draw):
    scene = scene_of(seed)
    entities = draw.draw(st.permutations(scene.entities))
    moved = tuple(dataclasses.replace(e, shift=(0, 0), variant=3) for e in entities)
    assert fold(Scene(moved, background=1)) == fold(scene)


@given(seed=SEEDS, folds=st.sampled_from([PRETRAINING_FOLDS, HELD_OUT_FOLD, RECORD_FOLD]))
def test_scenes_come_from_the_folds_asked_for(seed, folds):
    scene = sample_scene_of(np.random.default_rng(seed), folds)
    assert fold(scene) in folds
    assert not {e.kind for e in scene.entities} & set(HELD_OUT)


def test_folds_are_of_like_size():
    counts = np.bincount([fold(scene_of(seed)) for seed in range(1600)], minlength=FOLDS)
    assert counts.min() > 150 and counts.max() < 250
