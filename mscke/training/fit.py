"""The training loop of all that is trained here: on any number of processes, resumable at any step.

Under ``accelerate launch`` a batch is split among the processes and gradients are averaged (Hugging Face
Accelerate, torch's DistributedDataParallel): a run takes the same steps on one process as on many.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

from mscke.system.workers import accelerated
from mscke.training.checkpoint import gpus, publish, published, random_state, read, save, set_random_state, stop_asked

USUAL = {"precision": "no", "patience": 0, "clip": 1.0, "rates": {}}  # named in a checkpoint only where they differ
Loss = Callable[[Tensor, slice], Tensor]


def fit(
    model: nn.Module,
    loss: Loss,
    evaluate: Callable[[], dict[str, float]],
    n: int,
    folder: Path,
    epochs: int,
    lr: float,
    batch_size: int,
    seed: int,
    made_of: dict,
    held: Callable[[], float] | None = None,
    accumulate: int = 1,
    precision: str | None = None,
    checkpointing: bool = False,
    save_every: int = 0,
    patience: int = 0,
    clip: float = 1.0,  # the gradient's largest norm
    rates: dict[str, float] | None = None,
) -> pd.DataFrame:
    """AdamW with one cosine cycle over (epochs × batches): trains in place, returns the curve, a row an epoch.

    ``loss(batch, part)`` is what the slice ``part`` of a batch's rows (long) adds to the batch's loss. Over
    parts it sums to that loss, so a step depends neither on the number of processes nor on ``accumulate``,
    the number of parts that each takes in turn. ``precision``, one a process: "no", "bf16", or what ``accelerate
    launch`` was told. ``checkpointing``: a model that can computes activations again instead of keeping them.
    ``rates``: rates other than ``lr``, by how the names of the parameters end that they are for.

    A checkpoint is written every epoch, every ``save_every`` steps, and, when the run is interrupted, after
    the step under way; from it a run goes on as if never stopped. Weights and curve beside it are for others
    to read. With ``patience`` a run ends when the validation loss (``held()``, or as ``evaluate()`` has it)
    has not fallen for that many epochs, and the best epoch's weights are kept; without it the last one's.

    Raises ValueError if ``folder`` holds a run of other arguments, and as :func:`mscke.system.workers.accelerated`.
    """
    for part in model.modules() if checkpointing else ():
        if getattr(part, "supports_gradient_checkpointing", False):
            part.activation_checkpointing_enable({"use_reentrant": False})
    accelerator = accelerated(accumulate, precision, next(model.parameters()).device.type == "cpu")
    made_of = made_of | {"epochs": epochs, "lr": lr, "batch_size": batch_size, "seed": seed}
    told = {"precision": precision or "no", "patience": patience, "clip": clip, "rates": rates or {}}
    made_of |= {name: value for name, value in told.items() if value != USUAL[name]}
    run = _Run(accelerator, model, folder, made_of, n)
    if not run.over():
        run.train(loss, evaluate, held if patience else None, save_every)
    if run.best:
        model.load_state_dict(run.best)
    model.eval()
    return pd.DataFrame(run.rows)


def grouped(model: nn.Module, lr: float, rates: dict[str, float]) -> list[dict]:
    """The trainable parameters by their rates, as torch's optimisers take them; ValueError if a rate is for none."""
    groups = {end: [] for end in ("", *rates)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[next((end for end in rates if name.endswith(end)), "")].append(parameter)
    if idle := [end for end in rates if not groups[end]]:
        raise ValueError(f"no parameter's name ends with {' or '.join(map(repr, idle))}: nothing has this rate")
    return [{"params": found, "lr": rates.get(end, lr)} for end, found in groups.items() if found]


class _Forward(nn.Module):
    """Makes a loss the forward pass of the model that it is of, which is what Accelerate wraps."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, loss: Callable[[], Tensor]) -> Tensor:
        return loss()


class _Run:
    """A run as far as it went: a row an epoch, and the steps and summed loss of the epoch under way."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, folder: Path, made_of: dict, n: int):
        self.accelerator, self.model, self.folder = accelerator, model, folder
        self.made_of, self.n = made_of, n
        self.patience, self.clip = (made_of.get(name, USUAL[name]) for name in ("patience", "clip"))
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        groups = grouped(model, made_of["lr"], made_of.get("rates", {}))
        self.optimiser = torch.optim.AdamW(groups, weight_decay=0.01)
        steps = made_of["epochs"] * -(-n // made_of["batch_size"])
        self.schedule = OneCycleLR(self.optimiser, [g["lr"] for g in groups], steps, pct_start=0.1)
        self._resume()

    def over(self) -> bool:
        """Whether the last epoch is done, or the validation loss has not fallen for long enough."""
        waited = len(self.rows) - self._lowest() if self.patience and self.rows else 0
        return len(self.rows) == self.made_of["epochs"] or waited >= max(1, self.patience)

    def _lowest(self) -> int:
        """The epoch, from 1, whose validation loss was lowest."""
        return min(self.rows, key=lambda row: row["validation_loss"])["epoch"]

    def train(self, loss: Loss, evaluate: Callable, held: Callable | None, save_every: int) -> None:
        """Go on until the run is over; KeyboardInterrupt, with all that was done saved, if asked to stop."""
        forward, optimiser = self.accelerator.prepare(_Forward(self.model), self.optimiser)
        quiet = not self.accelerator.is_local_main_process or None
        steps, done = self.schedule.total_steps, self.schedule.last_epoch
        bar = tqdm(total=steps, initial=done, desc=self.folder.name, disable=quiet, mininterval=2)
        with bar, stop_asked(self.accelerator):
            while not self.over():
                with torch.random.fork_rng(gpus()):  # dropout repeats; the caller's numbers are left alone
                    self.model.train()
                    for batch in self._order():
                        self._step(batch, loss, forward, optimiser)
                        self._after_step(save_every)
                        bar.update()
                self.model.eval()
                self._after_epoch(evaluate() | ({"validation_loss": held()} if held else {}))
                bar.set_postfix({k: round(v, 3) for k, v in self.rows[-1].items()})

    def _order(self) -> tuple[Tensor, ...]:
        """The batches that this epoch has left: rows (long), the same in every process."""
        seed, rank = 1000 * self.made_of["seed"] + len(self.rows), self.accelerator.process_index
        torch.manual_seed(seed)
        batches = torch.randperm(self.n).split(self.made_of["batch_size"])
        if rank:
            torch.manual_seed(seed + 1_000_003 * rank)  # what is dropped out is each process's own
        if self.random:
            set_random_state(self.random.pop())
        return batches[self.done :]

    def _step(self, batch: Tensor, loss: Loss, forward: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        """One step of the optimiser, of which this process computes every ``num_processes``-th part."""
        accelerator, n = self.accelerator, len(batch)
        parts = accelerator.num_processes * accelerator.gradient_accumulation_steps
        forward.zero_grad()
        for place in range(accelerator.process_index, parts, accelerator.num_processes):
            part = slice(n * place // parts, n * (place + 1) // parts)
            empty = part.start == part.stop  # of a small last batch: all processes must take part
            with accelerator.accumulate(forward):
                share = forward(partial(loss, batch, slice(0, 1) if empty else part)) * (not empty)
                accelerator.backward(share * parts)  # Accelerate takes their mean, and the sum is meant
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self.parameters, self.clip)
                optimiser.step()
            self.total += share.item() * n
        self.schedule.step()
        self.done += 1

    def _after_step(self, save_every: int) -> None:
        asked = self.accelerator.check_trigger()
        if asked or (save_every and self.schedule.last_epoch % save_every == 0):
            random = gather_object([random_state()])
            self._save({"done": self.done, "total": self._sum(), "random": random})
        if asked:
            raise KeyboardInterrupt(f"{self.folder}: stopped between two steps; the next call goes on")

    def _after_epoch(self, measured: dict[str, float]) -> None:
        row = {"epoch": len(self.rows) + 1, "loss": self._sum() / self.n} | measured
        self.rows += broadcast_object_list([row])  # the first process's, should theirs differ in the last bit
        if self.patience and self._lowest() == len(self.rows):
            self.best = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.done, self.total = 0, 0.0
        self._save({})
        if self.accelerator.check_trigger():
            raise KeyboardInterrupt(f"{self.folder}: stopped between two epochs; the next call goes on")

    def _sum(self) -> float:
        """The epoch's summed loss over all processes."""
        total = torch.tensor(self.total, dtype=torch.float64)
        return self.accelerator.reduce(total.to(self.accelerator.device)).item()

    def _resume(self) -> None:
        saved = read(self.folder, self.made_of)
        self.rows, self.best = saved.get("rows", []), saved.get("best", {})
        for name in ("model", *(() if self.over() else ("optimiser", "schedule"))) if saved else ():
            getattr(self, name).load_state_dict(saved[name])
        within, rank = saved.get("within", {}), self.accelerator.process_index
        self.done, self.random = within.get("done", 0), within.get("random", [])[rank : rank + 1]
        self.total = within.get("total", 0.0) if rank == 0 else 0.0
        behind = not within and published(self.folder) < len(self.rows)  # it was stopped between the two
        if behind and self.accelerator.is_main_process:
            publish(self.folder, self.best or self.model.state_dict(), self.rows)

    def _save(self, within: dict) -> None:
        """Replace the checkpoint and, after a whole epoch, what others read. Every process waits for it."""
        state = {name: getattr(self, name).state_dict() for name in ("model", "optimiser", "schedule")}
        state |= {"made_of": self.made_of, "rows": self.rows, "best": self.best, "within": within}
        if self.accelerator.is_main_process:
            save(self.folder, state)
            if not within:
                publish(self.folder, self.best or state["model"], self.rows)
        self.accelerator.wait_for_everyone()
