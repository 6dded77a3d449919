"""The decision rule: the best edit of the memory, taken when its ρ reaches the threshold."""

import pytest
import torch

from mscke.benchmark.sample import Query
from mscke.classifier import ScopeClassifier
from mscke.memory import EditMemory
from mscke.router import ScopeRouter

pytest_plugins = ["tiny"]


@pytest.fixture(scope="module", params=["dot", "text"])
def classifier(request, clip_name, encoder):
    torch.manual_seed(7)
    return ScopeClassifier(clip_name, fusion=request.param, width=16, encoder=encoder).eval()


def remember(classifier, records):
    memory = EditMemory(classifier.dim)
    if records:
        prompts = [Query(r.edit.prompt, r.edit.image) for r in records]
        memory.add([r.edit for r in records], classifier.embed(prompts, [r.edit.answer for r in records]))
    return memory


def test_an_empty_memory_routes_nothing(classifier, queries):
    route = ScopeRouter(classifier, remember(classifier, []), threshold=0.0).route(queries)
    assert not route.in_scope.any() and route.edit_id.tolist() == [-1] * len(queries)
    assert route.rho.tolist() == [0.0] * len(queries)


def test_the_best_edit_of_the_memory_answers(classifier, records, queries):
    memory = remember(classifier, records)
    memory.remove([2, 5])
    rho = classifier.similarity(classifier.embed(queries), memory.embeddings)
    for threshold in (0.0, 0.5, float(rho.max(1).values.median()), 1.1):
        route = ScopeRouter(classifier, memory, threshold).route(queries)
        torch.testing.assert_close(route.rho, rho.max(1).values, atol=1e-5, rtol=0)
        for i, edit_id in enumerate(route.edit_id.tolist()):
            if edit_id < 0:
                assert route.rho[i] < threshold
            else:
                assert route.rho[i] >= threshold
                assert rho[i, memory.ids.tolist().index(edit_id)].item() == pytest.approx(float(rho[i].max()), abs=1e-5)


def test_rho_at_the_threshold_is_in_scope(classifier, records, queries):
    memory = remember(classifier, records)
    scores = ScopeRouter(classifier, memory).route(queries).rho
    for i in (0, 7, len(queries) - 1):
        at = float(scores[i])
        assert ScopeRouter(classifier, memory, at).route(queries).in_scope[i]
        above = float(torch.nextafter(scores[i], torch.tensor(1.0)))
        assert not ScopeRouter(classifier, memory, above).route(queries).in_scope[i]


def test_another_classifiers_memory_is_refused(classifier, records):
    memory = remember(classifier, records)
    other = EditMemory(classifier.dim, "of another")
    other.add([r.edit for r in records], memory.embeddings)
    with pytest.raises(ValueError, match=r"written by classifier of another, .*embed_again"):
        ScopeRouter(classifier, other)


def test_no_queries_are_routed_nowhere(classifier, records):
    route = ScopeRouter(classifier, remember(classifier, records)).route([])
    assert route.edit_id.shape == route.rho.shape == (0,)


def test_the_default_threshold_is_the_papers(classifier, records):
    assert ScopeRouter(classifier, remember(classifier, records)).threshold == 0.5


def test_among_is_a_memory_of_that_edit_alone(classifier, records, queries):
    router = ScopeRouter(classifier, remember(classifier, records), threshold=0.3)
    among = torch.arange(len(queries)) * 7 % len(records)
    route = router.route(queries, among)
    for i, (query, k) in enumerate(zip(queries, among.tolist(), strict=True)):
        alone = ScopeRouter(classifier, remember(classifier, [records[k]]), threshold=0.3).route([query])
        assert route.rho[i].item() == pytest.approx(alone.rho.item(), abs=1e-5)
        assert route.edit_id[i].item() == (k if alone.in_scope.item() else -1)
