"""The memory on disk: what a kill leaves, who may write, what is refused, what an undo gives back."""

import errno
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
import warnings
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import lancedb
import pyarrow as pa
import pytest
import torch
from writer import BATCH, DIM, change, content, hold, write

from mscke.benchmark.sample import Edit, Query
from mscke.classifier import ScopeClassifier
from mscke.editors.mscke import RoutedModel
from mscke.memory import EditMemory
from mscke.models.counterfactual import CounterfactualModel
from mscke.models.mllm import MLLM
from mscke.router import ScopeRouter
from mscke.storage import search
from mscke.storage.pictures import write_out
from mscke.storage.salvage import recover
from mscke.storage.store import Change

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
    monkeypatch.setattr(memory._store._table, "add", lambda rows: (signal.raise_signal(signal.SIGINT), add(rows)))
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

    monkeypatch.setattr("mscke.storage.store.FRAGMENTS", 2)
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


@pytest.fixture
def hurt(path, tmp_path):
    """Twelve edits by changes 1 to 4 and 5, twice: each on a picture of its own, and changes after that."""
    memory = EditMemory.open(path, "abc", DIM)
    for version in range(1, 4):
        memory.add(*own_pictures(tmp_path, version))
    memory.remove([1, 4])
    ids, store = tuple(range(9, 9 + BATCH)), memory._store
    for twice in (5, 6):
        store.append(Change(5, "add", ids, datetime.now(UTC)), *own_pictures(tmp_path, twice))
    store.append(Change(7, "remove", ids[:1], datetime.now(UTC)), (), None)
    store.append(Change(8, "add", (15, 16, 17), datetime.now(UTC)), *own_pictures(tmp_path, 8))
    memory.close()


def own_pictures(folder, version):
    edits, z = content(version, "")
    edits = [replace(e, image=str(folder / f"{version}.{i}.png")) for i, e in enumerate(edits)]
    for e in edits:
        Path(e.image).write_bytes(e.prompt.encode())
    return edits, z


def test_a_memory_that_was_hurt_says_what_is_left_and_gives_it_back(path, hurt, tmp_path):
    """All that stood before the damage and was added since; the removal since may have meant either of two."""
    message = (
        r"is damaged: .* Of 8 changes the first 5 are whole, and all 18 edits .* mscke\.storage\.salvage\.recover\("
    )
    with pytest.raises(ValueError, match=message):
        EditMemory.open(path)
    for i in range(BATCH):
        (tmp_path / f"6.{i}.png").unlink()  # of an id that was given twice
    with pytest.warns(UserWarning, match="1 removals or undos after its damage were not repeated"):
        memory = recover(path, tmp_path / "new")
    memory.close()
    memory, n = EditMemory.open(tmp_path / "new", "abc"), 16
    left = [f"{v}.{i}" for v in (1, 2, 3, 5, 6, 8) for i in range(BATCH) if (v, i) not in ((1, 1), (2, 1))]
    assert memory.ids.tolist() == list(range(n)) and sorted(memory[i].prompt[7:] for i in range(n)) == left
    for i in range(n):
        version, place = map(int, memory[i].prompt[7:].split("."))
        assert torch.equal(memory.embeddings[i], content(version, "")[1][place])
        assert Path(memory[i].image).read_bytes() == memory[i].prompt.encode()
    with pytest.raises(FileExistsError, match=r"there is a memory at .*new already"):
        memory.close()
        recover(path, tmp_path / "new")


def test_what_is_recovered_takes_no_others_place(path, image, tmp_path):
    """An edit that was undone comes back beside the one that stood, and does not replace it."""
    memory = EditMemory.open(path, "abc", DIM)
    for answer in ("right", "wrong"):
        memory.add([Edit(str(image), "What is it?", answer)], torch.ones(1, DIM))
    memory.undo()
    twice = Change(1, "add", (0,), datetime.now(UTC))
    memory._store.append(twice, [Edit(str(image), "Where?", "left")], torch.ones(1, DIM))
    memory.close()
    with pytest.warns(UserWarning, match="look through what is there"):
        found = recover(path, tmp_path / "new")
    assert sorted(found[i].answer for i in found.ids.tolist()) == ["left", "right", "wrong"]
    assert not found.log()[-1].replaced
    found.close()


def test_a_whole_memory_is_recovered_as_it_is(path, written, tmp_path):
    memory = recover(path, tmp_path / "new")
    assert [memory[i] for i in range(len(memory))] == [written[i] for i in written.ids.tolist()]
    assert torch.equal(memory.embeddings, written.embeddings)


# what a copy may lack, and what its error then says
DAMAGE = {
    "no _versions": (lambda table: shutil.rmtree(table / "_versions"), "lacks the manifests in _versions"),
    "no manifests": (lambda table: [f.unlink() for f in table.glob("_versions/*")], "lacks the manifests"),
    "no data": (lambda table: shutil.rmtree(table / "data"), "missing, cut off"),
    "a data file less": (lambda table: min(table.glob("data/*")).unlink(), "missing, cut off"),
    "a data file cut": (lambda table: os.truncate(min(table.glob("data/*")), 100), "missing, cut off"),
    "manifests cut": (lambda table: [os.truncate(f, 10) for f in table.glob("_versions/*")], "cut off"),
    "a file for a table": (lambda table: (shutil.rmtree(table), table.touch()), "lacks the manifests"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_copy_that_lacks_files_is_named_and_nothing_begun_over_it(path, written, case):
    damage, message = DAMAGE[case]
    damage(path / "edits.lance")
    before = files(path)
    for options in ({}, {"dim": DIM}, {"read_only": True}):
        with pytest.raises(ValueError, match=rf"^{path} is damaged: .*{message}"):
            EditMemory.open(path, "abc", **options)
    assert files(path) == before


def files(folder):
    """Every file and folder below, with its content and when it was changed."""
    return {p: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None) for p in (folder, *folder.rglob("*"))}


def test_a_copy_without_its_transactions_is_whole(path, image, written):
    shutil.rmtree(path / "edits.lance" / "_transactions")
    memory = EditMemory.open(path)
    same(memory, written)
    assert change(memory, image) == 13
    memory.close()
    same(EditMemory.open(path), memory)


def test_a_change_says_what_it_replaced(path, image, written):
    store = EditMemory.open(path)._store
    n = sum(len(c.ids) for c in written.log() if c.change == "add")
    entry = Change(13, "add", (n, n + 1, n + 2), datetime.now(UTC), (3, 0))
    store.append(entry, *content(13, image))
    store.close()
    assert EditMemory.open(path).log() == [*written.log(), entry]


def first_edition(path, image, versions=3):
    """A memory as the first edition wrote it, of so many changes: it kept no more of a picture than its bytes."""
    columns = {
        "version": pa.int64(), "change": pa.string(), "id": pa.int64(), "time": pa.timestamp("us", tz="UTC"),
        "image": pa.string(), "picture": pa.large_binary(), "prompt": pa.string(), "answer": pa.string(),
        "embedding": pa.list_(pa.float32(), DIM),
    }  # fmt: skip
    schema = pa.schema(columns.items(), metadata={"classifier": "abc"})
    table, memory = lancedb.connect(path).create_table("edits", schema=schema), EditMemory(DIM, "abc")
    for _ in range(versions):
        change(memory, image)
        (version, kind, ids, at), n = memory.log()[-1][:4], len(memory.log()[-1].ids)
        added, z = content(version, image) if kind == "add" else ([None] * n, [None] * n)
        texts = [[e and getattr(e, name) for e in added] for name in ("image", "prompt", "answer")]
        pictures = [e and image.read_bytes() for e in added]
        vectors = [v if v is None else v.tolist() for v in z]
        columns = [[version] * n, [kind] * n, ids, [at] * n, texts[0], pictures, *texts[1:], vectors]
        table.add(pa.table(columns, schema=schema))
    return memory


def test_a_memory_of_the_first_edition_is_read_and_written(path, image):
    memory = first_edition(path, image)
    same(EditMemory.open(path, read_only=True), memory)
    old = EditMemory.open(path, "abc")
    for _ in range(3):
        assert change(old, image) == change(memory, image)
    old.close()
    again = EditMemory.open(path, "abc")
    same(again, old)
    assert [c[:3] for c in again.log()] == [c[:3] for c in memory.log()]
    assert [again[i] for i in again.ids.tolist()] == [memory[i] for i in memory.ids.tolist()]


@pytest.mark.parametrize("grown", [True, False])
def test_a_picture_of_the_first_edition_is_compared_as_well(path, image, tmp_path, grown):
    first_edition(path, image)
    if grown:  # by a change of this edition
        memory = EditMemory.open(path)
        change(memory, image)
        memory.close()
    with warnings.catch_warnings(action="error"):
        assert EditMemory.open(path, read_only=True)[0].image == str(image)
    image.write_bytes(b"another picture")
    with pytest.warns(UserWarning, match=rf"{image} \(edit 0\)"):
        memory = EditMemory.open(path, read_only=True)
    assert Path(memory[0].image).read_bytes() == b"a picture's bytes"


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
    monkeypatch.setattr("mscke.storage.store.FRAGMENTS", 4)
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
    with pytest.raises(PermissionError, match="is closed"):
        change(memory, image)


def test_a_fork_of_the_writer_is_no_second_writer(path, image, written):
    memory, context = EditMemory.open(path), multiprocessing.get_context("fork")
    said = context.SimpleQueue()

    def try_it():
        try:
            change(memory, image)
        except PermissionError as error:
            said.put(str(error))

    child = context.Process(target=try_it)
    child.start()
    child.join(60)
    child.kill()  # LanceDB does not work in a fork: it may hang
    assert not said.empty() and "by another process" in said.get()
    assert change(memory, image) == 13


@pytest.mark.parametrize("durable", [True, False])
def test_threads_that_add_all_find_their_edits(path, image, durable):
    """And those that ask meanwhile see a memory between two changes."""
    n, each = 6, 8
    memory = EditMemory.open(path, "abc", DIM) if durable else EditMemory(DIM, "abc")
    memory.add(*content(0, image))
    barrier, told, failed, done = threading.Barrier(n + 2), {}, [], threading.Event()

    def add(thread):
        barrier.wait()
        for i in range(each):
            version = 1 + thread * each + i
            told[version] = memory.add(*content(version, image))

    def ask():
        barrier.wait()
        while not done.is_set():
            distances, ids = memory.nearest(torch.zeros(2, DIM), 1000)
            assert distances.isfinite().all() and ids.shape == distances.shape and ids.shape[1] % BATCH == 0
            assert len(memory.at(len(memory.log()))) % BATCH == 0 and memory[int(ids[0, -1])]

    def report(act, *args):
        try:
            act(*args)
        except BaseException as error:
            failed.append(error)

    writers = [threading.Thread(target=report, args=(add, i)) for i in range(n)]
    readers = [threading.Thread(target=report, args=(ask,)) for _ in range(2)]
    for thread in (*writers, *readers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    for thread in readers:
        thread.join()
    assert not failed
    if durable:
        memory.close()
        same(EditMemory.open(path), memory)
    assert len(told) == n * each and len(memory) == BATCH * (n * each + 1)
    for version, ids in told.items():
        edits, z = content(version, image)
        assert [memory[i] for i in ids] == edits and torch.equal(memory.embeddings[ids], z)


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("act", ["add", "remove", "undo", "nearest", "close"])
def test_who_comes_during_a_change_waits_for_its_end(path, image, monkeypatch, act, durable):
    memory = EditMemory.open(path, "abc", DIM) if durable else EditMemory(DIM, "abc")
    change(memory, image)
    acts = {
        "add": lambda: memory.add(*content(9, image)), "remove": lambda: memory.remove([3]), "undo": memory.undo,
        "nearest": lambda: memory.nearest(torch.zeros(1, DIM), 9)[1].shape, "close": memory.close,
    }  # fmt: skip
    found, enter = [], memory._changes.enter
    other = threading.Thread(target=lambda: found.append(acts[act]()))

    def in_the_middle(*entry):
        monkeypatch.undo()
        other.start()
        other.join(0.3)  # it gets this long to go wrong
        assert not found
        return enter(*entry)

    monkeypatch.setattr(memory._changes, "enter", in_the_middle)
    change(memory, image)
    other.join()
    after = {"add": [6, 7, 8], "remove": None, "undo": None, "nearest": (1, 6), "close": None}
    assert found == [after[act]]
    assert len(memory) == {"add": 9, "remove": 5, "undo": 3}.get(act, 6)
    if durable:
        memory.close()
        same(EditMemory.open(path), memory)


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
    monkeypatch.setattr("mscke.storage.store.AT_ONCE", 2)
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


def old(image, content, seconds=100):
    """The file shows this since so many seconds."""
    image.write_bytes(content)
    changed = time.time_ns() - seconds * 10**9
    os.utime(image, ns=(changed, changed))
    return changed


@pytest.mark.parametrize("read_only", [True, False])
@pytest.mark.parametrize("seconds", [0, 100])
def test_an_overwritten_picture_is_noticed_and_the_stored_one_shown(path, image, read_only, seconds):
    """Of the same length, too; and each edit on one path means the picture that it was stored with."""
    shown = [b"first", b"other", b"third"]
    memory = EditMemory.open(path, "abc", DIM)
    for i, picture in enumerate(shown):
        old(image, picture, seconds + 10 * (3 - i))
        memory.add([Edit(str(image), f"t{i}", "y")] * 2, torch.ones(2, DIM))
    memory.close()
    message = rf"{path}: 1 files show other pictures .* the edits keep the stored ones: {image} \(edit [02]\)$"
    with pytest.warns(UserWarning, match=message):
        memory = EditMemory.open(path, read_only=read_only)
    assert [Path(memory[i].image).read_bytes() for i in range(6)] == [b"first"] * 2 + [b"other"] * 2 + [b"third"] * 2
    assert memory[4].image == str(image) and memory[0].image == memory[1].image != memory[2].image
    assert Path(memory[0].image).suffix == ".png"


def test_a_file_is_trusted_by_its_size_and_time_once_they_tell_its_changes_apart(path, image):
    """What was changed within two seconds of being stored may be changed again without another time."""
    settled, fresh = image, image.with_name("fresh.png")
    at = {settled: old(settled, b"first"), fresh: old(fresh, b"first", 1)}
    memory = EditMemory.open(path, "abc", DIM)
    memory.add([Edit(str(i), "t", "y") for i in at], torch.ones(2, DIM))
    memory.close()
    for file, changed in at.items():
        file.write_bytes(b"other")
        os.utime(file, ns=(changed, changed))
    with pytest.warns(UserWarning, match=rf"1 files .*: {fresh} \(edit 1\)$"):
        memory = EditMemory.open(path)
    assert memory[0].image == str(settled) and Path(memory[1].image).read_bytes() == b"first"


def test_a_file_that_was_only_touched_is_the_same_picture(path, image, written):
    os.utime(image, ns=(0, 0))
    with warnings.catch_warnings(action="error"):
        memory = EditMemory.open(path)
    same(memory, written)


def test_what_is_no_file_any_more_is_a_lost_picture(path, image, written):
    image.unlink()
    image.mkdir()
    memory = EditMemory.open(path)
    assert Path(memory[int(memory.ids[0])].image).read_bytes() == b"a picture's bytes"


class Witness:
    """A classifier that says what it saw."""

    dim, within = DIM, 0.0

    def __init__(self):
        self.saw = []

    def fingerprint(self):
        return "witness"

    def embed(self, queries, answers):
        self.saw += [Path(q.image).read_bytes() for q in queries]
        return torch.zeros(len(queries), DIM)


def test_edits_are_embedded_again_with_their_stored_pictures(path, image, tmp_path, written):
    """Though the file was overwritten while the memory was open."""
    memory, witness = EditMemory.open(path), Witness()
    image.write_bytes(b"another picture")
    with pytest.warns(UserWarning, match=str(image)):
        new = memory.embed_again(witness, tmp_path / "new")
    assert witness.saw == [b"a picture's bytes"] * len(memory)
    new.close()
    new = EditMemory.open(tmp_path / "new")
    assert [Path(new[i].image).read_bytes() for i in range(len(new))] == witness.saw
    assert [new[i].prompt for i in range(len(new))] == [memory[i].prompt for i in memory.ids.tolist()]


# ------------------------------------------------------------------------------- its folder


def test_reading_writes_nothing_into_the_memorys_folder(path, image, tmp_path, written):
    """Which may lie where nothing can be written; a lost picture is shown all the same."""
    image.unlink()
    before = files(path)
    reader = EditMemory.open(path, "abc", read_only=True)
    past, picture = reader.at(1), Path(reader[int(reader.ids[0])].image)
    reader.embed_again(Witness(), tmp_path / "new").close()
    reader.close()
    assert files(path) == before
    assert picture.read_bytes() == b"a picture's bytes" == Path(past[0].image).read_bytes()


@pytest.mark.parametrize("number, kind", [(errno.EROFS, OSError), (errno.EACCES, PermissionError)])
def test_a_writer_that_may_not_write_is_told_how_to_read(path, written, monkeypatch, number, kind):
    def refuse(file, mode, **_):
        raise OSError(number, "no writing here", str(file))

    monkeypatch.setattr("mscke.storage.alone.open", refuse, raising=False)
    with pytest.raises(kind, match=rf"{path} cannot be written \(no writing here\).*read_only=True"):
        EditMemory.open(path)
    same(EditMemory.open(path, read_only=True), written)


@pytest.mark.parametrize("name", ["~/mem", "~", "~/mem/", "~/a/b"])
def test_the_home_is_one_folder_for_all_parts(tmp_path, image, monkeypatch, name):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir(), here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    memory = EditMemory.open(name, "abc", DIM)
    change(memory, image)
    memory.close()
    image.unlink()
    again = EditMemory.open(name, "abc")
    folder = home / name.strip("~/")
    assert {p.name for p in folder.iterdir()} == {"edits.lance", "writer.lock", "pictures"}
    assert Path(again[0].image).parent == folder / "pictures" and not list(here.iterdir())


def test_a_relative_path_stays_where_it_was_when_opened(tmp_path, image, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    memory = EditMemory.open("mem", "abc", DIM)
    change(memory, image)
    monkeypatch.chdir("elsewhere")
    change(memory, image)
    memory.embed_again(Witness(), "new").close()
    memory.close()
    assert {p.name for p in Path().iterdir()} == {"new"}
    same(EditMemory.open(tmp_path / "mem"), memory)


class Named:
    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return str(self.path)


@pytest.mark.parametrize("name", ["a b", "a#b", "a?b", "a%20b", "é", "a:b", "x/./~", "x/../b", "'", "*"])
def test_whatever_a_folder_is_called_its_parts_lie_in_it(tmp_path, image, name):
    memory = EditMemory.open(Named(tmp_path / name), "abc", DIM)
    change(memory, image)
    memory.close()
    assert {p.name for p in (tmp_path / name).iterdir()} == {"edits.lance", "writer.lock"}
    same(EditMemory.open(f"{tmp_path}/{name}/"), memory)


@pytest.mark.parametrize("name", ["s3://bucket/mem", "file:///mem", "db://mem", Path("gs://bucket/mem")])
@pytest.mark.parametrize("read_only", [True, False])
def test_an_address_is_no_folder(tmp_path, monkeypatch, name, read_only):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is an address; a memory lies in a folder of this machine"):
        EditMemory.open(name, "abc", DIM, read_only)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a\nb", "a\tb", "a\x7fb", "a\udcffb"])
def test_a_name_that_lancedb_cannot_read_is_refused_before_anything_is_begun(tmp_path, name):
    with pytest.raises(ValueError, match=r"has control characters or is not UTF-8; give .* another name"):
        EditMemory.open(tmp_path / name, "abc", DIM)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("read_only", [True, False])
def test_a_file_is_no_folder(image, read_only):
    with pytest.raises(NotADirectoryError, match=rf"{image} is a file; a memory lies in a folder"):
        EditMemory.open(image, "abc", DIM, read_only)


def test_a_folder_by_another_name_has_the_same_writer(path, tmp_path, image, written):
    (tmp_path / "link").symlink_to(path)
    memory = EditMemory.open(tmp_path / "link")
    with pytest.raises(BlockingIOError, match="is being written by another"):
        EditMemory.open(path)
    assert change(memory, image) == 13
    memory.close()
    same(EditMemory.open(path), memory)


# ------------------------------------------------------------------------------- embedded again


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


# ------------------------------------------------------------------------------- a folder that is gone


def test_a_closed_memory_lets_others_in_though_its_folder_was_moved(path, image, written):
    memory = EditMemory.open(path)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()  # it has the lock's file open
    try:
        moved = path.rename(path.with_name("moved"))
        memory.close()
        EditMemory.open(moved, dim=DIM).close()
    finally:
        child.kill()
        child.join()


@pytest.mark.parametrize("gone", ["removed", "moved", "another is there", "its lock removed"])
def test_who_has_lost_the_folder_writes_no_more(gone, path, image, tmp_path):
    """A change that is acknowledged is in what is at the path now."""
    memory = EditMemory.open(path, "abc", DIM)
    change(memory, image)
    if gone == "its lock removed":
        (path / "writer.lock").unlink()
    else:
        shutil.move(path, tmp_path / "elsewhere")
    if gone == "removed":
        shutil.rmtree(tmp_path / "elsewhere")
    if gone in ("another is there", "its lock removed"):
        other = EditMemory.open(path, "abc", DIM)
        change(other, image)
        n = len(other.log())
    with pytest.raises(PermissionError, match="moved or removed"):
        change(memory, image)
    memory.close()
    if gone in ("another is there", "its lock removed"):
        change(other, image)
        other.close()
        assert len(EditMemory.open(path, read_only=True).log()) == n + 1


@pytest.mark.parametrize("name", ["x.jpg?X-Amz-Signature=" + "a" * 215, "no suffix", "x.tar.gz", "ü.ürgend"])
def test_a_stored_picture_has_a_name_whatever_its_files_was(name, path, tmp_path):
    picture = tmp_path / name
    picture.write_bytes(b"a picture's bytes")
    memory = EditMemory.open(path, "abc", DIM)
    memory.add([Edit(str(picture), "t", "y")], torch.zeros(1, DIM))
    memory.close()
    picture.unlink()
    assert Path(EditMemory.open(path)[0].image).read_bytes() == b"a picture's bytes"


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to itself"])
def test_what_is_no_file_is_no_picture(kind, path, tmp_path):
    """And nothing waits for a pipe."""
    there = tmp_path / "there"
    {"folder": there.mkdir, "pipe": lambda: os.mkfifo(there), "link to itself": lambda: there.symlink_to(there)}[kind]()
    memory = EditMemory.open(path, "abc", DIM)
    with pytest.raises(FileNotFoundError, match="there cannot be read; nothing was stored"):
        memory.add([Edit(str(there), "t", "y")], torch.zeros(1, DIM))
    assert len(memory) == 0


@pytest.mark.parametrize("ids", [[1.9], "12", [None], ["1"]])
def test_ids_are_whole_numbers(ids, written, path):
    memory = EditMemory.open(path)
    before = memory.ids
    with pytest.raises(TypeError):
        memory.remove(ids)
    assert torch.equal(memory.ids, before)
    with pytest.raises(TypeError):
        memory[ids[0]]


@pytest.mark.parametrize(("queries", "k"), [((1, DIM), 0), ((1, DIM), -1), ((1, DIM + 1), 1), ((DIM,), 1)])
def test_a_search_that_cannot_be_meant_is_refused(queries, k, written, path):
    with pytest.raises(ValueError, match="give k of 1 or more"):
        EditMemory.open(path).nearest(torch.zeros(queries), k)


def test_a_disk_that_is_full_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"cannot be written \(No space left"):
        write_out(tmp_path / "pictures", b"a picture's bytes", "a.png")
    assert not any((tmp_path / "pictures").iterdir())
