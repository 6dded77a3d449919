"""MEND: untrained it is a gradient step; in batch it is one weight edit a record; it learns."""

import copy

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from mscke.benchmark.answers import strict_answer
from mscke.benchmark.sample import Query
from mscke.classifier import ScopeClassifier
from mscke.editors.deltas import matrices
from mscke.editors.mend import MEND, MendNetworks
from mscke.editors.mend_training import mend_loss, train_mend
from mscke.editors.mscke import MSCKE
from mscke.editors.reading import read
from mscke.models.mllm import MLLM
from mscke.models.names import fingerprint
from mscke.models.prompts import embed

pytest_plugins = ["tiny"]
RATE = 0.5


def mend(mllm, layers=2, disturbed=False):
    """MEND of tiny networks; ``disturbed`` ones are no identity any more."""
    torch.manual_seed(3)
    networks = MendNetworks.beside(mllm, layers=layers, rank=8, rate=RATE)
    if disturbed:
        for parameter in networks.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return MEND(mllm, networks)


def dense(editor, edits):
    """Updates (E, out, in) by name."""
    with torch.no_grad():
        return {n: u.dense() for n, u in editor.networks(editor.gradients(edits)).items()}


def with_weights(mllm, deltas):
    """A copy of the model whose own weights carry the update."""
    model = copy.deepcopy(mllm.model)
    with torch.no_grad():
        for name, delta in deltas.items():
            model.language_model.get_submodule(name).weight.add_(delta)
    return MLLM(model, mllm.tokenizer, "edited")


@pytest.fixture(scope="module")
def few(records):
    return records[:4]


@pytest.mark.parametrize("measured", [False, True])
def test_untrained_it_is_a_gradient_step(mllm, few, measured):
    editor, edits = mend(mllm), [r.edit for r in few]
    if measured:  # normalising and its inverse cancel
        editor.networks.measure(editor.gradients(edits))
    updates, encoder = dense(editor, edits), mllm.encoder
    for k, record in enumerate(few):
        model = copy.deepcopy(mllm.model.language_model).requires_grad_()
        query = record.queries["reliability"]
        batch = encoder.collate(mllm.prompts([query]), [encoder.answer(record.edit.answer)])
        embedded = embed(model, batch.ids, encoder.image_id, mllm.see([query]).clone())
        logits = model(inputs_embeds=embedded, attention_mask=batch.mask, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()).backward()
        for name, update in updates.items():
            gradient = model.get_submodule(name).weight.grad
            assert gradient.norm() > 1e-6
            torch.testing.assert_close(update[k], -RATE * gradient, atol=1e-5, rtol=1e-3)


def test_what_padding_feels_is_nothing(mllm, few):
    """On a GPU attention's gradient at padding may be no number; an update must not hold it."""
    editor, edits = mend(mllm, layers=1), [r.edit for r in few]
    expected = dense(editor, edits)
    ids = mllm.prompts([Query(e.prompt, e.image) for e in edits])
    batch = mllm.encoder.collate(ids, [mllm.encoder.answer(e.answer) for e in edits], left=True)
    assert not batch.mask.all()
    padded = (batch.mask == 0).flatten()

    def poison(_module, _args, output):
        nan = lambda g: torch.where(padded.view(*g.shape[:-1], 1), torch.nan, g)  # noqa: E731
        output.requires_grad_().register_hook(nan)

    language_model = mllm.model.language_model
    hooks = [language_model.get_submodule(n).register_forward_hook(poison) for n in matrices(language_model, 1)]
    try:
        found = dense(editor, edits)
    finally:
        for hook in hooks:
            hook.remove()
    for name, update in expected.items():
        assert update.norm() > 0
        torch.testing.assert_close(found[name], update)


def test_shapes_share_a_network_and_matrices_have_their_own_rate(mllm):
    networks = MendNetworks.beside(mllm, layers=2)
    weights = {n: mllm.model.language_model.get_submodule(n).weight.shape for n in networks.place}
    assert {f"{rows}x{columns}" for rows, columns in weights.values()} == set(networks.networks)
    assert sum(len(n.log_rate) for n in networks.networks.values()) == len(weights)
    assert len(set(networks.place.values())) == len(weights)
    assert all("attn" not in n for n in weights) and any("layers.0." in n for n in weights)
    assert not any("layers.0." in n for n in MendNetworks.beside(mllm, layers=1).place)


def test_a_batch_is_one_weight_edit_a_record(mllm, few):
    before = fingerprint(mllm.model)
    editor = mend(mllm, disturbed=True)
    edited = editor.edit(few)
    queries = [q for r in few for q in r.queries.values()]
    answers = [a for r in few for a in r.answers.values()]
    among = torch.arange(4).repeat_interleave(5)
    found, forced = edited.answer(queries, among), edited.force(queries, answers, among)
    for k, record in enumerate(few):
        alone = with_weights(mllm, {n: u[0] for n, u in dense(editor, [record.edit]).items()})
        part = slice(5 * k, 5 * k + 5)
        assert found[part] == alone.answer(queries[part])
        for a, b in zip(forced[part], alone.force(queries[part], answers[part]), strict=True):
            assert (a.hits == b.hits).all() and (a.top[:, 0] == b.top[:, 0]).all()
    assert found != mllm.answer(queries)
    assert fingerprint(mllm.model) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in mllm.model.modules())


def test_the_order_and_the_repetition_of_edits_do_not_matter(mllm, few):
    editor, queries = mend(mllm, disturbed=True), [r.in_scope for r in few]
    edits = [few[k].edit for k in (2, 0, 2, 1)]
    expected = editor.edit(few).answer(queries, torch.tensor([2, 0, 2, 1]))
    assert editor.answer(queries, edits) == expected
    with torch.inference_mode():  # gradients are taken all the same
        assert editor.answer(queries, edits) == expected


def test_mscke_mend_answers_in_scope_with_mend(mllm, few, clip_name, encoder):
    torch.manual_seed(8)
    classifier = ScopeClassifier(clip_name, width=16, encoder=encoder).eval()
    editor = mend(mllm, disturbed=True)
    queries, answers = [r.in_scope for r in few], [r.in_scope_answer for r in few]
    own = torch.arange(4)
    inside = MSCKE(mllm, editor, classifier, "MSCKE-MEND", threshold=0.0).edit(few)
    assert inside.answer(queries, own) == editor.edit(few).answer(queries, own)
    both = zip(inside.force(queries, answers, own), editor.edit(few).force(queries, answers, own), strict=True)
    assert all((a.top == b.top).all() for a, b in both)
    outside = MSCKE(mllm, editor, classifier, "MSCKE-MEND", threshold=1.01).edit(few)
    assert outside.answer(queries, own) == mllm.answer(queries)


def test_a_sequence_takes_gradients_where_it_stands(mllm, few):
    editor = mend(mllm, disturbed=True)
    models = dict(editor.sequence(few, [1, 2]))
    assert list(models) == [1, 2]
    first = dense(editor, [few[0].edit])
    moved = MEND(with_weights(mllm, {n: u[0] for n, u in first.items()}), editor.networks)
    second = dense(moved, [few[1].edit])
    for name in first:
        after = [models[n].deltas(torch.zeros(1))[name].weight for n in (1, 2)]
        torch.testing.assert_close(after[0], first[name])
        assert (after[1] - first[name] - second[name]).norm() < 1e-3 * second[name].norm()
        assert second[name].norm() > 0
    assert len(models[2].answer([r.in_scope for r in few])) == 4


def test_what_must_not_change_costs_when_it_does(mllm, few):
    editor = mend(mllm)
    assert mend_loss(editor, few, c_edit=0.0).item() > 1e-3
    for network in editor.networks.networks.values():
        network.log_rate.data.fill_(-30.0)  # no update at all
    assert abs(mend_loss(editor, few, c_edit=0.0).item()) < 1e-5
    base = mend_loss(editor, few, c_loc=0.0).item()
    reading = [(r.queries[role], r.answers[role]) for r in few for role in list(r.queries)[:3]]
    forced = mllm.force(*map(list, zip(*reading, strict=True)))
    assert base > 1 and not all(f.hits.all() for f in forced)


def train(mllm, records, folder, **kwargs):
    editor = mend(mllm)
    arguments = {"epochs": 2, "batch_size": 4, "lr": 1e-2} | kwargs
    return editor, train_mend(editor, records[:8], records[8:], folder, **arguments)


def test_it_learns_and_leaves_the_base_alone(mllm, records, tmp_path):
    before = fingerprint(mllm.model)
    untrained = mend_loss(mend(mllm), records[:8]).item()
    editor, curve = train(mllm, records, tmp_path, epochs=25, batch_size=8, lr=3e-2)
    assert mend_loss(editor, records[:8]).item() < 0.7 * untrained
    assert set(curve.columns) >= {"epoch", "loss", "right_reliability", "right_out_of_scope"}
    assert fingerprint(mllm.model) == before
    assert not any(p.grad is not None for p in mllm.model.parameters())


def test_the_curve_says_what_validation_shows(blip2, records, tmp_path):
    editor, curve = train(blip2, records, tmp_path, epochs=1)
    held = records[8:]
    found = editor.edit(held).answer([r.queries["reliability"] for r in held], torch.arange(len(held)))
    right = [a == strict_answer(r.edit.answer) for a, r in zip(found, held, strict=True)]
    assert curve["right_reliability"].iloc[-1] == pytest.approx(sum(right) / len(held))


def test_validation_compares_as_the_metrics_do(blip2, records, tmp_path, monkeypatch):
    _, plain = train(blip2, records, tmp_path / "plain", epochs=1)
    answer = MEND.answer
    with_marks = lambda *asked: [f"“{a}”," if a else a for a in answer(*asked)]  # noqa: E731
    monkeypatch.setattr(MEND, "answer", with_marks)
    _, marked = train(blip2, records, tmp_path / "marked", epochs=1)
    assert marked.equals(plain) and plain.filter(like="right_").iloc[-1].max() > 0


def test_training_is_not_repeated_and_repeats_exactly(blip2, records, tmp_path):
    editor, curve = train(blip2, records, tmp_path / "a", epochs=2)
    again, same = train(blip2, records, tmp_path / "a", epochs=2)
    _, anew = train(blip2, records, tmp_path / "b", epochs=2)
    pd.testing.assert_frame_equal(curve, same)
    pd.testing.assert_frame_equal(curve, anew)
    assert fingerprint(editor.networks) == fingerprint(again.networks)
    with pytest.raises(ValueError, match="c_loc"):
        train(blip2, records, tmp_path / "a", epochs=2, c_loc=2.0)


def test_networks_survive_the_disk(mllm, few, tmp_path):
    editor = mend(mllm, disturbed=True)
    editor.networks.measure(editor.gradients([r.edit for r in few]))
    editor.networks.save_pretrained(tmp_path)
    loaded = MEND(mllm, MendNetworks.from_pretrained(tmp_path))
    for name, update in dense(editor, [few[0].edit]).items():
        assert torch.equal(update, dense(loaded, [few[0].edit])[name])


def test_padding_attends_to_something_and_no_token_to_padding(mllm, few):
    reading = read(mllm, [r.queries["reliability"] for r in few], [r.edit.answer for r in few])
    mask = reading.inputs["attention_mask"]
    assert mask.any(-1).all() and not reading.mask.all()
    real = reading.mask.bool()
    for row, keys in enumerate(real):
        tokens = mask[row, 0][keys]
        assert not tokens[:, ~keys].any() and torch.equal(tokens[:, keys], tokens[:, keys].tril())
    plain = reading.inputs | {"attention_mask": reading.mask}
    del plain["position_ids"]  # as the model counts them from a mask
    language_model = mllm.model.language_model
    with torch.no_grad():
        found, expected = (language_model(**inputs).logits for inputs in (reading.inputs, plain))
    assert torch.equal(found, expected)


def test_without_padding_the_mask_is_the_plain_one(mllm, few):
    reading = read(mllm, [few[0].in_scope] * 2, [few[0].edit.answer] * 2)
    assert reading.inputs["attention_mask"] is reading.mask
