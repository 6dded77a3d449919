"""Many classifiers: the same bytes whatever the number of processes, each trained once, each as specified."""

import dataclasses
import sys
from contextlib import contextmanager

import pytest
import torch

from mscke.classifier import ScopeClassifier
from mscke.config import get_track
from mscke.editors import build, grid
from mscke.editors.grid import SUPERVISION, Shared, Spec, train_grid
from mscke.fetching.track import load_benchmark
from mscke.system.workers import in_processes, one_thread
from mscke.training import checkpoint
from mscke.training import scope as training

pytest_plugins = ["tiny"]

SPECS = [
    Spec(),
    Spec(seed=1),
    Spec(fusion="cross", encoder="MiniLM+tiny"),
    Spec(fusion="text", encoder="MiniLM", supervision="released"),
]


@pytest.fixture(scope="module")
def track(clip_name, tmp_path_factory):
    """A track of two dozen records whose outputs lie in a temporary folder: an absolute name does it."""
    smoke, name = get_track("smoke"), str(tmp_path_factory.mktemp("track"))
    return dataclasses.replace(smoke, name=name, n_train=24, n_test=4, clips={"tiny": clip_name}, clip="tiny")


@pytest.fixture
def copy(track, tmp_path):
    """The same track with nothing trained yet."""
    (tmp_path / "data").symlink_to(track.data)
    return dataclasses.replace(track, name=str(tmp_path))


@pytest.fixture(scope="module")
def trained(track):
    return train_grid(track, SPECS)


def files(track, spec):
    return [(spec.folder(track) / name).read_bytes() for name in ("model.safetensors", "curve.csv")]


def test_the_number_of_workers_changes_no_byte(track, trained, copy):
    one = train_grid(copy, SPECS, workers=1)
    for spec in SPECS:
        assert files(copy, spec) == files(track, spec)
        assert one[spec].fingerprint() == trained[spec].fingerprint()
    assert len({c.fingerprint() for c in trained.values()}) == len(SPECS)


def test_what_is_trained_is_read(track, trained, monkeypatch):
    monkeypatch.setattr(grid, "in_processes", lambda *_: pytest.fail("trained again"))
    again = train_grid(track, SPECS)
    assert [again[s].fingerprint() for s in SPECS] == [trained[s].fingerprint() for s in SPECS]
    assert not any(c.training for c in again.values())


def test_one_specification_given_twice_is_trained_once(copy, monkeypatch):
    asked = []
    monkeypatch.setattr(grid, "in_processes", lambda function, items, *_: asked.extend(items))
    train_grid(copy, [Spec(), Spec(encoder="tiny"), Spec(seed=1)])
    assert [spec.seed for _, spec in asked] == [0, 1]


@pytest.fixture
def here(monkeypatch):
    """Train in this process, set up as a worker is."""
    one_thread()
    monkeypatch.setattr(grid, "in_processes", lambda function, items, *_: [function(*i) for i in items])
    yield
    torch.set_flush_denormal(False)


def test_an_unfinished_run_goes_on(copy, trained, monkeypatch, here):
    spec, replacing, written = SPECS[0], checkpoint.replacing, []

    @contextmanager
    def interrupted(path):
        with replacing(path) as whole:
            yield whole
        written.append(path.name)
        if len(written) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(checkpoint, "replacing", interrupted)
        train_grid(copy, [spec])
    assert set(written) == {"checkpoint.pt", "model.safetensors", "curve.csv"}  # of the first epoch of two
    assert train_grid(copy, [spec])[spec].fingerprint() == trained[spec].fingerprint()


def test_folders_are_told_apart_and_are_those_of_the_main_results():
    track = get_track("mini")
    records = Shared.of(get_track("smoke")).bench.train[:2]
    specs = [Spec(f, s, e, u, b, seed) for f in ("dot", "text") for s in ("logistic", "exponential")
             for e in ("mini-B", "", "MiniLM+mini-L") for u in SUPERVISION
             for b in (None, ("half", tuple(records))) for seed in (0, 1)]  # fmt: skip
    assert len({s.folder(track) for s in specs}) == len(specs)
    assert Spec().folder(track).name == "mscke-dot-logistic-mini-L-0"
    assert Spec(supervision="released", seed=2).folder(track).name == "mscke-dot-logistic-mini-L-released-2"
    assert Spec("text", encoder="MiniLM", supervision="released").folder(track).name == "serac-released-0"


def test_each_is_trained_as_specified(track, trained, tmp_path):
    """By hand, without the grid: the same weights."""
    shared = Shared.of(track)
    for spec, name in ((SPECS[1], "tiny"), (SPECS[3], "MiniLM")):
        encoder = shared.encoder(name)
        torch.manual_seed(spec.seed)
        classifier = ScopeClassifier("x", fusion=spec.fusion, encoder=encoder)
        training.train_classifier(
            classifier, shared.bench.train, shared.bench.validation, tmp_path / name,
            track.classifier_epochs, seed=spec.seed, **SUPERVISION[spec.supervision],
        )  # fmt: skip
        for mine, theirs in zip(classifier.parameters(), trained[spec].parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


def test_a_mixed_encoder_reads_one_text_and_sees_the_others_image(track, trained):
    shared, record = Shared.of(track), Shared.of(track).bench.test[0]
    queries, answers = [record.in_scope, record.out_of_scope], ["owl", "yes"]
    mixed, clip, text = (shared.encoder(n)(queries, answers) for n in ("MiniLM+tiny", "tiny", "MiniLM"))
    assert torch.equal(mixed.text, text.text) and mixed.text.shape[1] == 384
    for name in ("image", "pooled", "tokens", "cosine"):
        assert torch.equal(getattr(mixed, name), getattr(clip, name))


def _loaded(track_name):
    return id(load_benchmark(get_track(track_name)))


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forks on Linux only")
def test_a_worker_begins_with_what_is_loaded():
    here = load_benchmark(get_track("smoke"))
    assert in_processes(_loaded, [("smoke",)] * 3) == [id(here)] * 3


def test_images_that_were_encoded_ahead_are_not_encoded_again(copy, trained, monkeypatch):
    records = load_benchmark(copy)
    build.encode_images(copy, records, "tiny")
    encoder = grid.load_clip(copy, "tiny", copy.features)
    monkeypatch.setattr(encoder.images, "compute", lambda keys: pytest.fail(f"encoded again: {keys}"))
    for part in (records.train, records.validation, records.test):
        encoder.images([r.edit.image for r in part])
