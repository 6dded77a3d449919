"""The metrics against cases worked out by hand; the protocol against one record at a time."""

import copy
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from mscke.benchmark.sample import Query
from mscke.classifier import ScopeClassifier
from mscke.editors.finetune import FineTune
from mscke.editors.ike import IKE
from mscke.editors.mscke import MSCKE
from mscke.editors.null import null_edits
from mscke.editors.serac import MiniLMEncoder
from mscke.evaluation.metrics import METRICS, ROLES, exact_match, strict_match, token_accuracy, unchanged_share
from mscke.evaluation.protocol import ask, evaluate
from mscke.models.counterfactual import CounterfactualModel
from mscke.models.decoding import Forced, teacher_force
from mscke.models.mllm import MLLM

pytest_plugins = ["tiny"]

COLUMNS = [
    "track",
    "backbone",
    "method",
    "protocol",
    "record",
    "metric",
    "value",
    "strict",
    "question",
    "expected",
    "answer",
]
PROTOCOLS = {"generated", "teacher_forced"}


class Unedited:
    """The model as it was: an editor that edits nothing."""

    name, chunk = "none", None

    def __init__(self, base):
        self.base = base

    def edit(self, records):
        return self

    def answer(self, queries, among=None):
        return self.base.answer(queries)

    def force(self, queries, answers, among=None):
        return self.base.force(queries, answers)

    def unedited(self):
        return Unedited(self.base)


class Told(Unedited):
    """Answers by a dictionary; tokens as the base model's, all of them hits."""

    def __init__(self, base, answers):
        super().__init__(base)
        self.answers = answers

    def answer(self, queries, among=None):
        return [self.answers[q] for q in queries]


def again(mllm):
    """The same model without what it remembers."""
    return MLLM(mllm.model, mllm.tokenizer, mllm.name)


@pytest.fixture(scope="module")
def few(records):
    return records[:4]


@pytest.fixture(scope="module")
def editor(mllm, clip_name, encoder, few):
    """MSCKE of random weights, at a threshold that splits the queries."""
    torch.manual_seed(11)
    classifier = ScopeClassifier(clip_name, width=16, encoder=encoder).eval()
    editor = MSCKE(mllm, CounterfactualModel.beside(mllm).eval(), classifier)
    rho = (
        editor.edit(few)
        .router.route([r.queries[role] for r in few for role in ROLES], torch.arange(4).repeat_interleave(5))
        .rho
    )
    editor.threshold = float(rho.sort().values[10])
    return editor


def forced(*rows, hits=()):
    return Forced(np.array(hits, bool), np.array(rows, np.int32))


class Scripted(Unedited):
    """Predicts what it was told to by question, and notes what it is asked to generate."""

    def __init__(self, base, greedy, before=()):
        super().__init__(base)
        self.greedy, self.before, self.asked = greedy, before, []

    def force(self, queries, answers, among=None):
        one = np.zeros((2, 10), np.int32)
        return [Forced(np.array([True]), one, q.question in self.greedy) for q in queries]

    def answer(self, queries, among=None):
        self.asked += [q.question for q in queries]
        return ["said"] * len(queries)

    def unedited(self):
        return self.other


def test_what_teacher_forcing_predicts_to_its_end_is_not_generated(mllm):
    """What must stay is generated both ways unless both predictions are the gold answer."""
    queries = dict(zip(ROLES, [Query(c) for c in "abcde"], strict=True))
    record = SimpleNamespace(id=7, queries=queries, answers=dict.fromkeys(ROLES, "Yes."))
    model = Scripted(mllm, "acde")
    model.other = Scripted(mllm, "e")
    rows = ask(model, mllm, [record], torch.zeros(5, dtype=torch.long))
    rows = rows[rows["protocol"] == "generated"].set_index("question")
    assert rows["answer"].tolist() == ["yes", "said", "yes", "said", "yes"]
    assert rows.loc[["d", "e"], "expected"].tolist() == ["said", "yes"]
    assert model.asked == ["b", "d"] and model.other.asked == ["d"]
    told = ask(model, mllm, [record], None, ("generated",))
    assert told["answer"].tolist() == ["said"] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_size", [7, 64])
def test_an_edit_of_nothing_changes_nothing(mllm, clip_name, encoder, records, dtype, batch_size):
    """In half precision logits depend on a batch's shape: before and after are compared in one."""
    model = copy.deepcopy(mllm.model).to(dtype)
    base = MLLM(model, mllm.tokenizer, mllm.name, batch_size=batch_size)
    base.answer([r.queries[role] for r in records[::2] for role in ROLES])  # remembered, of other batches
    base.force([r.out_of_scope for r in records], [r.answers["out_of_scope"] for r in records])
    classifier = ScopeClassifier(clip_name, width=16, encoder=encoder).eval()
    for editor in null_edits(base, classifier, at_once=2):
        rows = evaluate(editor, base, records, "tiny")
        stays = rows[rows["metric"].isin(["m_out", "locality"])]
        assert (stays["value"] == 1).all() and (stays["strict"] == 1).all(), editor.name


def test_before_is_asked_in_the_batches_of_after(mllm, few, monkeypatch):
    """The same rows of token ids, in the same order, for every way of editing."""
    seen, minilm = [], MiniLMEncoder()

    def note(language_model, encoder, prompts, *rest):
        seen.append((len(prompts), [tuple(p[-4:]) for p in prompts]))
        return teacher_force(language_model, encoder, prompts, *rest)

    for place in ("deltas", "ike"):
        monkeypatch.setattr(f"mscke.editors.{place}.teacher_force", note)
    queries = [r.out_of_scope for r in few] + [r.locality for r in few]
    gold, among = [q.question for q in queries], torch.arange(len(few)).repeat(2)
    for editor in (FineTune(mllm, steps=1, at_once=2), IKE(mllm, few, minilm, 1)):
        model = editor.edit(few)
        model.force(queries, gold, among)
        after, _ = list(seen), seen.clear()
        model.unedited().force(queries, gold, among)
        assert after and after == seen
        seen.clear()


def test_exact_match_by_hand():
    said, expected = ["Yes.", "two owls", "no", "T-Rex"], ["yes", "two  Owls ", "yes", "t rex"]
    assert exact_match(said, expected).tolist() == [1.0, 1.0, 0.0, 1.0]
    assert strict_match(said, expected).tolist() == [1.0, 1.0, 0.0, 0.0]


def test_token_accuracy_by_hand():
    assert token_accuracy(forced([1], hits=[True, False, True, True])) == 0.75
    assert token_accuracy(forced([1], hits=[False])) == 0.0


def test_unchanged_share_by_hand():
    before = forced([1, 2, 3], [4, 5, 6], [7, 8, 9])
    after = forced([1, 3, 2], [4, 5, 6], [8, 7, 9])  # rank by rank: 1, 3 and 1 of three are the same
    assert unchanged_share(before, after, k=3, prefix=1) == pytest.approx(5 / 9)
    assert unchanged_share(before, after, k=1, prefix=1) == pytest.approx(2 / 3)
    assert unchanged_share(before, after, k=2, prefix=3) == pytest.approx(3 / 6)


@pytest.mark.parametrize("prefix", [0, 1, 2, 3])
def test_an_edit_in_the_context_shifts_nothing(prefix):
    """Visual tokens are compared from the front, question and answer from the back."""
    before = forced([1], [2], [3])
    told = [[90], [91], [92]]
    after = forced(*[[1], [2], [3]][:prefix], *told, *[[1], [2], [3]][prefix:])
    assert unchanged_share(before, after, k=1, prefix=prefix) == 1.0


def test_nothing_changes_between_a_model_and_itself(mllm, queries, gold):
    before, after = mllm.force(queries[:10], gold[:10]), again(mllm).force(queries[:10], gold[:10])
    for a, b, query in zip(before, after, queries, strict=False):
        prefix = mllm.encoder.prefix_length(query.image is not None)
        for k in (1, 10):
            assert unchanged_share(a, b, k, prefix) == 1.0


def test_an_unedited_model_changes_nothing(mllm, few):
    rows = evaluate(Unedited(again(mllm)), mllm, few, "tiny")
    assert list(rows.columns) == COLUMNS
    assert len(rows) == len(few) * len(ROLES) * len(PROTOCOLS)
    assert not rows.duplicated(["protocol", "record", "metric"]).any()
    assert set(rows["protocol"]) == PROTOCOLS and set(rows["metric"]) == set(METRICS.values())
    assert rows["value"].between(0, 1).all() and not rows.isna().any().any()
    assert (rows["track"] == "tiny").all() and (rows["backbone"] == mllm.name).all()
    assert (rows["method"] == "none").all()
    kept = rows[rows["metric"].isin(["locality", "m_out"])]
    assert (kept["value"] == 1).all() and (kept["strict"] == 1).all()
    told = rows[rows["protocol"] == "teacher_forced"]
    assert told["strict"].equals(told["value"])  # token ids: there is one comparison
    assert set(rows["record"]) == {r.id for r in few}


def test_each_row_is_about_its_own_query(mllm, few):
    rows = evaluate(Unedited(mllm), mllm, few, "tiny").set_index(["protocol", "record", "metric"])
    for record in few:
        for role, metric in METRICS.items():
            for protocol in PROTOCOLS:
                row = rows.loc[(protocol, record.id, metric)]
                query, changes = record.queries[role], metric in ("reliability", "generality", "m_in")
                assert row["question"] == query.question
                (base,) = mllm.answer([query])
                if protocol == "generated":
                    assert row["expected"] == (record.answers[role] if changes else base)
                    assert row["answer"] == base
                    assert row["value"] == float(not changes or base == record.answers[role].lower())
                elif changes:
                    (found,) = mllm.force([query], [record.answers[role]])
                    assert row["value"] == found.hits.mean()


def test_unchanged_means_the_base_models_own_answer_right_or_wrong(mllm, few):
    """An ideal editor gets 100 %; one that gives out-of-scope queries the *gold* answer does not."""
    base = dict(zip(queries := [q for r in few for q in r.queries.values()], mllm.answer(queries), strict=True))
    gold = {r.queries[role]: r.answers[role] for r in few for role in ("reliability", "generality", "in_scope")}
    rows = evaluate(Told(mllm, base | gold), mllm, few, "tiny")
    assert (rows[rows["protocol"] == "generated"]["value"] == 1).all()
    facts = {r.queries[role]: r.answers[role] for r in few for role in ("out_of_scope", "locality")}
    rows = evaluate(Told(mllm, base | gold | facts), mllm, few, "tiny")
    rows = rows[rows["protocol"] == "generated"].groupby("metric")["value"].mean()
    assert rows["m_in"] == 1 and rows["m_out"] == 0 and rows["locality"] == 0


@pytest.mark.parametrize("together", [False, True])  # of one record, one edit is all of them
def test_a_batch_is_one_record_at_a_time(mllm, editor, few, together):
    batch = evaluate(editor, mllm, few, "tiny")
    alone = pd.concat([evaluate(editor, mllm, [r], "tiny", together=together) for r in few])
    key = ["protocol", "record", "metric"]
    batch, alone = (f.set_index(key).sort_index() for f in (batch, alone))
    for name in ("value", "strict"):
        np.testing.assert_allclose(batch.pop(name), alone.pop(name), atol=1e-9)
    assert batch.equals(alone)


def test_together_puts_every_edit_in_force(mllm, editor, few):
    queries = [r.queries[role] for r in few for role in ROLES]
    rows = evaluate(editor, mllm, few, "tiny", together=True)
    rows = rows[rows["protocol"] == "generated"]
    assert rows["answer"].tolist() == editor.edit(few).answer(queries)


def test_what_is_not_routed_is_unchanged_under_both_protocols(mllm, editor, few):
    route = editor.edit(few).router.route([r.out_of_scope for r in few], torch.arange(len(few)))
    rows = evaluate(editor, mllm, few, "tiny")
    rows = rows[rows["metric"] == "m_out"].set_index(["protocol", "record"])["value"]
    for protocol in PROTOCOLS:
        for record, inside in zip(few, route.in_scope.tolist(), strict=True):
            if not inside:
                assert rows[(protocol, record.id)] == 1
