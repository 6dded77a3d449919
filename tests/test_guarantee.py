"""The guarantee: its bound is exact, its coverage is what it says, and what it cannot know it says."""

import math
from fractions import Fraction
from itertools import accumulate, combinations

import numpy as np
import pytest
import torch
from scipy.stats import binom

from mscke.classifier import ScopeClassifier
from mscke.editors.mscke import MSCKE
from mscke.evaluation.calibration import RULES, at_work, random_cuts, scores_among
from mscke.evaluation.guarantee import (
    allowed_leaks,
    allowed_on_average,
    chance_within,
    guarantee,
    just_above,
    needed,
    upper_bound,
)
from mscke.evaluation.metrics import ROLES
from mscke.evaluation.outcomes import own_scores

pytest_plugins = ["tiny"]
OUT = ROLES.index("out_of_scope")


def tails(n: int, rate: Fraction) -> list[Fraction]:
    """P(Bin(n, rate) ≤ k) for k < n, exactly."""
    return list(accumulate(math.comb(n, k) * rate**k * (1 - rate) ** (n - k) for k in range(n)))


@pytest.mark.parametrize(("k", "n", "delta"), [(0, 1, 0.05), (0, 59, 0.05), (3, 40, 0.1), (39, 40, 0.01)])
def test_upper_bound_is_where_so_few_leaks_become_unlikely(k, n, delta):
    """By bisection on exact binomial sums, no beta distribution."""
    low, high = Fraction(0), Fraction(1)
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if tails(n, middle)[k] > Fraction(str(delta)) else (low, middle)
    assert upper_bound(k, n, delta) == pytest.approx(float(low), abs=1e-8)


@pytest.mark.parametrize("alpha", ["0.01", "0.05", "0.1", "0.5"])
@pytest.mark.parametrize("n", [0, 1, 28, 29, 60, 120])
def test_allowed_leaks_by_brute_force(n, alpha):
    sure = [k for k, tail in enumerate(tails(n, Fraction(alpha))) if tail <= Fraction("0.05")]
    assert allowed_leaks(n, float(alpha), 0.05) == max(sure, default=-1)
    average = [k for k in range(n) if Fraction(k + 1, n + 1) <= Fraction(alpha)]
    assert allowed_on_average(n, float(alpha)) == max(average, default=-1)


def test_the_threshold_is_the_lowest_that_lets_so_many_through():
    scores = np.random.default_rng(0).random(400).astype(np.float32)
    promise = guarantee(scores, 0.05)
    k = allowed_leaks(400, 0.05)
    assert promise.attainable and promise.leaks == k == (scores >= promise.threshold).sum()
    below = np.nextafter(np.float32(promise.threshold), np.float32(0))
    assert (scores >= below).sum() == k + 1
    assert np.float32(promise.threshold) == promise.threshold, "the router compares in float32"
    shuffled = np.random.default_rng(1).permutation(scores)
    assert guarantee(shuffled, 0.05) == promise


def test_ties_leak_less_never_more():
    scores = np.array([0.9] * 50 + [0.1] * 350, np.float32)
    promise = guarantee(scores, 0.05)
    assert promise.leaks == 0 and 0.9 < promise.threshold < 0.9001


def test_chance_within_by_counting_orders():
    """All orders of 4 calibration and 3 new scores are alike: count those with few new ones on top."""
    orders = list(combinations(range(7), 4))  # places of the calibration scores, 0 the lowest
    for leaks in range(4):
        marks = [sorted(held)[-1 - leaks] for held in orders]  # the threshold lies just above
        new = [sum(p > mark for p in range(7) if p not in held) for held, mark in zip(orders, marks, strict=True)]
        share = np.mean([x <= 1 for x in new])
        assert chance_within(leaks, 4, 3, 0.34) == pytest.approx(share)


@pytest.mark.parametrize(("n", "asked"), [(100, 20), (300, 600), (833, 2778)])
def test_the_next_questions_only_make_the_promise_stricter(n, asked):
    k, least = allowed_leaks(n, 0.1, 0.05, asked), needed(0.1, 0.05, asked)
    assert allowed_leaks(least - 1, 0.1, 0.05, asked) == -1 < allowed_leaks(least, 0.1, 0.05, asked)
    assert -1 <= k <= allowed_leaks(n, 0.1, 0.05)
    assert k < 0 or chance_within(k, n, asked, 0.1) >= 0.95
    scores = np.random.default_rng(0).random(n)
    assert guarantee(scores, 0.1, asked=asked).threshold >= guarantee(scores, 0.1).threshold


def test_a_stricter_promise_is_a_higher_threshold():
    scores = np.random.default_rng(0).random(1000)
    by_alpha = [guarantee(scores, a).threshold for a in (0.01, 0.05, 0.1)]
    by_delta = [guarantee(scores, 0.05, d).threshold for d in (0.01, 0.05, 0.2)]
    assert by_alpha == sorted(by_alpha, reverse=True) and by_delta == sorted(by_delta, reverse=True)


@pytest.mark.parametrize(("n", "alpha", "least"), [(0, 0.05, 59), (58, 0.05, 59), (298, 0.01, 299)])
def test_too_few_scores_leave_every_question_to_the_base_model(n, alpha, least):
    """(1 − α)^n ≤ δ is what it takes."""
    promise = guarantee(np.full(n, 0.1), alpha)
    assert promise.threshold == math.inf and not promise.attainable and promise.leaks == 0
    assert f"{n} calibration questions are too few, {least} are needed" in str(promise)
    assert guarantee(np.full(least, 0.1), alpha).attainable


def test_what_is_promised_is_said():
    text = str(guarantee(np.arange(100) / 100, 0.1, 0.2))
    assert "80 % confidence" in text and "at most 10 %" in text and "of 100 calibration questions" in text
    assert "the next" not in text and "of the next 50 as well" in str(guarantee(np.arange(100) / 100, 0.1, 0.2, 50))


@pytest.mark.parametrize("scores", [np.zeros((2, 2)), np.array([0.1, np.nan]), np.array(0.5)])
def test_scores_must_be_a_finite_vector(scores):
    with pytest.raises(ValueError, match="one finite ρ a calibration question"):
        guarantee(scores, 0.05)


@pytest.mark.parametrize(("alpha", "delta"), [(0, 0.1), (1, 0.1), (5, 0.1), (0.1, 0), (math.nan, 0.1)])
def test_alpha_and_delta_are_shares(alpha, delta):
    with pytest.raises(ValueError, match="must be shares"):
        guarantee(np.zeros(3), alpha, delta)


def test_questions_to_come_are_at_least_one():
    with pytest.raises(ValueError, match="None for endless use"):
        guarantee(np.zeros(3), 0.1, asked=0)


def true_leaks(n: int, alpha: float, shift: float, draws: int = 500) -> np.ndarray:
    """The leak rate itself, for scores uniform on [0, 1] that are ``shift`` higher when tested."""
    rng = np.random.default_rng(0)
    thresholds = np.array([guarantee(rng.random(n), alpha).threshold for _ in range(draws)])
    return np.clip(1 - thresholds + shift, 0, 1)


@pytest.mark.parametrize(("n", "alpha"), [(60, 0.05), (300, 0.01), (300, 0.1)])
def test_coverage_is_what_was_promised(n, alpha):
    kept = true_leaks(n, alpha, shift=0) <= alpha
    exact = 1 - float(tails(n, Fraction(str(alpha)))[allowed_leaks(n, alpha)])
    assert exact >= 0.95
    low, high = binom.ppf((1e-4, 1 - 1e-4), len(kept), exact)
    assert low <= kept.sum() <= high


def test_coverage_is_lost_when_the_scores_shift():
    assert (true_leaks(300, 0.1, shift=0.05) <= 0.1).mean() < 0.5


def test_risk_control_keeps_the_mean_and_not_each_cut():
    scores = np.random.default_rng(0).random(4000)
    cuts = random_cuts(scores, 1000, [0.05], n_cuts=400)
    average, sure = (cuts[cuts.rule == rule].leak for rule in ("on average", "guaranteed"))
    error = 4 * average.std() / 20
    assert 0.05 - 1 / 1001 - error < average.mean() <= 0.05 + error
    assert (average <= 0.05).mean() < 0.75 < 0.9 < (sure <= 0.05).mean()


@pytest.mark.parametrize("rule", RULES)
def test_cuts_cover_as_often_as_counting_says(rule):
    """Whatever the scores: only their order counts."""
    scores = np.random.default_rng(1).standard_cauchy(900)
    cuts = random_cuts(scores, 300, [0.05, 0.1], n_cuts=1000, seed=3)
    for alpha, part in cuts[cuts.rule == rule].groupby("alpha"):
        exact = chance_within(RULES[rule](300, alpha, 0.05, 600), 300, 600, alpha)
        assert rule == "on average" or exact >= 0.95
        low, high = binom.ppf((1e-4, 1 - 1e-4), len(part), exact)
        assert low <= (part.leak <= alpha).sum() <= high


def test_cuts_repeat_and_leave_each_score_on_one_side():
    scores = np.arange(50.0)
    first, again = (random_cuts(scores, 20, [0.2], n_cuts=3, seed=1) for _ in range(2))
    assert first.equals(again) and first.groupby("rule").size().to_dict() == dict.fromkeys(RULES, 3)
    assert first.threshold.nunique() > 1
    assert random_cuts(scores, 0, [0.2], n_cuts=2).leak.eq(0).all(), "no calibration data, no leak"


def test_at_work_reads_the_two_fine_grained_questions():
    rho = np.full((3, 5), 0.9)
    rho[0, OUT], rho[1, ROLES.index("in_scope")] = 0.1, 0.2
    values = np.zeros((3, 5, 2))
    values[:, ROLES.index("in_scope"), 1] = 1, 1, 0.5
    leak, m_in = at_work(rho, values, 0.5)
    assert leak.tolist() == [0, 1, 1] and m_in.tolist() == [1, 0, 0.5]
    assert at_work(rho, values, math.inf)[0].sum() == 0


@pytest.fixture(scope="module")
def classifier(clip_name, encoder):
    torch.manual_seed(8)
    return ScopeClassifier(clip_name, width=16, encoder=encoder).eval()


def test_the_router_leaks_as_little_as_the_promise_says(classifier, blip2, records):
    """With all edits in memory, by the router itself."""
    rho = scores_among(classifier, records, records)[:, OUT]
    promise = guarantee(rho, alpha=0.6, delta=0.4)
    assert promise.attainable and 0 < promise.leaks < len(records)
    router = MSCKE(blip2, None, classifier, threshold=promise.threshold).edit(records).router
    assert int(router.route([r.out_of_scope for r in records]).in_scope.sum()) == promise.leaks
    router.threshold = guarantee(rho, alpha=0.01).threshold
    assert not router.route([q for r in records for q in r.queries.values()]).in_scope.any()


def test_among_others_the_score_is_the_routers(classifier, blip2, records):
    few, others = records[:4], records[4:]
    queries = [r.queries[role] for r in few for role in ROLES]
    alone = own_scores(classifier, few)
    np.testing.assert_array_equal(scores_among(classifier, few, []), alone)
    together = scores_among(classifier, few, others)
    for i, r in enumerate(few):
        memory = MSCKE(blip2, None, classifier).edit([r, *others]).router
        expected = memory.route(queries[5 * i : 5 * i + 5]).rho.numpy()
        np.testing.assert_allclose(together[i], expected, atol=1e-5)
    assert (together >= alone).all() and (together > alone).any()


def test_just_above_keeps_the_precision():
    for kind in (np.float32, np.float64):
        scores = np.array([0.25, 0.5, 1.0], kind)
        assert just_above(scores, 0) == np.nextafter(kind(1), kind(2)) > 1
        assert just_above(scores, 1) == np.nextafter(kind(0.5), kind(1))
