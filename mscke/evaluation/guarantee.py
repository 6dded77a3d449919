"""How often will it leak? A router threshold with a guarantee, from scores held out of training.

A question *leaks* when it is out of scope and an edit answers it all the same: ρ ≥ threshold. The share
that does falls as the threshold rises, so there is one that keeps it at or below α::

    rho = own_scores(classifier, bench.validation)[:, ROLES.index("out_of_scope")]
    promise = guarantee(rho, alpha=0.05)
    print(promise)                                        # what is promised, in words
    ScopeRouter(classifier, memory, threshold=promise.threshold)

*The rule* is learn then test (Angelopoulos et al., arXiv 2110.01052) with fixed-sequence testing:
thresholds are tested from the strictest down, for as long as the exact binomial upper bound of the leak rate
(Clopper and Pearson, 1934) stays at or below α. Leaks being monotone, this fixes how many of the
calibration scores may reach the threshold, which lies just above the next highest. Over the draw of the
calibration scores, P(leak rate ≤ α) ≥ 1 − δ. The rate is that of endless use: of the next m questions the
share that leaks varies about it, and with ``asked=m`` the same is guaranteed of that share, too.

*Beside it* stands conformal risk control (Angelopoulos et al., arXiv 2208.02814): the leak rate is at most α
on average over calibration sets, and so above α for many of them.

*Both assume* that calibration and test scores are exchangeable: the same sorts of records in the same
shares, as many edits in memory, each record on an image of its own, none of them seen in training, and nothing of
note chosen on them (a recipe among a few, as here, is little; a classifier among hundreds would not be).
"""

from __future__ import annotations

import bisect
import itertools
import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta, betabinom

DELTA = 0.05


@dataclass(frozen=True)
class Guarantee:
    """With confidence 1 − ``delta`` at most a share ``alpha`` of out-of-scope questions has ρ ≥ ``threshold``.

    So many of all questions to come and, unless ``asked`` is None, of the next ``asked``. ``leaks`` of the ``n`` calibration questions have. Where these are too few the threshold is infinite:
    no question is in scope, so none leaks.
    """

    alpha: float
    delta: float
    threshold: float
    leaks: int
    n: int
    asked: int | None = None

    @property
    def attainable(self) -> bool:
        return math.isfinite(self.threshold)

    def __str__(self) -> str:
        most, sure = f"at most {100 * self.alpha:g} %", f"with {100 * (1 - self.delta):g} % confidence"
        if self.attainable:
            seen = f"{self.leaks} of {self.n:,} calibration questions do"
            soon = f", of the next {self.asked:,} as well" if self.asked else ""
            return f"{sure} {most} of out-of-scope questions leak at ρ ≥ {self.threshold:.4f}{soon} ({seen})"
        least = needed(self.alpha, self.delta, self.asked)
        few = f"{self.n:,} calibration questions are too few, {least:,} are needed"
        return f"no threshold is known to leak {most} {sure} ({few}): no question is in scope"


def guarantee(scores: np.ndarray, alpha: float, delta: float = DELTA, asked: int | None = None) -> Guarantee:
    """The lowest threshold that is guaranteed to leak at most α, from scores (n,) of out-of-scope questions.

    With ``asked`` the share that leaks of the next so many out-of-scope questions is guaranteed, too.
    Raises ValueError for scores that are not a finite vector, α or δ outside (0, 1), and ``asked`` < 1.
    """
    scores = np.asarray(scores)
    if scores.ndim != 1 or not np.isfinite(scores).all():
        bad = f"shape {scores.shape}, {np.count_nonzero(~np.isfinite(scores))} not finite"
        raise ValueError(f"scores of {bad}: give one finite ρ a calibration question")
    if not (0 < alpha < 1 and 0 < delta < 1):
        raise ValueError(f"alpha {alpha} and delta {delta} must be shares, above 0 and below 1")
    if asked is not None and asked < 1:
        raise ValueError(f"asked is {asked}: give the number of questions to come, or None for endless use")
    threshold = just_above(scores, allowed_leaks(len(scores), alpha, delta, asked))
    return Guarantee(alpha, delta, threshold, int((scores >= threshold).sum()), len(scores), asked)


def upper_bound(leaks: int, n: int, delta: float = DELTA) -> float:
    """The exact upper bound, with confidence 1 − δ, of a rate at which ``leaks`` < n of n were seen."""
    return float(beta.ppf(1 - delta, leaks + 1, n - leaks))


def chance_within(leaks: int, n: int, asked: int, alpha: float) -> float:
    """P(at most a share α of the next ``asked`` questions leaks), where ``leaks`` < n of n were let through.

    Exact for exchangeable scores without ties, whatever their distribution: only ranks matter, and the number of
    new scores above a given rank is beta-binomial.
    """
    most = int((np.arange(asked + 1) / asked <= alpha).sum()) - 1
    return float(betabinom.cdf(most, asked, leaks + 1, n - leaks))


def allowed_leaks(n: int, alpha: float, delta: float = DELTA, asked: int | None = None) -> int:
    """How many of n calibration questions may leak for α to be guaranteed; −1: not even none."""

    def unsafe(leaks: int) -> bool:
        soon = 1.0 if asked is None else chance_within(leaks, n, asked, alpha)
        return bool(upper_bound(leaks, n, delta) > alpha or soon < 1 - delta)

    return bisect.bisect_left(range(n), True, key=unsafe) - 1  # who is unsafe with k is so with k + 1


def needed(alpha: float, delta: float = DELTA, asked: int | None = None) -> int:
    """The fewest calibration questions with which α can be guaranteed: none of them may then leak."""
    fewest = math.floor(math.log(delta) / math.log1p(-alpha))  # (1 − α)^n ≤ δ, and more if ``asked``
    return next(n for n in itertools.count(fewest) if allowed_leaks(n, alpha, delta, asked) >= 0)


def allowed_on_average(n: int, alpha: float) -> int:
    """How many may for the leak rate to be at most α in expectation, (k + 1) / (n + 1) ≤ α; −1: not even none."""
    return int(((np.arange(n) + 1) / (n + 1) <= alpha).sum()) - 1


def just_above(scores: np.ndarray, allowed: int) -> float:
    """The lowest threshold that at most ``allowed`` of the scores (n,) reach; infinite for −1.

    It is a number of the scores' own precision, in which the router compares.
    """
    if allowed < 0:
        return math.inf
    return float(np.nextafter(np.sort(scores)[-1 - allowed], np.inf))
