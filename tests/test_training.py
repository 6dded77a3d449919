"""Training: the loss is the paper's, runs repeat byte by byte, and an interrupted one goes on."""

import math
import os

import pytest
import torch
from safetensors.torch import load_file

from mscke.classifier import SIMILARITIES, ScopeClassifier
from mscke.models.counterfactual import CounterfactualModel
from mscke.training import scope as training
from mscke.training.scope import (
    AS_RELEASED,
    FINE_GRAINED,
    ROLES,
    encode_records,
    scope_loss,
    train_classifier,
    train_counterfactual,
)

pytest_plugins = ["tiny"]


@pytest.fixture
def make(clip_name, encoder):
    def make(seed=0, similarity="logistic"):
        torch.manual_seed(seed)
        return ScopeClassifier(clip_name, similarity=similarity, width=8, encoder=encoder)

    return make


@pytest.fixture
def fit(records):
    """Train on eight records, validate on four."""

    def fit(classifier, folder, epochs=3, **settings):
        settings = {"batch_size": 3, "lr": 1e-2} | settings
        return train_classifier(classifier, records[:8], records[8:], folder, epochs, **settings)

    return fit


def files(folder):
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", "curve.csv")}


def interrupt(monkeypatch, module, name, at):
    """Let ``module.name`` raise as a key press would, at its ``at``-th call."""
    original, calls = getattr(module, name), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, interrupted)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("weights, others", [(FINE_GRAINED, 1.0), (AS_RELEASED, 0.0), (FINE_GRAINED, 0.3)])
def test_scope_loss_is_the_cross_entropy_of_rho(make, records, similarity, weights, others):
    classifier, few = make(similarity=similarity), records[:5]
    edits, queries = encode_records(classifier, few)
    loss, logits = scope_loss(classifier, edits, queries, weights, others)
    with torch.no_grad():
        z_edit, z_query = classifier(edits).double(), classifier(queries).double().unflatten(0, (5, 5))
    s, m = classifier.scale.exp().item(), classifier.margin.item()

    def rho(e, q):
        d2 = float(((e - q) ** 2).sum())
        return 1 / (1 + math.exp(-s * (m - d2))) if similarity == "logistic" else math.exp(-d2)

    inside = {"reliability": True, "generality": True, "in_scope": True}
    expected, strangers = 0.0, []
    for k in range(5):
        for r, role in enumerate(ROLES):
            p = rho(z_edit[k], z_query[k, r])
            expected -= weights[r] * math.log(p if inside.get(role) else 1 - p) / 5
            assert logits[k, r].item() == pytest.approx(math.log(p / (1 - p)), abs=1e-3)
            if role != "locality":
                nearest = max(rho(z_edit[j], z_query[k, r]) for j in range(5) if j != k)
                strangers.append(-math.log(1 - nearest))
    assert len(strangers) == 5 * 4
    expected += others * sum(strangers) / len(strangers)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_features_are_record_by_record(make, records):
    classifier = make()
    edits, queries = encode_records(classifier, records[:3])
    for k, record in enumerate(records[:3]):
        one_edit, own = encode_records(classifier, [record])
        assert torch.equal(one_edit.text, edits.text[k : k + 1])
        assert torch.equal(own.text, queries.text[5 * k : 5 * k + 5])
        assert queries.image[5 * k : 5 * k + 5].tolist() == [k, k, k, k, -1]


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_the_loss_goes_down(make, fit, tmp_path, similarity):
    curve = fit(make(similarity=similarity), tmp_path, epochs=12)
    assert curve["epoch"].tolist() == list(range(1, 13))
    assert curve["loss"].iloc[-1] < 0.7 * curve["loss"].iloc[0]
    assert set(curve.columns) == {"epoch", "loss", "validation_loss", *(f"right_{r}" for r in ROLES)}
    assert curve.filter(like="right_").stack().between(0, 1).all()


def test_one_seed_gives_the_same_bytes_and_another_does_not(make, fit, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(ord(name))  # what was drawn before does not matter
        fit(make(), tmp_path / name, seed=seed)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a")["model.safetensors"] != files(tmp_path / "c")["model.safetensors"]


@pytest.mark.parametrize("at", [2, 5, 8])
def test_interrupted_within_an_epoch_and_resumed_is_as_if_never_interrupted(make, fit, tmp_path, monkeypatch, at):
    whole = make()
    curve = fit(whole, tmp_path / "whole")
    interrupt(monkeypatch, training, "scope_loss", at)  # 3 batches and 1 evaluation an epoch
    with pytest.raises(KeyboardInterrupt):
        fit(make(), tmp_path / "part")
    monkeypatch.undo()
    resumed = make(seed=0 if at < 5 else 77)  # with a checkpoint, what the model held before does not matter
    again = fit(resumed, tmp_path / "part")
    assert again.equals(curve)
    assert files(tmp_path / "part") == files(tmp_path / "whole")
    assert resumed.fingerprint() == whole.fingerprint()


@pytest.mark.parametrize("at", range(1, 9))
def test_interrupted_while_writing_and_resumed(make, fit, tmp_path, monkeypatch, at):
    """Whichever file is replaced last, what is on disk belongs together."""
    whole = make()
    fit(whole, tmp_path / "whole")
    interrupt(monkeypatch, os, "replace", at)
    with pytest.raises(KeyboardInterrupt):
        fit(make(), tmp_path / "part")
    monkeypatch.undo()
    resumed = make()
    fit(resumed, tmp_path / "part")
    assert files(tmp_path / "part") == files(tmp_path / "whole")
    assert resumed.fingerprint() == whole.fingerprint()


def test_a_finished_run_is_read_and_not_repeated(make, fit, tmp_path, monkeypatch):
    trained = make()
    curve = fit(trained, tmp_path)
    monkeypatch.setattr(training, "scope_loss", lambda *_: pytest.fail("trained again"))
    loaded = make(seed=77)
    assert fit(loaded, tmp_path).equals(curve)
    assert loaded.fingerprint() == trained.fingerprint()
    assert not loaded.training and not trained.training
    weights = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(weights[k], v) for k, v in loaded.state_dict().items())


@pytest.mark.parametrize("other", [{"epochs": 5}, {"seed": 4}, {"lr": 1e-3}, {"weights": AS_RELEASED}])
def test_a_run_of_other_settings_is_not_taken_for_this_one(make, fit, tmp_path, other):
    fit(make(), tmp_path)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=rf"{next(iter(other))}.*delete"):
        fit(make(), tmp_path, **other)
    assert files(tmp_path) == before


def test_a_run_on_other_records_is_not_taken_for_this_one(make, records, tmp_path):
    train_classifier(make(), records[:4], records[8:], tmp_path, 1)
    with pytest.raises(ValueError, match=r"records.*delete"):
        train_classifier(make(), records[4:8], records[8:], tmp_path, 1)


@pytest.fixture
def dropping(blip2):
    """A counterfactual model with dropout, as OPT has it."""

    def make(seed=0):
        torch.manual_seed(seed)
        text = blip2.model.config.text_config.to_diff_dict() | {"num_hidden_layers": 1, "dropout": 0.2}
        return CounterfactualModel(text, blip2.model.config.qformer_config.hidden_size).attach(blip2)

    return make


def test_dropout_repeats_and_resumes(dropping, records, tmp_path, monkeypatch):
    def fit(model, folder):
        return train_counterfactual(model, records[:4], records[4:6], folder, 2, batch_size=2)

    whole = dropping()
    curve = fit(whole, tmp_path / "whole")
    assert set(curve.columns) == {"epoch", "loss", *(f"right_{r}" for r in ROLES[:3])}
    assert not whole.training
    interrupt(monkeypatch, os, "replace", 4)  # the second epoch's first file
    with pytest.raises(KeyboardInterrupt):
        fit(dropping(), tmp_path / "part")
    monkeypatch.undo()
    resumed = dropping(seed=5)
    state = torch.get_rng_state()
    assert fit(resumed, tmp_path / "part").equals(curve)
    assert files(tmp_path / "part") == files(tmp_path / "whole")
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are left alone


def test_the_counterfactual_model_learns_its_records(blip2, records, tmp_path):
    torch.manual_seed(0)
    model = CounterfactualModel.beside(blip2)
    curve = train_counterfactual(model, records[:4], records[:4], tmp_path, 30, lr=3e-3, batch_size=4)
    assert curve["loss"].iloc[-1] < 0.3 * curve["loss"].iloc[0]
    assert curve.filter(like="right_").iloc[-1].mean() > 0.8


def test_validation_compares_as_the_metrics_do(blip2, records, tmp_path, monkeypatch):
    """What is no mistake there is none here."""
    model = CounterfactualModel.beside(blip2)
    monkeypatch.setattr(type(records[0]), "answers", property(lambda r: dict.fromkeys(ROLES, "The Mount “Fuji”.")))
    monkeypatch.setattr(model, "answer", lambda queries, edits: ["mount fuji"] * len(queries))
    curve = train_counterfactual(model, records[:2], records[2:4], tmp_path, 1)
    assert curve.filter(like="right_").iloc[0].tolist() == [1.0, 1.0, 1.0]


def test_the_parts_of_a_batch_sum_to_its_loss(make, records):
    """Whoever computes them: loss and gradients, the strangers' term included."""
    classifier, few = make(), records[:5]
    edits, queries = encode_records(classifier, few)

    def gradient(parts):
        classifier.zero_grad()
        for part in parts:
            own = torch.arange(25).unflatten(0, (5, 5))[part].flatten()
            loss = scope_loss(classifier, edits, queries.select(own), FINE_GRAINED, 1.0, part)[0]
            loss.backward()
        return torch.cat([p.grad.flatten() for p in classifier.parameters() if p.grad is not None])

    whole, apart = gradient([slice(None)]), gradient([slice(0, 2), slice(2, 3), slice(3, 5)])
    assert whole.abs().max() > 1e-3
    torch.testing.assert_close(apart, whole, rtol=1e-4, atol=1e-6)
