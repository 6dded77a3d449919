"""The edit memory against a dictionary searched by brute force; what it refuses; what it takes back."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from mscke.benchmark.sample import Edit
from mscke.memory import EditMemory
from mscke.storage import search

DIM = 3
VECTORS = st.lists(st.lists(st.integers(-20, 20), min_size=DIM, max_size=DIM), min_size=1, max_size=4)


def edits(n, start=0):
    return [Edit(f"/{start + i}.png", f"Who is № {start + i}?", f"é{start + i}") for i in range(n)]


def filled(n=6, dim=DIM, fingerprint="abc"):
    torch.manual_seed(0)
    memory = EditMemory(dim, fingerprint)
    memory.add(edits(n), torch.randn(n, dim))
    return memory


def same(a, b):
    assert (a.dim, a.fingerprint, len(a)) == (b.dim, b.fingerprint, len(b))
    assert torch.equal(a.ids, b.ids) and torch.equal(a.embeddings, b.embeddings)
    assert [a[i] for i in a.ids.tolist()] == [b[i] for i in b.ids.tolist()]


class MemoryMachine(RuleBasedStateMachine):
    """Adds, removes, takes back and looks up as a dictionary of (edit, vector) would."""

    ids = Bundle("ids")

    def __init__(self):
        super().__init__()
        self.memory, self.model, self.given = EditMemory(DIM), {}, 0
        self.standing, self.versions = [], [{}]  # what each standing change began from; every version

    @rule(target=ids, vectors=VECTORS)
    def add(self, vectors):
        stored = edits(len(vectors), self.given)
        new = self.memory.add(stored, torch.tensor(vectors, dtype=torch.float32))
        assert new == list(range(self.given, self.given + len(vectors)))  # never given before
        self.given += len(vectors)
        self.changed(self.model | dict(zip(new, zip(stored, vectors, strict=True), strict=True)))
        return multiple(*new)

    def changed(self, model):
        self.standing.append(self.model)
        self.versions.append(model)
        self.model = model

    @rule(edit_id=ids)
    def remove(self, edit_id):
        if edit_id in self.model:
            self.memory.remove([edit_id])
            self.changed({i: pair for i, pair in self.model.items() if i != edit_id})
        else:
            with pytest.raises(KeyError, match=str(edit_id)):
                self.memory.remove([edit_id])

    @rule()
    def undo(self):
        if self.standing:
            self.memory.undo()
            self.model = self.standing.pop()
            self.versions.append(self.model)
        else:
            with pytest.raises(ValueError, match="nothing to undo"):
                self.memory.undo()

    @rule(data=st.data())
    def look_back(self, data):
        version = data.draw(st.integers(0, len(self.versions) - 1))
        assert self.memory.at(version).ids.tolist() == sorted(self.versions[version])

    @rule(edit_id=ids)
    def remove_with_one_that_is_not_there(self, edit_id):
        with pytest.raises(KeyError, match=f"{self.given}"):
            self.memory.remove([edit_id, self.given])

    @rule(queries=VECTORS, k=st.integers(1, 5))
    def nearest(self, queries, k):
        distances, found = self.memory.nearest(torch.tensor(queries, dtype=torch.float32), k)
        assert distances.shape == found.shape == (len(queries), min(k, len(self.model)))
        for query, row, ids in zip(queries, distances.tolist(), found.tolist(), strict=True):
            exact = {i: sum((a - b) ** 2 for a, b in zip(query, v, strict=True)) for i, (_, v) in self.model.items()}
            assert row == sorted(exact.values())[:k]
            assert row == [exact[i] for i in ids] and len(set(ids)) == len(ids)

    @invariant()
    def agree(self):
        assert len(self.memory) == len(self.model) and self.memory.ids.tolist() == sorted(self.model)
        assert [c.version for c in self.memory.log()] == list(range(1, len(self.versions)))
        for i, (edit, vector) in self.model.items():
            assert self.memory[i] == edit
            assert self.memory.embeddings[sorted(self.model).index(i)].tolist() == vector


MemoryMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
TestMemoryMachine = MemoryMachine.TestCase


def test_nearest_is_the_argmin_of_the_distances():
    memory, queries = filled(50, dim=16), torch.randn(30, 16)
    distances, ids = memory.nearest(queries, 3)
    exact = torch.cdist(queries.double(), memory.embeddings.double()).square()
    values, rows = exact.topk(3, largest=False)
    assert torch.equal(ids, memory.ids[rows])
    torch.testing.assert_close(distances.double(), values, rtol=1e-5, atol=1e-5)
    own = torch.arange(30)
    torch.testing.assert_close(memory.distances(queries, own).double(), exact[own, own], rtol=1e-5, atol=1e-5)


def test_an_empty_memory_finds_nothing():
    distances, ids = EditMemory(DIM).nearest(torch.zeros(4, DIM))
    assert distances.shape == ids.shape == (4, 0)


@pytest.mark.parametrize(
    "embeddings, message",
    [
        (torch.zeros(2, DIM + 1), r"\(2, 3\), got \(2, 4\).*classifier of this memory"),
        (torch.zeros(3, DIM), r"2 edits"),
        (torch.zeros(DIM), "shape"),
        (torch.tensor([[0.0] * DIM, [float("nan")] * DIM]), r"\[1\] are not finite"),
        (torch.tensor([[0.0, float("inf"), 0.0], [0.0] * DIM]), r"\[0\] are not finite"),
    ],
)
def test_bad_embeddings_are_refused_and_nothing_is_stored(embeddings, message):
    memory = filled()
    with pytest.raises(ValueError, match=message):
        memory.add(edits(2, 6), embeddings)
    same(memory, filled())


def test_removing_what_is_not_there_removes_nothing():
    memory = filled()
    with pytest.raises(KeyError, match=r"no edit with id \[6, 7\] in memory"):
        memory.remove([0, 7, 1, 6])
    same(memory, filled())


def test_an_edit_that_is_not_there_is_named():
    memory = filled()
    memory.remove([2])
    with pytest.raises(KeyError, match=r"no edit with id \[2\] in memory"):
        memory[2]
    with pytest.raises(KeyError, match=r"no edit with id \[2, 9\] in memory"):
        memory.distances(torch.zeros(3, DIM), torch.tensor([9, 0, 2]))


def test_a_memory_keeps_no_gradient_and_no_alias():
    memory, z = EditMemory(DIM), torch.ones(1, DIM, requires_grad=True)
    memory.add(edits(1), z)
    with torch.no_grad():
        z.zero_()
    assert not memory.embeddings.requires_grad and memory.embeddings.tolist() == [[1.0] * DIM]


def test_the_past_is_a_copy():
    memory = filled()
    memory.remove([0])
    past = memory.at(1)
    assert past.ids.tolist() == list(range(6)) and past[0] == edits(1)[0]
    assert past.add(edits(1), torch.zeros(1, DIM)) == memory.add(edits(1, 9), torch.ones(1, DIM)) == [6]
    assert past[6] == edits(1)[0] and memory[6] == edits(1, 9)[0]
    assert past.embeddings[-1].tolist() == [0.0] * DIM and memory.embeddings[-1].tolist() == [1.0] * DIM


def test_a_version_that_was_not_yet_is_refused():
    for version in (-1, 2):
        with pytest.raises(ValueError, match=f"no version {version}: this memory has versions 0 to 1"):
            filled().at(version)


def test_a_memory_begun_while_scoring_can_be_added_to_later():
    with torch.inference_mode():
        memory = filled()
    memory.add(edits(1, 6), torch.zeros(1, DIM))
    memory.remove([0])
    assert memory.ids.tolist() == [1, 2, 3, 4, 5, 6]


def test_nothing_is_no_change():
    memory = filled(0)
    assert memory.add([], torch.empty(0, DIM)) == [] and memory.log() == []


@pytest.mark.parametrize("n", [1, 7, 8, 100])
@pytest.mark.parametrize("k", [1, 3])
def test_a_single_query_is_searched_as_many_are(n, k):
    z, queries = torch.randn(n, DIM), torch.randn(2 * search.AT_ONCE + 5, DIM)
    index, k, gone = search.Index(z), min(n, k), n // 2 if n > 1 else n
    index.here[:] = torch.arange(n) != gone
    index.look()
    distance = torch.cdist(queries, z)
    distance[:, gone : gone + 1] = torch.inf
    squared, places = index.nearest(queries, k, exact=False)
    assert torch.equal(places, distance.sort(1).indices[:, :k])
    torch.testing.assert_close(squared, distance.sort(1).values[:, :k].square())
    alone = [index.nearest(q, k, exact=False) for q in queries.split(1)]
    assert torch.equal(torch.cat([p for _, p in alone]), places)
    assert torch.equal(torch.cat([d for d, _ in alone]), squared)  # bit for bit


def test_of_equal_ones_the_first_is_found():
    z = torch.randn(3, DIM).repeat(4, 1)
    index = search.Index(z)
    index.here[:] = torch.arange(12) > 2
    index.look()
    assert index.nearest(z[:3], 2, exact=False)[1].tolist() == [[3, 6], [4, 7], [5, 8]]


def test_codes_find_what_exact_search_finds(monkeypatch):
    """Whether they are there from the start or since the memory outgrew exact search; lengths count."""
    monkeypatch.setattr(search, "EXACT", 1000)
    monkeypatch.setattr(search, "CANDIDATES", 200)
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(3001, 128, generator=rng) * torch.linspace(2, 0.1, 128)
    z *= 0.5 + torch.rand(3001, 1, generator=rng)
    edits, queries = (
        [Edit("i", f"t{i}", "y") for i in range(3001)],
        z[::100] + 0.1 * torch.randn(31, 128, generator=rng),
    )
    whole, grown = EditMemory(128), EditMemory(128)
    whole.add(edits, z)
    for part in (slice(0, 900), slice(900, 2500), slice(2500, 3001)):
        grown.add(edits[part], z[part])
    for memory in (whole, grown):
        distance, ids = memory.nearest(queries, 3)
        truth = memory.nearest(queries, 3, exact=True)
        assert torch.equal(ids[:, 0], truth[1][:, 0]) and torch.equal(distance[:, 0], truth[0][:, 0])
        assert (distance.diff(dim=1) >= 0).all() and (ids == truth[1]).float().mean() > 0.9
        memory.remove(ids[:, 0].tolist())
        again = memory.nearest(queries, 1)[1]
        assert not set(again.flatten().tolist()) & set(ids[:, 0].tolist())
        memory.undo()
        assert torch.equal(memory.nearest(queries, 3)[1], ids)
        memory.remove(range(3, 3001))  # fewer are left than are compared
        assert set(memory.nearest(queries[:1], 5)[1][0].tolist()) == {0, 1, 2}


@pytest.mark.parametrize("k", [1, 7, 60, 400])
def test_codes_find_as_many_as_are_asked_for(monkeypatch, k):
    """However many were removed, and though those were the nearest."""
    monkeypatch.setattr(search, "CANDIDATES", 16)
    monkeypatch.setattr(search, "EXACT", 700)
    z = torch.randn(4003, 33, generator=torch.Generator().manual_seed(k))
    index = search.Index(z)
    index.here[:] = torch.arange(4003) % 5 == 0
    nearest = index._codes.search(search._padded(z[:1]), 200)[1][0]
    index.here[nearest[1:]] = False
    index.look()
    squared, places = index.nearest(z[:50:5], k, exact=False)
    assert places.shape == (10, k) and index.here[places].all()
    assert (squared.diff(dim=1) >= 0).all() and all(len(row.unique()) == k for row in places)
    assert squared[0, 0] == 0 and places[0, 0] == 0


def test_what_is_few_again_is_searched_exactly_again(monkeypatch):
    """However many there have been: after an undo all is as before."""
    monkeypatch.setattr(search, "EXACT", 300)
    monkeypatch.setattr(search, "CANDIDATES", 1)
    z = torch.randn(400, 100, generator=torch.Generator().manual_seed(0))
    queries, memory = torch.randn(50, 100, generator=torch.Generator().manual_seed(1)), EditMemory(100)
    memory.add(edits(300), z[:300])
    before = memory.nearest(queries)
    memory.add(edits(100, 300), z[300:])
    assert not torch.equal(memory.nearest(queries)[1], memory.nearest(queries, exact=True)[1])
    memory.undo()
    assert all(torch.equal(a, b) for a, b in zip(before, memory.nearest(queries), strict=True))


@pytest.mark.parametrize("most", [16, 1000])
def test_no_queries_find_nothing_and_broken_ones_are_refused(monkeypatch, most):
    monkeypatch.setattr(search, "EXACT", most)
    memory = filled(20)
    assert [tuple(x.shape) for x in memory.nearest(torch.empty(0, DIM))] == [(0, 1), (0, 1)]
    with pytest.raises(ValueError, match="not finite"):
        memory.nearest(torch.full((1, DIM), torch.nan))
    with pytest.raises(ValueError, match=r"of edits \[1\] are not finite"):  # its squared length is infinite
        memory.add(edits(2), torch.tensor([[1.0], [1e30]]).expand(2, DIM))
