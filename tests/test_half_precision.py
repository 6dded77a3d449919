"""No float32 part meets a half-precision model outside autocast: every method runs beside a base model in bfloat16, under
a watch of all operations.

That no tensor of one device meets one of another is tests/test_fake_device.py's to see.
"""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mscke.classifier import ScopeClassifier
from mscke.cost import bench
from mscke.cost.components import components, counts, latency
from mscke.editors.finetune import FineTune
from mscke.editors.ike import IKE
from mscke.editors.mend import MEND, MendNetworks
from mscke.editors.mend_training import mend_loss
from mscke.editors.mscke import MSCKE
from mscke.editors.null import ALWAYS, null_edits
from mscke.editors.serac import MiniLMEncoder
from mscke.evaluation.many_edits import ask_sequences
from mscke.evaluation.outcomes import own_scores
from mscke.evaluation.protocol import evaluate
from mscke.models.clip import ClipEncoder
from mscke.models.counterfactual import CounterfactualModel, LastLayers
from mscke.models.mllm import MLLM
from mscke.training.scope import FINE_GRAINED, encode_records, scope_loss

pytest_plugins = ["tiny"]
MOVES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}  # from one type to another


class Watch(TorchDispatchMode):
    """Within it RuntimeError for an operation on float32 and bfloat16, but under autocast.

    A number (0 dimensions) may meet any tensor. Attention keeps float32 sums beside bfloat16 itself, and what went forward
    under autocast comes back without it.
    """

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        met = {t.dtype for t in tree_leaves((args, kwargs or {})) if isinstance(t, torch.Tensor) and t.dim()}
        back, kept = torch._C._current_graph_task_id() != -1, op in MOVES or "attention" in str(op)
        if {torch.float32, torch.bfloat16} <= met and not (back or kept or _autocast()):
            raise RuntimeError(f"{op}: float32 meets bfloat16 outside autocast")
        return op(*args, **kwargs or {})


def _autocast():
    """Whether within autocast, on or off; an operation's own flag is gone by the time that it is watched."""
    depth = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return depth > 1


@pytest.fixture
def few(records):
    return records[:2]


@pytest.fixture(autouse=True)
def watched():
    with Watch():
        yield


@pytest.fixture
def base(mllm, watched):
    return MLLM(copy.deepcopy(mllm.model).to(torch.bfloat16), mllm.tokenizer, mllm.name)


@pytest.fixture
def scope(clip_name, watched):
    return ScopeClassifier("", width=16, encoder=ClipEncoder(clip_name))


def step(module, loss):
    """One of AdamW."""
    optimiser = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad])
    loss.backward()
    optimiser.step()
    assert torch.isfinite(loss).item()


def asked(few):
    return [r.in_scope for r in few], [r.edit for r in few], [r.in_scope_answer for r in few]


def test_the_base_model_answers(base, few):
    queries, _, gold = asked(few)
    queries = [*queries, few[0].locality]
    assert base.see(queries).dtype == torch.bfloat16
    assert len(base.answer(queries)) == len(base.force(queries, [*gold, "yes"])) == 3


def test_the_classifier_trains_and_finds(scope, few):
    edits, queries = encode_records(scope, few)
    step(scope, scope_loss(scope, edits, queries, FINE_GRAINED, 1.0)[0])
    assert own_scores(scope, few).size == 10
    assert len(bench.route(scope, few, sizes=(1, 3), patience=0.0)) == 2


@pytest.mark.parametrize("kind", [CounterfactualModel.beside, LastLayers])
def test_a_counterfactual_model_trains_and_answers_what_is_routed_to_it(base, scope, few, kind):
    model = kind(base)
    step(model, model.loss(*asked(few)))
    editor = MSCKE(base, model.eval(), scope, threshold=ALWAYS)
    evaluate(editor, base, few, "t")
    bench.evaluation(editor, base, few[:1], "t", 0.0)
    made = components(base, model, scope, bench.memory_of(scope, few, 3), few)
    assert len(counts(made)) == len(latency(made, batch=2, repeats=1))


def test_mend_trains_and_edits(base, scope, few):
    mend = MEND(base, MendNetworks.beside(base, rank=4).to(base.model.device))
    mend.networks.measure(mend.gradients([r.edit for r in few]))
    step(mend.networks, mend_loss(mend, few))
    for editor in (mend, MSCKE(base, mend, scope, threshold=ALWAYS)):
        evaluate(editor, base, few, "t")
    ask_sequences(mend, base, few, (1, 2))


def test_fine_tuning_edits_at_once_in_a_row_and_the_plain_way(base, few):
    editor = FineTune(base, steps=2)
    evaluate(FineTune(base, steps=2, at_once=1), base, few, "t")
    ask_sequences(editor, base, few, (1, 2))
    bench.fine_tuning(editor, few, None, 0.0)


def test_demonstrations_edit(base, few, records):
    evaluate(IKE(base, records, MiniLMEncoder(), 2), base, few, "t")


def test_an_edit_of_nothing_reads_100(base, scope, few):
    for editor in null_edits(base, scope, at_once=1):
        rows = evaluate(editor, base, few, "t")
        assert (rows.loc[rows["metric"].isin(["m_out", "locality"]), "value"] == 1).all(), editor.name


# Is what is wrong found?


def test_what_meets_half_precision_outside_autocast_is_caught(base, few, monkeypatch):
    monkeypatch.setattr(CounterfactualModel, "mixed", lambda _: nullcontext())
    with pytest.raises(RuntimeError, match="float32 meets bfloat16"):
        LastLayers(base).loss(*asked(few))


def test_the_watch_by_hand():
    here, half = torch.ones(2), torch.ones(2, dtype=torch.bfloat16)
    for mixed in (lambda: here + half, lambda: torch.where(here > 0, half, here), lambda: torch.cat([here, half])):
        with pytest.raises(RuntimeError, match="float32 meets bfloat16"):
            mixed()
    with torch.autocast("cpu", torch.bfloat16):
        assert (here + half).dtype == torch.float32
    assert (here + half.to(here)).tolist() == [2, 2] and (half * torch.tensor(2.0)).tolist() == [2, 2]
