"""A tensor of one device that meets one of another is found without a GPU: the weights are fake tensors of CUDA.

What goes forward is checked, losses included. Fake tensors have no values, so what asks for one (greedy answers) cannot run
on them, and their gradients would need CUDA's driver. ``make paper-dry`` on a GPU is for these.
"""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from mscke.classifier import ScopeClassifier
from mscke.models.clip import ClipEncoder
from mscke.models.counterfactual import CounterfactualModel, LastLayers
from mscke.models.decoding import answer_loss
from mscke.models.mllm import MLLM
from mscke.training.scope import FINE_GRAINED, encode_records, scope_loss

pytest_plugins = ["tiny"]
MIXED = "two devices|not on the expected device"


def on_cuda(module):
    """Its weights become fake ones of CUDA, in place; to be called within the mode."""
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    held[name] = torch.nn.Parameter(fake, requires_grad=False) if held is part._parameters else fake
    return module


@pytest.fixture
def few(records):
    return records[:2]


@pytest.fixture
def base(mllm, few):
    """With the features of the records' images, which are kept on the CPU."""
    base = MLLM(copy.deepcopy(mllm.model), mllm.tokenizer, mllm.name)
    base.features([r.edit.image for r in few])
    return base


@pytest.fixture(params=[CounterfactualModel.beside, LastLayers], ids=["fresh layers", "last layers"])
def beside(request, base):
    return request.param(base)


@pytest.fixture
def cuda():
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()), torch.no_grad():
        yield


def asked(few):
    return [r.in_scope for r in few], [r.edit for r in few], [r.in_scope_answer for r in few]


def test_answers_are_scored_where_the_language_model_is(base, cuda, few):
    queries, _, gold = asked(few)
    on_cuda(base.model)
    batch = base.encoder.collate(base.prompts(queries), [base.encoder.answer(a) for a in gold])
    visual = base.see(queries)
    assert visual.device.type == "cuda"
    loss, hits = answer_loss(base.model.language_model, base.encoder, batch, visual)
    assert loss.device.type == hits.device.type == "cuda"
    with pytest.raises(RuntimeError, match=MIXED):
        answer_loss(base.model.language_model, base.encoder, batch, torch.empty(visual.shape))


def test_a_counterfactual_models_loss_is_where_it_is(base, beside, cuda, few, monkeypatch):
    on_cuda(base.model), on_cuda(beside), on_cuda(beside.language_model)
    assert beside.loss(*asked(few)).device.type == "cuda"
    see = type(beside).see
    monkeypatch.setattr(type(beside), "see", lambda *a: torch.empty(see(*a).shape))
    with pytest.raises(RuntimeError, match=MIXED):
        beside.loss(*asked(few))


@pytest.mark.parametrize("fusion", ["dot", "grounded", "text"])  # ``cross`` asks how many rows an image has
def test_a_scope_classifiers_loss_is_where_it_is(clip_name, few, fusion, monkeypatch):
    scope = ScopeClassifier("", width=16, fusion=fusion, encoder=ClipEncoder(clip_name))
    edits, queries = encode_records(scope, few)
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()), torch.no_grad():
        on_cuda(scope), on_cuda(scope.encoder.model)
        assert scope_loss(scope, edits, queries, FINE_GRAINED, 1.0)[0].device.type == "cuda"
        monkeypatch.setattr(type(edits), "to", lambda features, device: features)
        with pytest.raises(RuntimeError, match=MIXED):
            scope_loss(scope, edits, queries, FINE_GRAINED, 1.0)
