"""The memory on disk: what a kill leaves, who may write, what is refused, what an undo gives back."""

import multiprocessing
import random
import signal
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from writer import BATCH, DIM, change, content, hold, write

from mscke import search
from mscke.benchmark.sample import Edit, Query
from mscke.classifier import ScopeClassifier
from mscke.editors.mscke import RoutedModel
from mscke.memory import EditMemory
from mscke.models.counterfactual import CounterfactualModel
from mscke.models.mllm import MLLM
from mscke.router import ScopeRouter
from mscke.store import Change

pytest_plugins = ["tiny"]
KILLS = 50


@pytest.fixture(scope="session")
def processes():
    """Starts processes that have imported what they need: a kill then falls into the writing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mscke.memory"])  # forked, not imported 50 times
    return context


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(b"a picture's bytes")
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "memory"


@pytest.fixture
def written(path, image):
    """A memory of twelve changes, closed."""
    memory = EditMemory.open(path, "abc", DIM)
    for _ in range(12):
        change(memory, image)
    memory.close()
    return memory


def same(a, b):
    assert (a.dim, a.fingerprint, a.log()) == (b.dim, b.fingerprint, b.log())
    assert torch.equal(a.ids, b.ids) and torch.equal(a.embeddings, b.embeddings)
    assert [a[i] for i in a.ids.tolist()] == [b[i] for i in b.ids.tolist()]


def acknowledged(folder):
    file = folder / "acknowledged"
    return [int(line) for line in file.read_text().split()] if file.exists() else []


# ------------------------------------------------------------------------------- durable


@pytest.mark.slow
def test_whatever_was_acknowledged_survives_a_kill(tmp_path, path, image, processes):
    """At random points: of the start in every other round, of the writing in the rest."""
    rng, again, rounds = random.Random(0), EditMemory(DIM, "abc"), []
    for i in range(KILLS):
        before = len(acknowledged(tmp_path))
        writer = processes.Process(target=write, args=(tmp_path, image))
        writer.start()
        while i % 2 and len(acknowledged(tmp_path)) == before and writer.is_alive():
            time.sleep(0.005)
        writer.join(rng.uniform(0.0, 0.1 if i % 2 else 0.6))
        assert writer.exitcode is None, "the writer stopped by itself"
        writer.kill()
        writer.join()
        told = acknowledged(tmp_path)
        rounds.append(len(told) - before)
        check(path, again, image, told)
    assert sum(n > 0 for n in rounds) >= KILLS // 2


def check(path, again, image, told):
    """The memory is the one that the same changes make in RAM, and holds all that the writer was told of."""
    try:
        memory = EditMemory.open(path, "abc")  # the kernel took the lock from the dead
    except FileNotFoundError:  # killed before it began
        assert not told
        return
    while len(again.log()) < len(memory.log()):
        change(again, image)
    assert [c[:3] for c in memory.log()] == [c[:3] for c in again.log()]
    assert torch.equal(memory.ids, again.ids) and torch.equal(memory.embeddings, again.embeddings)
    assert [memory[i] for i in memory.ids.tolist()] == [again[i] for i in again.ids.tolist()]
    assert set(told) <= {c.version for c in memory.log()}  # more than told: killed before it could tell
    memory.close()


def test_a_failed_append_changes_nothing(path, image, monkeypatch):
    memory = EditMemory.open(path, "abc", DIM)
    change(memory, image)

    def full_disk(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(memory._store._table, "add", full_disk)
    with pytest.raises(OSError, match="no space"):
        change(memory, image)
    monkeypatch.undo()
    same(memory, EditMemory.open(path, read_only=True))
    assert len(memory) == BATCH and change(memory, image) == 2


def test_an_append_that_was_committed_and_then_failed_is_not_repeated(path, image, monkeypatch):
    """It raises, and the memory has the change: the next one is another version with other ids."""
    memory = EditMemory.open(path, "abc", DIM)
    append = memory._store.append

    def interrupted(*args):
        append(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(memory._store, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        change(memory, image)
    monkeypatch.undo()
    assert len(memory) == BATCH and change(memory, image) == 2
    memory.close()
    same(EditMemory.open(path), memory)


def test_an_interrupt_waits_for_the_change(path, image, monkeypatch):
    memory = EditMemory.open(path, "abc", DIM)
    add = memory._store._table.add
    monkeypatch.setattr(
        memory._store._table, "add", lambda rows: (signal.raise_signal(signal.SIGINT), add(rows))
    )
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it may be ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            change(memory, image)
    finally:
        signal.signal(signal.SIGINT, before)
    monkeypatch.undo()
    assert len(memory) == BATCH and change(memory, image) == 2
    memory.close()
    same(EditMemory.open(path), memory)


def test_small_files_that_cannot_be_put_together_are_no_failure(path, image, monkeypatch):
    def full_disk(**options):
        raise OSError("no space left on device")

    monkeypatch.setattr("mscke.store.FRAGMENTS", 2)
    memory = EditMemory.open(path, "abc", DIM)
    monkeypatch.setattr(memory._store._table, "optimize", full_disk)
    change(memory, image)
    with pytest.warns(UserWarning, match="could not be put together"):
        assert change(memory, image) == 2
    memory.close()
    same(EditMemory.open(path), memory)


def test_a_table_whose_changes_repeat_is_refused(path, image, written):
    store = EditMemory.open(path)._store
    store.append(Change(12, "remove", (0,), datetime.now(UTC)), (), None)
    store.close()
    with pytest.raises(ValueError, match="is damaged"):
        EditMemory.open(path)
    with pytest.raises(ValueError, match="is damaged"):  # and the lock was let go
        EditMemory.open(path)


def test_who_was_killed_while_making_a_table_bars_nobody(path, image):
    (path / "edits.lance" / "_transactions").mkdir(parents=True)
    (path / "edits.lance" / "_transactions" / "0-half.txn").write_bytes(b"half")
    with pytest.raises(FileNotFoundError, match="to begin one"):
        EditMemory.open(path, read_only=True)
    memory = EditMemory.open(path, "abc", DIM)
    assert change(memory, image) == 1
    memory.close()
    same(EditMemory.open(path), memory)


def test_what_is_read_is_what_was_written(path, written):
    same(EditMemory.open(path, "abc", DIM), written)


def test_ids_are_not_given_again(path, image, written):
    n = sum(len(c.ids) for c in written.log() if c.change == "add")
    memory = EditMemory.open(path, "abc")
    memory.remove(memory.ids[-1:].tolist())
    memory.undo()
    memory.undo()
    memory.close()
    assert EditMemory.open(path, "abc").add(*content(99, image)) == list(range(n, n + BATCH))


def test_many_small_changes_are_put_together(path, image, monkeypatch):
    monkeypatch.setattr("mscke.store.FRAGMENTS", 4)
    memory = EditMemory.open(path, "abc", DIM)
    for _ in range(9):
        change(memory, image)
    assert memory._store._table.stats()["fragment_stats"]["num_fragments"] <= 4
    memory.close()
    same(EditMemory.open(path), memory)


# ------------------------------------------------------------------------------- one writer, many readers


def test_a_second_writer_is_refused_and_loses_nothing(path, image, written, processes):
    ready, done = processes.Event(), processes.Event()
    other = processes.Process(target=hold, args=(path, ready, done))
    other.start()
    assert ready.wait(60)
    with pytest.raises(BlockingIOError, match=r"is being written by another; .* read_only=True"):
        EditMemory.open(path, "abc")
    reader = EditMemory.open(path, "abc", read_only=True)
    same(reader, written)
    with pytest.raises(PermissionError, match="opened for reading"):
        change(reader, image)
    same(reader, written)
    done.set()
    other.join(60)
    assert change(EditMemory.open(path, "abc"), image) == 13


def test_a_closed_memory_lets_others_in_whatever_was_forked(path, image, written):
    memory = EditMemory.open(path)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()  # has the lock's file, too
    memory.close()
    try:
        other = EditMemory.open(path)
    finally:
        child.kill()
    assert change(other, image) == 13
    with pytest.raises(PermissionError, match="or is closed"):
        change(memory, image)


def test_a_reader_sees_the_memory_as_it_was_opened(path, image, written):
    reader, memory = EditMemory.open(path, read_only=True), EditMemory.open(path)
    change(memory, image)
    same(reader, written)
    same(EditMemory.open(path, read_only=True), memory)


# ------------------------------------------------------------------------------- guarded


def test_another_classifiers_memory_is_refused(path, written):
    with pytest.raises(ValueError, match=r"written by classifier abc, not xyz: .*embed_again\(classifier"):
        EditMemory.open(path, "xyz")
    with pytest.raises(ValueError, match="of width 8, not 9"):
        EditMemory.open(path, "abc", 9)
    same(EditMemory.open(path), written)  # refusing let go of the lock


@pytest.mark.parametrize("read_only", [True, False])
def test_there_is_no_memory_to_open(path, read_only):
    with pytest.raises(FileNotFoundError, match="to begin one"):
        EditMemory.open(path, read_only=read_only)
    assert not path.exists()


def test_an_edit_without_its_image_is_refused(path, tmp_path):
    memory = EditMemory.open(path, "abc", DIM)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png cannot be read; nothing was stored"):
        memory.add([Edit(str(tmp_path / "nowhere.png"), "t", "y")], torch.zeros(1, DIM))
    assert len(memory) == 0 == len(EditMemory.open(path, read_only=True))


def test_a_lost_image_comes_from_the_memory(path, image, written):
    image.unlink()
    memory = EditMemory.open(path)
    first = memory[int(memory.ids[0])]
    assert Path(first.image).read_bytes() == b"a picture's bytes" and Path(first.image).parent.parent == path
    assert first.prompt == written[int(written.ids[0])].prompt


def test_each_lost_image_comes_back_to_its_own_edits(path, tmp_path, monkeypatch):
    monkeypatch.setattr("mscke.store.AT_ONCE", 2)
    pictures = [tmp_path / f"{i}.png" for i in range(5)]
    for i, picture in enumerate(pictures):
        picture.write_bytes(bytes([i]))
    memory = EditMemory.open(path, "abc", DIM)
    memory.add([Edit(str(pictures[i % 5]), f"t{i}", "y") for i in range(10)], torch.randn(10, DIM))
    memory.close()
    for picture in pictures[1:]:
        picture.unlink()
    again = EditMemory.open(path, read_only=True)
    assert [Path(again[i].image).read_bytes() for i in range(10)] == [bytes([i % 5]) for i in range(10)]
    assert again[0].image == str(pictures[0])


def test_edits_are_embedded_again(path, tmp_path, classifier, records):
    old = remember(path, classifier, records, fingerprint="of another")
    old.remove([1])
    new = old.embed_again(classifier, tmp_path / "new")
    fresh = remember(tmp_path / "fresh", classifier, [records[0], *records[2:]])
    new.close()
    reopened = EditMemory.open(tmp_path / "new", classifier.fingerprint())
    assert torch.equal(reopened.embeddings, fresh.embeddings)
    assert [reopened[i] for i in range(len(records) - 1)] == [fresh[i] for i in range(len(records) - 1)]
    reopened.close()
    with pytest.raises(FileExistsError, match=r"there is a memory at .*new already"):
        old.embed_again(classifier, tmp_path / "new")
    assert len(EditMemory.open(tmp_path / "new")) == len(records) - 1


# ------------------------------------------------------------------------------- versioned


@pytest.fixture(scope="module")
def classifier(clip_name, encoder):
    torch.manual_seed(7)
    return ScopeClassifier(clip_name, width=16, encoder=encoder).eval()


def remember(path, classifier, records, fingerprint=None):
    memory = EditMemory.open(path, fingerprint or classifier.fingerprint(), classifier.dim)
    learn(memory, classifier, records)
    return memory


def learn(memory, classifier, records):
    prompts = [Query(r.edit.prompt, r.edit.image) for r in records]
    return memory.add([r.edit for r in records], classifier.embed(prompts, [r.edit.answer for r in records]))


def test_after_an_undo_the_model_answers_as_before(path, classifier, mllm, records, queries, gold):
    memory = remember(path, classifier, records[:6])
    in_scope, logits = CounterfactualModel.beside(mllm).eval(), []
    rho = classifier.similarity(classifier.embed(queries), memory.embeddings).amax(1)
    model = RoutedModel(mllm, in_scope, ScopeRouter(classifier, memory, float(rho.median())))
    hooks = [
        part.register_forward_hook(lambda module, given, found: logits.append(found.logits))
        for part in (mllm.model.language_model, in_scope.language_model)
    ]

    def ask():
        logits.clear()
        model.base = MLLM(mllm.model, mllm.tokenizer, mllm.name)  # remembers no answer
        route, forced = model.router.route(queries), model.force(queries, gold)
        return route.edit_id, route.rho, *logits, *(torch.from_numpy(f.top) for f in forced)

    before = ask()
    learn(memory, classifier, records[6:])
    after = ask()
    memory.undo()
    back = ask()
    memory.close()
    model.router.memory = EditMemory.open(path, classifier.fingerprint()).at(1)
    past = ask()
    for hook in hooks:
        hook.remove()
    assert not torch.equal(before[0], after[0])
    for found in (back, past):
        assert len(found) == len(before)
        assert all(torch.equal(a, b) for a, b in zip(before, found, strict=True))


# ------------------------------------------------------------------------------- by codes


def test_a_memory_opened_again_is_searched_by_the_same_codes(path, image, monkeypatch):
    monkeypatch.setattr(search, "EXACT", 1000)
    monkeypatch.setattr(search, "CANDIDATES", 40)
    monkeypatch.setattr(search, "BLOCK", 8)
    torch.manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(2000, 128), dim=-1)
    memory = EditMemory.open(path, "abc", 128)
    for part in (slice(0, 600), slice(600, 1100), slice(1100, 2000)):  # its codes are made on the way
        memory.add([Edit(str(image), f"t{i}", "y") for i in range(2000)[part]], z[part])
    memory.remove([5])
    queries = z[:20] + 0.02 * torch.randn(20, 128)
    found = memory.nearest(queries, 3)
    memory.close()
    again = EditMemory.open(path, read_only=True).nearest(queries, 3)
    assert 5 not in found[1] and all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
