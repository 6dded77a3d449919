"""Does ρ mean what it says? Of the questions scored 0.8, are 80 % in scope?

The score's *map* to a probability is fitted on held-out scores and rises with ρ, so it changes no ranking
of questions::

    to_probability = isotonic_map(rho_validation, in_scope_validation)
    gaps = calibration_gaps(to_probability(rho_test), in_scope_test)
    expected_error(gaps)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.optimize import isotonic_regression

BINS = 15


def isotonic_map(rho: np.ndarray, in_scope: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The rising map of scores (n,) to P(in scope) with the least squared error (Zadrozny and Elkan, 2002).

    Straight between the scores that it was fitted on, level beyond them. Raises ValueError without scores.
    """
    if len(rho) == 0:
        raise ValueError("no calibration scores: a map needs at least one")
    places, which, counts = np.unique(rho, return_inverse=True, return_counts=True)
    share = np.bincount(which, weights=np.asarray(in_scope, float)) / counts
    fitted = isotonic_regression(share, weights=counts).x
    return lambda scores: np.interp(scores, places, fitted)


def calibration_gaps(probability: np.ndarray, in_scope: np.ndarray, bins: int = BINS) -> np.ndarray:
    """(n, bins): truth − probability of each question, in the column of its bin of equal width.

    Means over rows are what :func:`expected_error` adds up, so rows can be drawn again to bootstrap it.
    """
    probability = np.asarray(probability, float)
    gaps = np.zeros((len(probability), bins))
    gaps[np.arange(len(gaps)), bin_of(probability, bins)] = np.asarray(in_scope, float) - probability
    return gaps


def expected_error(gaps: np.ndarray) -> np.ndarray:
    """The expected calibration error Σ_b |mean gap of bin b| (Naeini et al., 2015), of gaps (n, bins)."""
    return np.abs(gaps.mean(0)).sum()


def bin_of(probability: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Which of the bins of equal width on [0, 1] each probability falls into; 1 into the last."""
    return np.minimum((probability * bins).astype(int), bins - 1)
