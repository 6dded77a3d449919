"""Many edits at once: what is computed once for all sizes equals one memory after another."""

import numpy as np
import pandas as pd
import pytest
import torch

from mscke.classifier import ScopeClassifier
from mscke.editors.finetune import FineTune
from mscke.editors.mscke import MSCKE, own_edits
from mscke.evaluation.many_edits import as_rows, ask_among, ask_sequences, groups
from mscke.evaluation.metrics import ROLES
from mscke.evaluation.protocol import ask
from mscke.models.counterfactual import CounterfactualModel

pytest_plugins = ["tiny"]
N = 12  # records of tests/tiny.py
SIZES = (1, 5, 12)
CLOSE = 1e-5  # the search ranks by ‖e‖² − 2 q·e, and scores by ‖q − e‖²: sums in another order


@pytest.fixture(scope="module")
def editor(blip2, clip_name, encoder, records):
    """An MSCKE of random weights that routes some queries, and some of them to others' edits."""
    torch.manual_seed(8)
    classifier = ScopeClassifier(clip_name, width=16, encoder=encoder).eval()
    torch.manual_seed(9)
    mscke = MSCKE(blip2, CounterfactualModel.beside(blip2).eval(), classifier)
    queries = [q for r in records for q in r.queries.values()]
    mscke.threshold = float(mscke.edit(records).router.route(queries).rho.quantile(0.3))
    return mscke


@pytest.fixture(scope="module")
def asked(editor, blip2, records):
    return ask_among(editor, blip2, records, SIZES)


def values(rows: pd.DataFrame) -> pd.Series:
    return rows.set_index(["record", "metric"])["value"].sort_index()


def test_each_record_is_asked_once_among_as_many_edits_as_said():
    for n_edits in (1, 5, 6, 12):
        pieces = groups(N, n_edits, seed=3)
        assert sorted(np.concatenate([a for a, _ in pieces])) == list(range(N))
        for who, stored in pieces:
            assert len(set(stored)) == n_edits and set(who) <= set(stored)
    first = [groups(N, n, seed=3)[0][1] for n in (1, 5, 12)]
    assert (first[1][:1] == first[0]).all() and (first[2][:5] == first[1]).all()
    assert [g[0].tolist() for g in groups(N, 5, 3)] == [g[0].tolist() for g in groups(N, 5, 3)]
    for n_edits in (0, N + 1):
        with pytest.raises(ValueError, match=f"{N} records"):
            groups(N, n_edits)


def test_one_edit_in_memory_is_the_papers_protocol(asked, editor, blip2, records):
    alone = as_rows(asked[asked.n_edits == 1], records, {}, editor.threshold)
    expected = ask(editor.edit(records), blip2, records, own_edits(N, len(ROLES)), ("generated",))
    pd.testing.assert_series_equal(values(alone), values(expected))
    assert asked[asked.n_edits == 1].rival.isna().all()


def test_all_edits_in_memory_is_the_router_over_all(asked, editor, blip2, records):
    together = as_rows(asked[asked.n_edits == N], records, {}, editor.threshold)
    pd.testing.assert_series_equal(
        values(together), values(ask(editor.edit(records), blip2, records, None, ("generated",)))
    )


def test_a_group_is_a_memory_of_its_own(asked, editor, blip2, records):
    rows = as_rows(asked[asked.n_edits == 5], records, {}, editor.threshold)
    for who, stored in groups(N, 5):
        model = editor.edit([records[i] for i in stored])
        expected = ask(model, blip2, [records[i] for i in who], None, ("generated",))
        own = rows[rows.record.isin([records[i].id for i in who])]
        pd.testing.assert_series_equal(values(own), values(expected))


def test_some_queries_are_captured_by_others(asked, editor):
    """The tests above would say little if the own edit always won."""
    full = asked[asked.n_edits == N]
    captured = (full.winner != full.record) & (full.rho >= editor.threshold)
    assert 0 < captured.sum() < len(full)
    np.testing.assert_allclose(full.rho, np.fmax(full.own, full.rival), atol=CLOSE)
    ahead = full.own - full.rival
    assert ((full.winner == full.record) == (ahead > 0))[ahead.abs() > CLOSE].all()


def test_a_larger_memory_never_lowers_the_best_score(asked):
    best = asked.pivot(index=["record", "role"], columns="n_edits", values="rho")
    assert (best[1] <= best[5] + CLOSE).all() and (best[5] <= best[N] + CLOSE).all()
    assert asked.groupby(["record", "role"]).own.nunique().eq(1).all()


def test_thresholds_above_the_editors_need_no_other_answers(asked, editor, blip2, records):
    higher = float(asked.rho.quantile(0.7))
    assert higher > editor.threshold
    strict = MSCKE(blip2, editor.in_scope, editor.classifier, threshold=higher)
    rows = as_rows(asked[asked.n_edits == N], records, {}, higher)
    pd.testing.assert_series_equal(
        values(rows), values(ask(strict.edit(records), blip2, records, None, ("generated",)))
    )
    with pytest.raises(ValueError, match="were not asked"):
        as_rows(asked, records, {}, threshold=0.0)


def test_a_threshold_that_nothing_reaches_leaves_the_base_model(editor, blip2, records):
    strict = MSCKE(blip2, editor.in_scope, editor.classifier, threshold=1.01)
    table = ask_among(strict, blip2, records, [N])
    assert table.taken.isna().all()
    rows = as_rows(table, records, {"method": "none"}, 1.01)
    assert (rows[rows.metric.isin(["m_out", "locality"])].value == 1).all() and set(rows.method) == {"none"}


def test_sequences_ask_the_model_that_holds_the_edits(blip2, records):
    editor = FineTune(blip2, lr=1e-2, steps=3)
    rows = ask_sequences(editor, blip2, records, (1, 4, 8), n_asked=8, seed=2)
    order = np.random.default_rng(2).permutation(N)
    assert rows.groupby("n_edits").record.nunique().to_dict() == {1: 8, 4: 8, 8: 8}
    alone = ask(editor.edit(records), blip2, records, own_edits(N, len(ROLES)), ("generated",))
    single = values(rows[rows.n_edits == 1])
    pd.testing.assert_series_equal(single, values(alone).loc[single.index])
    for start in (0, 4):  # two sequences of four
        chain = [records[i] for i in order[start : start + 4]]
        ((_, model),) = editor.sequence(chain, [4])
        part = rows[(rows.n_edits == 4) & rows.record.isin([r.id for r in chain])]
        pd.testing.assert_series_equal(values(part), values(ask(model, blip2, chain, None, ("generated",))))


def test_more_questions_than_records_ask_each_record_once(blip2, records):
    rows = ask_sequences(FineTune(blip2, steps=1), blip2, records, (1, 5, N), n_asked=300)
    assert rows.groupby("n_edits").record.nunique().to_dict() == {1: N, 5: 10, N: N}
    assert not rows.duplicated(["n_edits", "record", "metric"]).any()


def test_a_long_sequence_is_asked_about_early_and_late_edits(blip2, records):
    rows = ask_sequences(FineTune(blip2, steps=1), blip2, records, [N], n_asked=3)
    order = np.random.default_rng(0).permutation(N)
    assert set(rows.record) == {records[i].id for i in order[[0, 6, 11]]}
