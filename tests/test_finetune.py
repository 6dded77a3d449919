"""FT-LLM fits what it edits, many edits at once as one by one, and leaves the base model alone."""

import copy

import pytest
import torch

from mscke.benchmark.answers import strict_answer
from mscke.editors.deltas import DeltaModel, Dense, LowRank, applied, matrices
from mscke.editors.finetune import FineTune, choose_rate
from mscke.models.mllm import MLLM
from mscke.models.names import fingerprint

pytest_plugins = ["tiny"]


def fine_tune(mllm, **kwargs):
    return FineTune(mllm, **{"lr": 1e-2, "steps": 60} | kwargs)


def updates(model: DeltaModel, edit: int = 0):
    return {n: d.weight[0] for n, d in model.deltas(torch.tensor([edit])).items()}


def with_weights(mllm, deltas):
    """A copy of the model whose own weights carry the update."""
    model = copy.deepcopy(mllm.model)
    with torch.no_grad():
        for name, delta in deltas.items():
            model.language_model.get_submodule(name).weight.add_(delta)
    return MLLM(model, mllm.tokenizer, "edited")


def assert_close(found, expected, share=0.01):
    """Within ``share`` of the expected update: where a gradient vanishes, Adam keeps rounding errors alive."""
    assert found.keys() == expected.keys()
    for name in found:
        assert expected[name].norm() > 0
        assert (found[name] - expected[name]).norm() < share * expected[name].norm(), name


def same_forced(found, expected):
    return all((a.top == b.top).all() and (a.hits == b.hits).all() for a, b in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def few(records):
    return records[:4]


def test_it_fits_every_edit(mllm, few):
    queries = [r.queries["reliability"] for r in few]
    targets = [strict_answer(r.edit.answer) for r in few]
    assert mllm.answer(queries) != targets
    edited = fine_tune(mllm).edit(few)
    assert edited.answer(queries, torch.arange(4)) == targets
    assert all(f.hits.all() for f in edited.force(queries, targets, torch.arange(4)))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_many_at_once_are_one_by_one(mllm, few, layers, chunk):
    editor = fine_tune(mllm, layers=layers, chunk=chunk, steps=6)
    edited = editor.edit(few)
    for k, record in enumerate(few):
        assert_close(updates(edited, k), editor.one_by_one(record))


def test_a_fitted_edit_stands_still(mllm, few):
    one_step = fine_tune(mllm, steps=1)
    losses = torch.tensor([_loss(mllm, r) for r in few])
    edited = fine_tune(mllm, steps=1, tolerance=float(losses.median()) + 1e-3).edit(few)
    assert 0 < int((losses > losses.median()).sum()) < len(few)
    for k, record in enumerate(few):
        if losses[k] <= losses.median():
            assert not any(d.any() for d in updates(edited, k).values())
        else:
            assert_close(updates(edited, k), one_step.one_by_one(record))


def _loss(mllm, record) -> float:
    reading, *_ = fine_tune(mllm)._read([record])
    return reading.loss(mllm.model.language_model(**reading.inputs).logits).item()


@pytest.mark.parametrize("layers", [1, 2])
def test_it_edits_the_last_layers_and_never_the_base(mllm, few, layers):
    before, modules = fingerprint(mllm.model), list(mllm.model.modules())
    edited = fine_tune(mllm, layers=layers, steps=3).edit(few)
    last = len(mllm.model.language_model.get_decoder().layers) - layers
    assert edited.deltas(torch.arange(4)).keys()
    for name in edited.deltas(torch.arange(4)):
        assert int(name.split("layers.")[1].split(".")[0]) >= last and "attn" not in name
    edited.answer([few[0].in_scope], torch.tensor([2]))
    assert fingerprint(mllm.model) == before
    assert list(mllm.model.modules()) == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    assert not any(p.requires_grad for p in mllm.model.parameters())


def test_a_batch_is_one_copy_of_the_model_an_edit(mllm, few):
    edited = fine_tune(mllm).edit(few)
    edited.batch_size = 7  # no record's five queries end where a batch ends
    queries = [q for r in few for q in r.queries.values()]
    answers = [a for r in few for a in r.answers.values()]
    among = torch.arange(4).repeat_interleave(5)
    found, forced = edited.answer(queries, among), edited.force(queries, answers, among)
    for k in range(4):
        part, alone = slice(5 * k, 5 * k + 5), with_weights(mllm, updates(edited, k))
        assert found[part] == alone.answer(queries[part])
        for a, b in zip(forced[part], alone.force(queries[part], answers[part]), strict=True):
            assert (a.hits == b.hits).all() and (a.top[:, 0] == b.top[:, 0]).all()


def test_which_edit_is_in_force_must_be_clear(mllm, few):
    editor = fine_tune(mllm, steps=3)
    with pytest.raises(ValueError, match="4 edits make 4 models"):
        editor.edit(few).answer([few[0].in_scope])
    alone = editor.edit(few[:1])
    queries = [r.in_scope for r in few]
    assert alone.answer(queries) == alone.answer(queries, torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize("layers", [1, 2])
def test_a_sequence_goes_on_from_the_weights_it_has(mllm, few, layers):
    editor = fine_tune(mllm, layers=layers, steps=4)
    models = dict(editor.sequence(few, [1, 3]))
    assert list(models) == [1, 3]
    total = updates(models[1])
    assert_close(total, updates(editor.edit(few[:1])), share=1e-5)
    for record in few[1:3]:
        next_one = fine_tune(with_weights(mllm, total), layers=layers, steps=4).one_by_one(record)
        total = {n: total[n] + next_one[n] for n in total}
    assert_close(updates(models[3]), total)
    assert len(models[3].answer([r.in_scope for r in few])) == 4  # one model: no `among` needed


def test_half_precision(blip2, few):
    half = MLLM(copy.deepcopy(blip2.model).bfloat16(), blip2.tokenizer, "half")
    edited = fine_tune(half).edit(few)
    targets = [strict_answer(r.edit.answer) for r in few]
    assert edited.answer([r.queries["reliability"] for r in few], torch.arange(4)) == targets
    assert all(d.dtype == torch.float32 for d in updates(edited).values())
    plain = fine_tune(half).one_by_one(few[0])  # what it is timed against computes in the model's type too
    assert plain.keys() == updates(edited).keys()
    assert all(d.dtype == torch.float32 and d.norm() > 0 for d in plain.values())


def test_low_rank_is_dense(mllm):
    language_model = mllm.model.language_model
    low_rank, dense = {}, {}
    for name in matrices(language_model, 2):
        rows, columns = language_model.get_submodule(name).weight.shape
        low_rank[name] = LowRank(torch.randn(3, 4, rows), torch.randn(3, 4, columns))
        dense[name] = Dense(low_rank[name].dense())
    ids = torch.randint(5, 100, (3, 6))
    logits = []
    for deltas in (low_rank, dense):
        with torch.no_grad(), applied(language_model, deltas):
            logits.append(language_model(ids).logits)
    torch.testing.assert_close(*logits, atol=2e-3, rtol=1e-3)
    assert (logits[0] - language_model(ids).logits).abs().max() > 0.1


def test_nothing_stays_behind_an_error(mllm):
    language_model = mllm.model.language_model
    name = matrices(language_model, 1)[0]
    rows, columns = language_model.get_submodule(name).weight.shape
    ids = torch.tensor([[7, 8, 9]])
    before = language_model(ids).logits
    with (
        pytest.raises(RuntimeError, match="here"),
        applied(language_model, {name: Dense(torch.ones(1, rows, columns))}),
    ):
        assert not torch.equal(language_model(ids).logits, before)
        raise RuntimeError("here")
    assert torch.equal(language_model(ids).logits, before)


def test_no_more_edits_are_in_memory_than_may_be(mllm, few):
    """However the queries fall: in an order of their own, several of an edit or a single one."""
    editor, asked = FineTune(mllm, at_once=2), []
    model, together = editor.edit(few), FineTune(mllm).edit(few)
    deltas = model.deltas
    model.deltas = lambda edits: asked.append(len(edits)) or deltas(edits)
    among = torch.tensor([0, 0, 1, 2, 0, 3, 3, 1, 4, 5, 2][: 2 * len(few)]) % len(few)
    queries = [few[i].in_scope for i in among.tolist()]
    assert model.answer(queries, among) == together.answer(queries, among)
    assert max(asked) == 2


def test_the_rate_is_the_one_that_does_best_on_validation(mllm, few):
    """By hand: a rate of nothing keeps all and changes none."""
    best, table = choose_rate(mllm, few, ((0.0, 1), (1e-2, 60)), at_once=2)
    still, fitted = table.to_dict("records")
    assert (still["lr"], still["steps"], fitted["steps"]) == (0.0, 1, 60)
    assert still["locality"] == still["out_of_scope"] == 1 and fitted["reliability"] == 1
    for row in (still, fitted):
        assert row["specificity"] == (row["in_scope"] + row["out_of_scope"]) / 2
        four = [row[name] for name in ("reliability", "generality", "locality", "specificity")]
        assert row["score"] == pytest.approx(sum(four) / 4)
    assert best == {"lr": max(table.to_dict("records"), key=lambda r: r["score"])["lr"], "steps": best["steps"]}
