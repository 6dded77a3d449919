"""Probabilities that can be read as such: the map rises and calibrates, the error counts what it says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mscke.evaluation.calibration import bin_of, calibration_gaps, expected_error, isotonic_map

unit = st.floats(0, 1)


def overconfident(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores too near 0 and 1, and the truth."""
    rng = np.random.default_rng(seed)
    chance = rng.random(n)
    return 1 / (1 + ((1 - chance) / chance) ** 3), rng.random(n) < chance


def test_the_error_by_hand():
    probability, truth = np.array([0.1, 0.1, 0.9, 1.0]), np.array([0, 1, 1, 1])
    gaps = calibration_gaps(probability, truth, bins=2)
    assert gaps.shape == (4, 2)
    assert expected_error(gaps) == pytest.approx((abs(-0.1 + 0.9) + abs(0.1 + 0.0)) / 4)
    assert bin_of(np.array([0, 0.49, 0.5, 1.0]), 2).tolist() == [0, 0, 1, 1]


def test_the_map_calibrates_what_it_has_not_seen():
    rho, truth = overconfident(4000, seed=0)
    new, new_truth = overconfident(4000, seed=1)
    before = expected_error(calibration_gaps(new, new_truth))
    after = expected_error(calibration_gaps(isotonic_map(rho, truth)(new), new_truth))
    assert before > 0.1 and after < before / 3


@given(st.lists(st.tuples(unit, st.booleans()), min_size=1, max_size=40), st.lists(unit, min_size=2))
def test_the_map_rises_and_stays_a_probability(fitted_on, asked):
    rho, truth = map(np.array, zip(*fitted_on, strict=True))
    mapped = isotonic_map(rho, truth)(np.sort(asked))
    assert (np.diff(mapped) >= 0).all() and (mapped >= 0).all() and (mapped <= 1).all()
    assert isotonic_map(rho, truth)(rho).mean() == pytest.approx(truth.mean()), "right on average where fitted"


def test_equal_scores_share_their_mean():
    to_probability = isotonic_map(np.array([0.3, 0.3, 0.3, 0.8]), np.array([0, 1, 1, 1]))
    assert to_probability(np.array([0.0, 0.3, 0.8, 1.0])) == pytest.approx([2 / 3, 2 / 3, 1, 1])


def test_no_scores_no_map():
    with pytest.raises(ValueError, match="at least one"):
        isotonic_map(np.array([]), np.array([]))
