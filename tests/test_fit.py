"""The training loop: it can be stopped anywhere, split anyhow, and ends when it should."""

import os
import signal
import warnings

import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from mscke.editors.mend import MEND, MendNetworks
from mscke.editors.mend_training import train_mend
from mscke.models.counterfactual import CounterfactualModel
from mscke.system.files import code_of
from mscke.training.fit import fit
from mscke.training.scope import train_counterfactual

pytest_plugins = ["tiny"]
N, EPOCHS, BATCH = 10, 3, 3  # four batches an epoch, the last of one row
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))


class Toy:
    """A model with dropout that learns X @ 1.

    It notes the rows whose loss it is asked for, and calls ``at[n]()`` when asked the n-th time. Its validation
    losses are those in ``held``.
    """

    def __init__(self, at=None, held=None):
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))
        self.at, self.held, self.rows = at or {}, iter(held or ()), []

    def loss(self, batch, part):
        rows = batch[part]
        self.rows.append(rows.tolist())
        self.at.get(len(self.rows), lambda: None)()
        wrong = self.model(X[rows]).squeeze(-1) - X[rows].sum(-1)
        return wrong.square().mean() * (len(rows) / len(batch))

    def evaluate(self):
        return {"weight": self.model[0].weight.norm().item(), "validation_loss": next(self.held, 0)}

    def fit(self, folder, **options):
        return fit(self.model, self.loss, self.evaluate, N, folder, EPOCHS, 1e-2, BATCH, 0, {}, **options)


def files(folder):
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", "curve.csv")}


def stop():
    raise KeyboardInterrupt


@pytest.fixture
def whole(tmp_path):
    """A run without interruption."""
    toy = Toy()
    toy.fit(tmp_path / "whole")
    return toy, files(tmp_path / "whole")


def test_on_one_process_it_is_the_plain_loop(whole):
    """Bit for bit: nothing that is there for many processes, or for resuming, leaves a trace."""
    toy = Toy()
    optimiser = torch.optim.AdamW(toy.model.parameters(), lr=1e-2, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, EPOCHS * 4, pct_start=0.1)
    for epoch in range(EPOCHS):
        torch.manual_seed(epoch)
        for batch in torch.randperm(N).split(BATCH):
            optimiser.zero_grad()
            toy.loss(batch, slice(None)).backward()
            torch.nn.utils.clip_grad_norm_(toy.model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
    assert toy.rows == whole[0].rows
    for plain, ours in zip(toy.model.parameters(), whole[0].model.parameters(), strict=True):
        assert torch.equal(plain, ours)


def test_every_epoch_reads_each_record_once_in_an_order_of_its_own(whole):
    seen = [row for rows in whole[0].rows for row in rows]
    orders = [tuple(seen[i : i + N]) for i in range(0, N * EPOCHS, N)]
    assert all(sorted(order) == list(range(N)) for order in orders) and len(set(orders)) == EPOCHS


@pytest.mark.parametrize("at", range(1, 13))
def test_killed_at_any_step_it_goes_on_from_the_last_one_saved(whole, tmp_path, at):
    with pytest.raises(KeyboardInterrupt):
        Toy({at: stop}).fit(tmp_path / "part", save_every=2)
    resumed = Toy()
    torch.manual_seed(at)  # what is drawn outside does not matter
    resumed.fit(tmp_path / "part", save_every=2)
    assert len(resumed.rows) == 12 - (at - 1) // 2 * 2
    assert files(tmp_path / "part") == whole[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [1, 4, 6, 12])
def test_asked_to_stop_it_finishes_the_step_and_loses_none(whole, tmp_path, number, at):
    before = signal.getsignal(number)
    stopped, resumed = Toy({at: lambda: signal.raise_signal(number)}), Toy()
    with pytest.raises(KeyboardInterrupt, match="goes on"):
        stopped.fit(tmp_path / "part")
    assert len(stopped.rows) == at and signal.getsignal(number) is before
    resumed.fit(tmp_path / "part")
    assert stopped.rows + resumed.rows == whole[0].rows
    assert files(tmp_path / "part") == whole[1]


DAMAGE = {
    "empty": lambda whole: b"",
    "cut": lambda whole: whole[: len(whole) // 2],
    "other": lambda whole: b"no file of ours",
}


@pytest.mark.parametrize("name", ["checkpoint.pt", "model.safetensors", "curve.csv"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_named_and_made_anew(tmp_path, whole, name, damage):
    Toy().fit(tmp_path / "run")
    path = tmp_path / "run" / name
    path.write_bytes(damage(path.read_bytes()))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        Toy().fit(tmp_path / "run")
    assert files(tmp_path / "run") == whole[1]
    named = [str(w.message) for w in said if str(path) in str(w.message)]
    # of a curve cut between two numbers nothing is damaged but its length
    assert (named and "is damaged and is made anew" in named[0]) or name == "curve.csv"


def test_a_second_interrupt_acts_at_once(tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # some shells have it ignored
    toy = Toy({2: lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)]})
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            toy.fit(tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not str(caught.value) and not (tmp_path / "checkpoint.pt").exists()


def test_parts_make_the_same_step(tmp_path):
    for parts in (1, 2, 5):  # five parts of three rows: some are empty
        toy = Toy()
        toy.model[1].p = 0.0
        toy.fit(tmp_path / str(parts), accumulate=parts)
        assert len(toy.rows) == 12 * parts
    one, *others = (load_file(tmp_path / f"{parts}/model.safetensors") for parts in (1, 2, 5))
    for other in others:
        for key, weight in one.items():
            torch.testing.assert_close(other[key], weight, rtol=0, atol=1e-5)


def test_a_parameter_may_have_a_rate_of_its_own(tmp_path):
    """The plain loop with two groups, and a rate that is for nothing is refused."""
    own, plain = Toy(), Toy()
    own.model[1].p = plain.model[1].p = 0.0
    own.fit(tmp_path / "own", rates={"2.bias": 0.0})
    plain.fit(tmp_path / "plain")
    torch.manual_seed(0)
    fresh = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0), torch.nn.Linear(8, 1))
    assert torch.equal(own.model[2].bias, fresh[2].bias)  # a rate of nothing moves nothing
    assert not torch.equal(plain.model[2].bias, fresh[2].bias)
    assert not torch.equal(own.model[0].weight, fresh[0].weight)
    with pytest.raises(ValueError, match="no parameter's name ends with 'log_rate'"):
        Toy().fit(tmp_path / "idle", rates={"log_rate": 1.0})
    with pytest.raises(ValueError, match="rates"):  # another run than the one that is kept there
        Toy().fit(tmp_path / "own", rates={"2.bias": 1.0})


@pytest.mark.parametrize(
    "held, epochs, best", [((3, 1, 2), 3, 2), ((1, 2, 3), 2, 1), ((1, 1, 0), 2, 1), ((3, 2, 1), 3, 3)]
)
def test_patience_ends_a_run_and_keeps_the_best_weights(tmp_path, held, epochs, best):
    """One epoch without a lower validation loss is enough here; a tie is not lower."""
    toy = Toy(held=held)
    curve = toy.fit(tmp_path / "early", patience=1)
    assert curve["epoch"].max() == epochs and toy.model[0].weight.norm().item() == curve["weight"][best - 1]
    read = Toy()
    again = read.fit(tmp_path / "early", patience=1)
    assert not read.rows and again.equals(curve)
    assert torch.equal(read.model[0].weight, toy.model[0].weight)
    with pytest.raises(ValueError, match=r"patience.*delete"):
        read.fit(tmp_path / "early")


def test_what_early_stopping_watches_is_computed_when_it_is_wanted(tmp_path):
    toy = Toy()
    toy.evaluate = dict
    assert "validation_loss" not in toy.fit(tmp_path / "without", held=stop)
    toy = Toy()
    toy.evaluate = dict
    assert toy.fit(tmp_path / "with", held=lambda: 0.5, patience=3)["validation_loss"].eq(0.5).all()


@pytest.fixture
def fresh_state():
    """Accelerate takes one precision a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_mixed_precision(whole, tmp_path, fresh_state):
    toy, seen = Toy(), set()
    toy.model[0].register_forward_hook(lambda _m, _a, output: seen.add(output.dtype))
    curve = toy.fit(tmp_path / "mixed", precision="bf16")
    assert seen == {torch.bfloat16} and toy.model[0].weight.dtype == torch.float32
    plain = pd.read_csv(tmp_path / "whole" / "curve.csv")
    assert curve["loss"].iloc[-1] == pytest.approx(plain["loss"].iloc[-1], rel=0.05)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match=r"precision.*delete"):
        Toy().fit(tmp_path / "mixed", precision="no")


def test_an_unsupported_precision_is_refused(tmp_path, fresh_state):
    with pytest.raises(ValueError, match="fp16"):
        Toy().fit(tmp_path, precision="fp16")
    assert not list(tmp_path.iterdir())


def counterfactual(base):
    torch.manual_seed(0)
    text = base.model.config.text_config.to_diff_dict() | {"num_hidden_layers": 1, "dropout": 0.0}
    return CounterfactualModel(text, base.model.config.qformer_config.hidden_size).attach(base)


def close(one, two, ignore="k_proj.bias"):  # the softmax cancels a key's bias: its gradient is rounding alone
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        if not name.endswith(ignore):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_gradient_checkpointing_computes_activations_again(blip2, records, tmp_path):
    calls, models = [], [counterfactual(blip2), counterfactual(blip2)]
    for model, again in zip(models, (False, True), strict=True):
        layer = model.language_model.model.decoder.layers[0]
        layer.fc1.register_forward_hook(lambda m, *_, again=again: calls.append(again) if m.training else None)
        train_counterfactual(
            model, records[:4], records[4:5], tmp_path / str(again), 1, batch_size=2, checkpointing=again
        )
    assert calls.count(True) == 2 * calls.count(False) == 4  # two batches, once and once more
    close(*models)


def test_parts_make_the_counterfactuals_step(blip2, records, tmp_path):
    """Its loss is a mean over tokens, of which parts have different numbers."""
    models = [counterfactual(blip2), counterfactual(blip2)]
    for parts, model in enumerate(models, 1):
        train_counterfactual(model, records[:6], records[6:7], tmp_path / str(parts), 1, batch_size=3, accumulate=parts)
    close(*models)


def test_parts_make_mends_step(blip2, records, tmp_path):
    """Of its two terms one is a mean over records, the other over tokens."""
    models = []
    for parts in (1, 2):
        torch.manual_seed(0)
        models.append(MendNetworks.beside(blip2, layers=1, rank=4))
        settings = {"batch_size": 3, "accumulate": parts, "patience": 2}
        curve = train_mend(MEND(blip2, models[-1]), records[:6], records[6:8], tmp_path / str(parts), 1, **settings)
        assert curve["validation_loss"].gt(0).all()
    close(*models)


def test_nothing_is_left_of_a_write_that_was_cut(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: stop())
    with pytest.raises(KeyboardInterrupt):
        Toy().fit(tmp_path / "part")
    monkeypatch.undo()
    assert all(p.suffix == ".tmp" for p in (tmp_path / "part").iterdir())
    Toy().fit(tmp_path / "part")
    assert files(tmp_path / "part") == whole[1]


def test_code_is_named_by_what_it_does(tmp_path, monkeypatch):
    """Not by comments, docstrings and layout, which change without it."""
    monkeypatch.syspath_prepend(tmp_path)
    path, name = tmp_path / "a_module_of_ours.py", "a_module_of_ours"

    def named(text):
        path.write_text(text)
        return code_of(name)

    first = named('"""What."""\n\n\ndef f(x):\n    """Say."""\n    return x + 1  # why\n')
    assert named('"""That."""\ndef f(x):\n    """Said."""\n    return (x +\n  1)\n') == first
    assert named('"""What."""\n\n\ndef f(x):\n    """Say."""\n    return x + 2  # why\n') != first
