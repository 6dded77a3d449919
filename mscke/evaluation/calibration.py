"""Is the guarantee kept, and at what price? Does ρ mean what it says?

Random cuts, and a threshold at work on test records. Of the questions scored 0.8, are 80 % in scope? The score's *map* to
a probability is fitted on held-out scores and rises with ρ, so it changes no ranking of questions::

    to_probability = isotonic_map(rho_validation, in_scope_validation)
    gaps = calibration_gaps(to_probability(rho_test), in_scope_test)
    expected_error(gaps)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from scipy.optimize import isotonic_regression

from mscke.benchmark.sample import EditRecord
from mscke.classifier import ScopeClassifier
from mscke.evaluation.guarantee import DELTA, allowed_leaks, allowed_on_average, just_above
from mscke.evaluation.metrics import ROLES
from mscke.evaluation.outcomes import answered, own_scores
from mscke.memory import EditMemory
from mscke.training.scope import encode_records

RULES = {  # name -> how many of n calibration questions may leak
    "guaranteed": allowed_leaks,
    "on average": lambda n, alpha, delta, asked: allowed_on_average(n, alpha),
}


def random_cuts(
    scores: np.ndarray, n: int, alphas: Sequence[float], n_cuts: int = 100, delta: float = DELTA, seed: int = 0
) -> pd.DataFrame:
    """Scores of out-of-scope questions, cut at random into ``n`` to calibrate on and the rest to test.

    One row a cut, rule of :data:`RULES` and α: rule, alpha, cut, threshold, leak (share of the rest).
    """
    rng, rows = np.random.default_rng(seed), []
    cuts = [np.split(rng.permutation(scores), [n]) for _ in range(n_cuts)]
    for rule, allowed in RULES.items():
        for alpha in alphas:
            k = allowed(n, alpha, delta, len(scores) - n)
            for cut, (held, rest) in enumerate(cuts):
                threshold = just_above(held, k)
                rows.append((rule, alpha, cut, threshold, (rest >= threshold).mean()))
    return pd.DataFrame(rows, columns=["rule", "alpha", "cut", "threshold", "leak"])


def at_work(rho: np.ndarray, values: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Which records leak, and how right their in-scope answers are: (leak, m_in), both (R,) in [0, 1].

    ``rho`` (R, 5) and ``values`` (R, 5, 2) as :mod:`mscke.evaluation.outcomes` gives them.
    """
    routed = rho >= threshold
    leak = routed[:, ROLES.index("out_of_scope")].astype(float)
    return leak, answered(values, routed)[:, ROLES.index("in_scope")]


@torch.inference_mode()
def scores_among(
    classifier: ScopeClassifier, records: Sequence[EditRecord], others: Sequence[EditRecord]
) -> np.ndarray:
    """ρ (R, 5) of every record's queries with its own edit and those of ``others`` in memory: the largest."""
    own = own_scores(classifier, records)
    if not others:
        return own
    memory = EditMemory(classifier.dim)
    memory.add([r.edit for r in others], classifier.embed_features(encode_records(classifier, others)[0]))
    distance, _ = memory.nearest(classifier.embed_features(encode_records(classifier, records)[1]))
    return np.maximum(own, classifier.score(distance).numpy().reshape(own.shape))


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
