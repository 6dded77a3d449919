"""Look-alikes: mirrored pairs, held out, the same bytes; and what a memory makes of them."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from mscke.benchmark.generate import generate, side
from mscke.benchmark.look_alike import load_look_alikes, look_alike, pair
from mscke.benchmark.scenes import KINDS, KNOWN, RECORD_FOLD, fold
from mscke.benchmark.write import write_records
from mscke.classifier import ScopeClassifier
from mscke.config import get_track
from mscke.editors.mscke import MSCKE
from mscke.evaluation.look_alike import answered_among, by_similarity, cell_vectors, entity_similarity, routed_among
from mscke.evaluation.metrics import ROLES
from mscke.evaluation.outcomes import answered, own_scores
from mscke.fetching.track import load_benchmark
from mscke.training.scope import encode_records

pytest_plugins = ["tiny"]
PAIRS = 6


@pytest.fixture(scope="module")
def pairs():
    return [pair(i) for i in range(PAIRS)]


@pytest.fixture(scope="module")
def track(tmp_path_factory):
    name = str(tmp_path_factory.mktemp("track"))
    return dataclasses.replace(get_track("smoke"), name=name, n_train=4, n_test=32)


@pytest.fixture(scope="module")
def alike(track):
    return load_look_alikes(track)


@pytest.fixture
def classifier(clip_name, encoder):
    torch.manual_seed(4)
    return ScopeClassifier(clip_name, fusion="grounded", width=16, encoder=encoder).eval()


def test_a_look_alike_is_of_the_same_category():
    for kind in KNOWN:
        other = look_alike(kind)
        assert other != kind and other in KNOWN and KINDS[other].category == KINDS[kind].category


def test_pairs_mirror_each_other(pairs):
    for (a, first), (b, second) in pairs:
        cell, changed = (first["meta"]["cell"], {e.cell for e, f in zip(a.entities, b.entities, strict=True) if e != f})
        (other,) = changed - {cell}
        assert (a.at(cell).kind, a.at(other).kind) == (b.at(other).kind, b.at(cell).kind)
        assert a.at(other).kind == look_alike(a.at(cell).kind)
        assert a == b.with_kind(cell, a.at(cell).kind).with_kind(other, a.at(other).kind)
        assert first["src"] == second["src"] and first["rephrase"] == second["rephrase"]
        assert first["alt"] != second["alt"]


def test_they_are_held_out_of_training(pairs):
    for made in pairs:
        for scene, _ in made:
            assert fold(scene) in RECORD_FOLD and side(scene) == "test"


def test_the_same_bytes_and_no_other_file_is_touched(track, alike, tmp_path):
    records = load_benchmark(track).test
    before = {p: p.read_bytes() for p in track.data.rglob("*") if p.is_file()}
    again = dataclasses.replace(track, name=str(tmp_path))
    generate(again.data, "train", 4), generate(again.data, "test", 32)
    assert len(load_look_alikes(again)) == len(alike) == 8
    assert {p.relative_to(track.data): b for p, b in before.items()} == {
        p.relative_to(again.data): p.read_bytes() for p in again.data.rglob("*") if p.is_file()
    }
    assert len(records) == 32 and not {r.edit.image for r in records} & {r.edit.image for r in alike}


def test_interrupted_leaves_no_json(tmp_path):
    def stop(number):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_records(tmp_path / "look_alike_data.json", 2, stop)
    assert not list(tmp_path.iterdir())


def test_questions_ask_about_the_edited_entity_and_its_look_alike(alike):
    for record in alike:
        meta = json.loads(json.dumps(record.meta))
        kinds = {e["cell"]: e["kind"] for e in meta["scene"]["entities"]}
        assert kinds[meta["cell"]] == meta["original"] != meta["edited"] == record.edit.answer
        assert meta["hardness"]["out_of_scope"] == "look_alike"
        if meta["attribute"]["out_of_scope"] == "name":
            assert record.out_of_scope_answer == look_alike(meta["original"]) or meta["original"] == look_alike(
                record.out_of_scope_answer
            )


def test_an_entity_is_compared_with_all_others_and_not_with_itself(encoder, alike):
    found = entity_similarity(encoder, alike)
    cells = cell_vectors(encoder, [r.edit.image for r in alike]).double()
    own = [cells[i, r.meta["cell"]] for i, r in enumerate(alike)]
    for i, record in enumerate(alike):
        others = [e["cell"] for e in record.meta["scene"]["entities"] if e["cell"] != record.meta["cell"]]
        assert found["image"][i] == pytest.approx(max(float(own[i] @ cells[i, c]) for c in others), abs=1e-5)
        strangers = [float(own[i] @ own[j]) for j in range(len(alike)) if j != i]
        assert found["memory"][i] == pytest.approx(max(strangers), abs=1e-5)


def test_cells_are_means_of_their_patches(encoder, alike):
    path = alike[0].edit.image
    row = encoder.images([path])
    patches = torch.nn.functional.normalize(encoder.images.columns[1][row][0] @ encoder.model.visual.proj, dim=-1)
    corner = patches.unflatten(0, (6, 6))[4:, 4:].flatten(0, 1).mean(0)  # 6 × 6 patches: 2 × 2 a cell
    expected = torch.nn.functional.normalize(corner, dim=-1)
    torch.testing.assert_close(cell_vectors(encoder, [path])[0, 8], expected)


def test_routing_among_many_is_the_routers(classifier, alike):
    scores = np.sort(_rho(classifier, alike).max(1))
    for threshold in (0.0, float(scores[len(scores) // 2]), 1.1):
        rho, own, other = routed_among(classifier, alike, threshold)
        np.testing.assert_allclose(rho, own_scores(classifier, alike), rtol=1e-6)
        router = MSCKE(None, None, classifier, threshold=threshold).edit(alike).router
        for i, record in enumerate(alike):
            edit = router.route(list(record.queries.values())).edit_id.tolist()
            assert own[i].tolist() == [e == i for e in edit]
            assert other[i].tolist() == [e not in (i, -1) for e in edit]


def _rho(classifier, records):
    edits, queries = encode_records(classifier, records)
    with torch.inference_mode():
        return classifier.similarity(classifier(queries), classifier(edits)).numpy()


def test_what_another_edit_takes_is_wrong():
    rng = np.random.default_rng(0)
    values, own = rng.random((9, len(ROLES), 2)), rng.random((9, len(ROLES))) < 0.5
    other = ~own & (rng.random(own.shape) < 0.5)
    found = answered_among(values, own, other)
    assert np.array_equal(answered_among(values, own, np.zeros_like(own)), answered(values, own))
    assert not found[:, :5][other].any()
    assert np.array_equal(found[:, :5][~other], answered(values, own)[:, :5][~other])


def test_groups_along_similarity_are_equal_and_ordered():
    similarity = np.random.default_rng(1).random(20)
    groups = by_similarity(np.arange(20), similarity, 4)
    assert [len(values) for _, values in groups] == [5] * 4
    assert [mean for mean, _ in groups] == sorted(mean for mean, _ in groups)
    assert sorted(np.concatenate([values for _, values in groups])) == list(range(20))
    for mean, values in groups:
        assert mean == pytest.approx(similarity[values].mean())
