"""The counterfactual model: it learns, through its own projection, and leaves the base model alone."""

import copy

import numpy as np
import pytest
import torch
from safetensors import safe_open

from mscke.benchmark.answers import strict_answer
from mscke.models.counterfactual import CounterfactualModel, LastLayers
from mscke.models.names import fingerprint

pytest_plugins = ["tiny"]


def beside(mllm, seed=4):
    torch.manual_seed(seed)
    return CounterfactualModel.beside(mllm)


@pytest.fixture(scope="module")
def four(records):
    """Four in-scope questions with their edits and corrected answers; one of text alone among them."""
    chosen = records[:4]
    queries = [r.in_scope for r in chosen[:3]] + [chosen[3].locality]
    answers = [r.in_scope_answer for r in chosen[:3]] + [chosen[3].locality_answer]
    return queries, [r.edit for r in chosen], answers


def test_it_overfits_four_examples(mllm, four):
    model, (queries, edits, answers) = beside(mllm), four
    before = fingerprint(mllm.model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    while len(losses) < 60 and min(losses, default=1) >= 0.01:
        optimiser.zero_grad()
        loss = model.loss(queries, edits, answers)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > 1 and losses[-1] < 0.1
    assert model.answer(queries, edits) == [strict_answer(a) for a in answers]
    assert all(f.hits.all() for f in model.force(queries, edits, answers))
    assert model.answer(queries, edits, batch_size=1) == model.answer(queries, edits)
    assert fingerprint(mllm.model) == before


def test_the_own_projection_learns_and_the_base_model_does_not(mllm, four):
    model = beside(mllm)
    model.loss(*four).backward()
    assert model.projection.weight.grad.abs().sum() > 0
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in mllm.model.parameters())
    own = {p.data_ptr() for p in model.parameters()}
    assert own.isdisjoint(p.data_ptr() for p in mllm.model.parameters())
    assert not any("base" in name for name in model.state_dict())


def test_the_loss_is_the_mean_over_answer_tokens(mllm, four):
    """Sequence by sequence, without padding."""
    model, lengths = beside(mllm), [len(mllm.encoder.answer(answer)) for answer in four[2]]
    alone = [model.loss(*([part] for part in one)).item() for one in zip(*four, strict=True)]
    assert model.loss(*four).item() == pytest.approx(np.average(alone, weights=lengths), rel=1e-4)


def test_the_edit_is_in_the_prompt(mllm, four):
    model, (queries, edits, _) = beside(mllm), four
    for prompt, query, edit in zip(model.prompts(queries, edits), queries, edits, strict=True):
        text = mllm.tokenizer.decode(prompt)
        assert text.endswith(f"New Fact: {edit.prompt} {edit.answer}\nPrompt: Question: {query.question} Short answer:")


def test_the_edit_changes_what_is_predicted(mllm, four):
    model, (queries, edits, _) = beside(mllm), four
    own, other = (model.force(queries[:1], [e], ["yes"])[0] for e in (edits[0], edits[1]))
    prefix = mllm.encoder.prefix_length(True)
    assert (own.top[: prefix - 1] == other.top[: prefix - 1]).all()  # nothing before the edit can know of it
    assert own.top[-1].tolist() != other.top[-1].tolist()


def test_it_is_small_and_starts_from_the_base_models_words(mllm):
    model = beside(mllm)
    assert model.language_model.config.num_hidden_layers == 2
    assert model.language_model.config.model_type == mllm.model.config.text_config.model_type
    assert next(model.parameters()).dtype == torch.float32
    words = model.language_model.get_input_embeddings().weight
    assert torch.equal(words, mllm.model.language_model.get_input_embeddings().weight)
    assert not torch.equal(beside(mllm, 5).projection.weight, model.projection.weight)


def test_save_and_load(mllm, four, tmp_path):
    model, (queries, edits, answers) = beside(mllm).eval(), four
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert all(name.startswith(("language_model.", "projection.")) for name in names)
    torch.manual_seed(99)
    loaded = CounterfactualModel.from_pretrained(tmp_path).attach(mllm)
    assert not loaded.training and fingerprint(loaded) == fingerprint(model)
    assert loaded.answer(queries, edits) == model.answer(queries, edits)
    for a, b in zip(loaded.force(queries, edits, answers), model.force(queries, edits, answers), strict=True):
        assert (a.top == b.top).all()


class Rounded(torch.nn.Linear):
    """Stands for a matrix in 8 bits, whose scales move into the module that runs first."""


Rounded.__module__ = "bitsandbytes.nn.modules"


def test_what_is_in_eight_bits_is_shared_whole(minigpt4):
    """Two modules on one such weight would take its scales from each other."""
    base = copy.copy(minigpt4)
    base.model = copy.deepcopy(minigpt4.model)
    first, last = (base.model.language_model.get_decoder().layers[i] for i in (0, -1))
    first.mlp.up_proj.__class__ = Rounded
    mine = LastLayers(base).language_model.get_decoder().layers
    assert mine[0].mlp.up_proj is first.mlp.up_proj  # one module
    assert mine[0].mlp.down_proj is not first.mlp.down_proj  # another module of the same tensor
    assert mine[0].mlp.down_proj.weight is first.mlp.down_proj.weight
    assert mine[-1].mlp.up_proj.weight is not last.mlp.up_proj.weight  # what is trained is its own
