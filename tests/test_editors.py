"""MSCKE and SERAC: what goes where, and that the base model is never touched."""

import pytest
import torch

from mscke.benchmark.sample import Query
from mscke.classifier import ScopeClassifier
from mscke.editors.mscke import MSCKE, own_edits
from mscke.editors.serac import MiniLMEncoder
from mscke.models.counterfactual import CounterfactualModel
from mscke.models.mllm import MLLM
from mscke.models.names import fingerprint

pytest_plugins = ["tiny"]


@pytest.fixture(scope="module")
def counterfactual(mllm):
    torch.manual_seed(9)
    return CounterfactualModel.beside(mllm).eval()


def again(mllm):
    """The same model without what it remembers."""
    return MLLM(mllm.model, mllm.tokenizer, "again")


@pytest.fixture
def asked(records):
    """The first four records' queries and answers, record by record, and the rule that splits them."""
    few = records[:4]
    return (
        few,
        [q for r in few for q in r.queries.values()],
        [a for r in few for a in r.answers.values()],
        own_edits(4, 5),
    )


def middle(mllm, counterfactual, classifier, few, queries, among):
    """A threshold that some of the queries reach and some do not."""
    rho = MSCKE(mllm, counterfactual, classifier).edit(few).router.route(queries, among).rho
    return float(rho.sort().values[len(rho) // 2])


def same_forced(a, b):
    return all((x.top == y.top).all() and (x.hits == y.hits).all() for x, y in zip(a, b, strict=True))


def test_nothing_in_memory_is_the_base_model(mllm, counterfactual, classifier, asked):
    _, queries, answers, _ = asked
    edited = MSCKE(again(mllm), counterfactual, classifier, threshold=0.0).edit([])
    base = again(mllm)
    assert edited.answer(queries) == base.answer(queries)
    assert same_forced(edited.force(queries, answers), base.force(queries, answers))


@pytest.mark.parametrize("alone", [True, False])
def test_threshold_0_sends_all_to_the_counterfactual_model(mllm, counterfactual, classifier, asked, alone):
    few, queries, answers, own = asked
    among = own if alone else None
    edited = MSCKE(mllm, counterfactual, classifier, threshold=0.0).edit(few)
    route = edited.router.route(queries, among)
    assert route.in_scope.all()
    edits = [few[k].edit for k in route.edit_id.tolist()]
    assert edited.answer(queries, among) == counterfactual.answer(queries, edits)
    assert same_forced(edited.force(queries, answers, among), counterfactual.force(queries, edits, answers))
    if alone:
        assert edits == [r.edit for r in few for _ in range(5)]


@pytest.mark.parametrize("alone", [True, False])
def test_threshold_above_1_sends_nothing(mllm, counterfactual, classifier, asked, alone):
    few, queries, answers, own = asked
    edited = MSCKE(again(mllm), counterfactual, classifier, threshold=1.01).edit(few)
    among, base = own if alone else None, again(mllm)
    assert edited.answer(queries, among) == base.answer(queries)
    assert same_forced(edited.force(queries, answers, among), base.force(queries, answers))


def test_each_query_is_answered_where_its_route_says(mllm, counterfactual, classifier, asked):
    few, queries, answers, among = asked
    threshold = middle(mllm, counterfactual, classifier, few, queries, among)
    edited = MSCKE(mllm, counterfactual, classifier, threshold=threshold).edit(few)
    route = edited.router.route(queries, among)
    assert 0 < int(route.in_scope.sum()) < len(queries)
    got, forced = edited.answer(queries, among), edited.force(queries, answers, among)
    for i, query in enumerate(queries):
        edit = [few[int(among[i])].edit]
        if route.in_scope[i]:
            expected = counterfactual.answer([query], edit)[0]
            top = counterfactual.force([query], edit, [answers[i]])[0].top
        else:
            expected, top = mllm.answer([query])[0], mllm.force([query], [answers[i]])[0].top
        assert got[i] == expected
        assert forced[i].top.shape == top.shape and (forced[i].top[:, 0] == top[:, 0]).all()


def test_a_batch_of_single_edits_is_one_record_at_a_time(mllm, counterfactual, classifier, asked):
    few, queries, answers, among = asked
    threshold = middle(mllm, counterfactual, classifier, few, queries, among)
    editor = MSCKE(mllm, counterfactual, classifier, threshold=threshold)
    batch = editor.edit(few)
    got, forced = batch.answer(queries, among), batch.force(queries, answers, among)
    for k, record in enumerate(few):
        part, alone = slice(5 * k, 5 * k + 5), editor.edit([record])
        assert alone.answer(queries[part]) == got[part]  # its memory holds that edit alone
        for a, b in zip(alone.force(queries[part], answers[part]), forced[part], strict=True):
            assert (a.hits == b.hits).all() and (a.top[:, 0] == b.top[:, 0]).all()


def test_own_edits():
    assert own_edits(3, 2).tolist() == [0, 0, 1, 1, 2, 2]


def test_editing_never_touches_the_base_model(mllm, counterfactual, classifier, asked):
    few, queries, answers, _ = asked
    before = fingerprint(mllm.model)
    first = again(mllm).answer(queries)
    editor = MSCKE(mllm, counterfactual, classifier, threshold=0.5)
    for model in (editor.edit(few), editor.edit(few[:1])):
        model.answer(queries)
        model.force(queries, answers)
    assert fingerprint(mllm.model) == before
    assert again(mllm).answer(queries) == first


def test_each_call_of_edit_starts_a_fresh_memory(mllm, counterfactual, classifier, records):
    editor = MSCKE(mllm, counterfactual, classifier)
    first, second = editor.edit(records[:3]), editor.edit(records[3:5])
    assert [len(m.router.memory) for m in (first, second)] == [3, 2]
    assert second.router.memory[0] == records[3].edit


@pytest.fixture(scope="module")
def serac_scope():
    torch.manual_seed(10)
    return ScopeClassifier("all-MiniLM-L6-v2", fusion="text", encoder=MiniLMEncoder()).eval()


def test_serac_reads_text_alone(serac_scope, records, queries):
    few = queries[:10]
    other = [Query(q.question, records[-1].edit.image) for q in few]
    assert torch.equal(serac_scope.embed(few), serac_scope.embed(other))
    alone = torch.cat([serac_scope.embed([q]) for q in few])
    torch.testing.assert_close(serac_scope.embed(few), alone, atol=1e-5, rtol=0)


def test_serac_is_mscke_with_another_classifier(blip2, serac_scope, asked):
    few, queries, _, among = asked
    torch.manual_seed(9)
    counterfactual = CounterfactualModel.beside(blip2).eval()
    edited = MSCKE(blip2, counterfactual, serac_scope, "SERAC", threshold=0.0).edit(few)
    edits = [few[k].edit for k in among.tolist()]
    assert edited.answer(queries, among) == counterfactual.answer(queries, edits)


def test_serac_survives_the_disk(serac_scope, queries, tmp_path):
    serac_scope.save_pretrained(tmp_path)
    loaded = ScopeClassifier.from_pretrained(tmp_path, encoder=serac_scope.encoder)
    assert torch.equal(loaded.embed(queries[:5]), serac_scope.embed(queries[:5]))
