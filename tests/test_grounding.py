"""Kinds of questions, slices, and failures before and after."""

import numpy as np
import pytest

from mscke.evaluation.metrics import ROLES
from mscke.evaluation.outcomes import COLUMNS
from mscke.report.grounded import before_and_after, plot_readers, question_kinds, right_by_kind, slice_rows

pytest_plugins = ["tiny"]
IN, OUT = ROLES.index("in_scope"), ROLES.index("out_of_scope")


@pytest.fixture
def rho(records):
    return np.random.default_rng(0).random((len(records), len(ROLES)))


def test_kinds_are_the_records_own(records):
    kinds = question_kinds(records)
    for record, inside, outside in zip(records, kinds.in_scope, kinds.out_of_scope, strict=True):
        reference, hardness = record.meta["reference"], record.meta["hardness"]["out_of_scope"]
        assert inside == reference["in_scope"].replace("none", "presence")
        expected = reference["out_of_scope"].replace("none", "presence")
        assert outside == (expected if hardness == "other_entity" else hardness)


def test_shares_by_kind_add_up_to_the_whole(records, rho):
    table = right_by_kind(question_kinds(records), rho, threshold=0.4)
    for role, column, inside in (("in_scope", IN, True), ("out_of_scope", OUT, False)):
        part = table[table.role == role]
        assert part.n.sum() == len(records)
        right = ((rho[:, column] >= 0.4) == inside).mean()
        assert (part.n * part.right).sum() / part.n.sum() == pytest.approx(100 * right)


def test_a_slice_is_the_mean_of_its_records():
    found = np.random.default_rng(1).random((20, len(COLUMNS)))
    slices = {"all": np.ones(20, bool), "few": np.arange(20) < 5}
    table = slice_rows(found, slices)
    for name, mask in slices.items():
        part = table[table.slice == name].set_index("metric")
        np.testing.assert_allclose(part.value[list(COLUMNS)], 100 * found[mask].mean(0))
        assert (part.n == mask.sum()).all() and (part.lo <= part.value).all() and (part.value <= part.hi).all()


def test_cards_show_failures_of_the_first_and_both_scores(records, rho):
    after = np.tile([1.0, 1.0, 1.0, 0.0, 0.0], (len(records), 1))
    cases = before_and_after(records, rho, after, each=len(records))
    wrong = (rho[:, IN] < 0.5).sum() + (rho[:, OUT] >= 0.5).sum()
    assert len(cases) == wrong > 0
    assert all("right now" in case["lines"][1] for case in cases)
    assert not before_and_after(records, after, rho)
    assert all("still wrong" in case["lines"][1] for case in before_and_after(records, rho, rho))


def test_readers_are_drawn_word_by_word():
    weights = [np.eye(3, 2), np.full((4, 2), 0.25)]
    fig = plot_readers([["a", "b", "c"], ["d", "e", "f", "g"]], weights)
    assert [[x.get_text() for x in ax.get_xticklabels()] for ax in fig.axes] == [list("abc"), list("defg")]
    for ax, weight in zip(fig.axes, weights, strict=True):
        np.testing.assert_allclose(ax.images[0].get_array(), weight.T)
