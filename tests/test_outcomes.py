"""A lookup gives exactly what asking the edited model gives, whatever the classifier and its threshold."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from mscke.benchmark.sample import Query
from mscke.classifier import ScopeClassifier
from mscke.config import get_track
from mscke.editors.mscke import MSCKE
from mscke.evaluation import run
from mscke.evaluation.metrics import METRICS, ROLES
from mscke.evaluation.outcomes import COLUMNS, answered, outcomes, own_scores, scope_scores, vision_probes, with_images
from mscke.evaluation.protocol import evaluate
from mscke.models.counterfactual import CounterfactualModel
from mscke.report.tables import summarise

pytest_plugins = ["tiny"]

PROTOCOLS = ("generated", "teacher_forced")
ROWS = ["protocol", "record", "metric", "value", "strict", "question", "expected", "answer"]


@pytest.fixture(scope="module")
def few(records):
    return records[:4]


@pytest.fixture(scope="module")
def in_scope(mllm):
    torch.manual_seed(3)
    return CounterfactualModel.beside(mllm).eval()


@pytest.fixture(scope="module")
def both(mllm, in_scope, few):
    return outcomes(mllm, in_scope, few, PROTOCOLS)


@pytest.fixture(params=["text", "dot"])
def classifier(request, clip_name, encoder):
    torch.manual_seed(11)
    return ScopeClassifier(clip_name, fusion=request.param, width=16, encoder=encoder).eval()


def test_a_lookup_is_evaluate_row_for_row(mllm, in_scope, few, both, classifier):
    rho = own_scores(classifier, few)
    thresholds = [0.0, *np.quantile(rho, (0.3, 0.7)), 1.1]
    taken = set()
    for threshold in thresholds:
        direct = evaluate(MSCKE(mllm, in_scope, classifier, threshold=threshold), mllm, few, "tiny")
        found = both.rows(rho >= threshold)
        pd.testing.assert_frame_equal(found[ROWS], direct[ROWS])
        taken.add(int((rho >= threshold).sum()))
        summary = summarise(direct).set_index(["protocol", "metric"])["value"]
        for protocol in PROTOCOLS:
            looked_up = 100 * answered(both.values(protocol), rho >= threshold).mean(0)
            np.testing.assert_allclose(looked_up, summary[protocol].loc[list(COLUMNS)], atol=1e-9)
    assert min(taken) == 0 and max(taken) == rho.size and len(taken) == 4


def test_what_is_left_is_unchanged_and_values_stand_by_record_and_role(both, few):
    for protocol in PROTOCOLS:
        values = both.values(protocol)
        assert values.shape == (len(few), 5, 2)
        assert (values[:, 3:, 0] == 1).all()
        rows = both.taken[both.taken["protocol"] == protocol].set_index(["record", "metric"])["value"]
        for i, record in enumerate(few):
            for j, role in enumerate(ROLES):
                assert values[i, j, 1] == rows[record.id, METRICS[role]]


def test_answers_are_asked_once_and_kept(mllm, in_scope, few, both, tmp_path, monkeypatch):
    track = dataclasses.replace(get_track("smoke"), name=str(tmp_path))
    bench = SimpleNamespace(test=few)
    more = "others", few[1:3]
    monkeypatch.setattr(run.build, "answerer", lambda *_: in_scope)
    found = [run.both_ways(track, bench, mllm, "counterfactual", "key", others) for others in (None, more)]
    expected = both, outcomes(mllm, in_scope, more[1])
    monkeypatch.setattr(run.build, "answerer", None)  # who would ask again fails
    again = [run.both_ways(track, bench, mllm, "counterfactual", "key", others) for others in (None, more)]
    for a, b, c in zip(found, expected, again, strict=True):
        for side in ("left", "taken"):
            pd.testing.assert_frame_equal(getattr(a, side), getattr(b, side))
            pd.testing.assert_frame_equal(getattr(a, side), getattr(c, side))


def test_what_was_measured_is_not_measured_again(tmp_path):
    track = dataclasses.replace(get_track("smoke"), name=str(tmp_path))
    numbers = iter(range(2))
    first, second = (run.kept(track, "times", lambda: pd.DataFrame({"ms": [next(numbers)]})) for _ in "ab")
    assert first.ms.tolist() == second.ms.tolist() == [0]
    assert run.kept(track, "other times", lambda: pd.DataFrame({"ms": [next(numbers)]})).ms.tolist() == [1]


@pytest.mark.parametrize("damage", [b"", b"PAR1 and no more"])
def test_damaged_rows_are_named_and_made_anew(tmp_path, damage):
    track = dataclasses.replace(get_track("smoke"), name=str(tmp_path))
    rows = run.kept(track, "times", lambda: pd.DataFrame({"ms": [1]}))
    (path,) = Path(track.outputs).rglob("times.parquet")
    path.write_bytes(damage)
    with pytest.warns(UserWarning, match=r"times\.parquet is damaged and is made anew"):
        again = run.kept(track, "times", lambda: pd.DataFrame({"ms": [1]}))
    pd.testing.assert_frame_equal(rows, again)


def test_answered_by_hand():
    values = np.array([[[0, 1], [0, 1], [0.2, 0.8], [1, 0], [1, 0.5]]])
    routed = np.array([[True, False, True, True, False]])
    np.testing.assert_allclose(answered(values, routed), [[1, 0, 0.8, 0, 1, 0.4]])


def test_own_scores_are_those_of_the_router(classifier, few, mllm, in_scope):
    rho = own_scores(classifier, few)
    np.testing.assert_allclose(rho.ravel(), scope_scores(classifier, few)["rho"], atol=1e-6)
    for i, record in enumerate(few):
        route = MSCKE(mllm, in_scope, classifier).edit([record]).router.route(list(record.queries.values()))
        np.testing.assert_allclose(rho[i], route.rho, atol=1e-5)


def test_only_visual_inputs_change_their_image(records):
    image = {r.edit.image: f"{r.edit.image}.other" for r in records}
    for r, swapped in zip(records, with_images(records, image), strict=True):
        other = image[r.edit.image]
        assert swapped.edit == dataclasses.replace(r.edit, image=other)
        for role, query in r.queries.items():
            image_now = None if role == "locality" else other
            assert swapped.queries[role] == Query(query.question, image_now)
        assert swapped.answers == r.answers


def test_vision_probes(records, tmp_path):
    probes = vision_probes(records, tmp_path / "new" / "blank.png")
    with Image.open(probes["blank_image"][0].edit.image) as blank, Image.open(records[0].edit.image) as first:
        assert blank.size == first.size and len(blank.getcolors()) == 1
    assert len({r.edit.image for r in probes["blank_image"]}) == 1
    others = [r.edit.image for r in probes["other_image"]]
    assert sorted(others) == sorted(r.edit.image for r in records)
    assert all(o != r.edit.image for o, r in zip(others, records, strict=True))


@pytest.mark.parametrize("fusion, sees", [("text", False), ("dot_pooled", False), ("dot", True), ("cross", True)])
def test_the_released_form_is_blind_to_a_probe_of_both_sides(clip_name, encoder, records, tmp_path, fusion, sees):
    torch.manual_seed(12)
    classifier = ScopeClassifier(clip_name, fusion=fusion, width=16, encoder=encoder).eval()
    plain = own_scores(classifier, records)[:, :4]  # not the text-only query, which has no image to cancel
    for probe in vision_probes(records, tmp_path / "blank.png").values():
        moved = np.abs(own_scores(classifier, probe)[:, :4] - plain).max()
        assert moved > 1e-4 if sees else moved < 1e-5
        asked = np.abs(own_scores(classifier, records, probe)[:, :4] - plain).max()
        assert (asked > 1e-5) == (fusion != "text")
