"""Parts of a long run, each timed and watched: seconds, peak memory, and what went wrong, which ends no run."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from mscke.cost.peak import held


@dataclass(frozen=True)
class Row:
    """One part: ``seconds`` for each of ``n`` units (NaN if it failed), peak bytes on the GPU and of the process."""

    backbone: str
    part: str
    unit: str
    n: int
    seconds: float
    gpu: int
    host: int
    note: str = ""


@dataclass
class Log:
    """Runs parts one after the other until ``minutes`` are over; writes what is known after each."""

    write: Callable[[Log], None]
    minutes: float
    rows: list[Row] = field(default_factory=list)
    start: float = field(default_factory=perf_counter)

    @property
    def left(self) -> bool:
        return perf_counter() - self.start < 60 * self.minutes

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if row.note.startswith("FAILED")]

    def part(
        self,
        backbone: str,
        name: str,
        work: Callable[[], object],
        unit: str = "call",
        n: int = 1,
        warm: Callable[[], object] = lambda: None,
    ):
        """``work()`` timed and watched: what it returns, or None if it fails or the time is over.

        A string that it returns is noted beside its figures. ``warm()`` comes first and is not timed: what is done
        once a process, whatever the number of units.
        """
        if not self.left:
            self._add(Row(backbone, name, unit, n, np.nan, 0, 0, "not run: the time was over"))
            return None
        gpu = torch.cuda.is_initialized()
        if gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        begun, found, note = perf_counter(), None, ""
        try:
            warm()
            if gpu:
                torch.cuda.synchronize()
            begun = perf_counter()
            found = work()
            if gpu:
                torch.cuda.synchronize()
        except Exception as error:  # told of in the report, whatever it was
            traceback.print_exc()
            note = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        seconds = np.nan if note else (perf_counter() - begun) / n
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
        note = note or (found if isinstance(found, str) else "")
        self._add(Row(backbone, name, unit, n, seconds, peak, host_peak(), note))
        return found

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        told = f"{row.seconds:.3g} s a {row.unit}" if np.isfinite(row.seconds) else ""
        print(f"{row.backbone or 'shared':12} {row.part:34} {told:24} {row.note}", file=sys.stderr, flush=True)
        self.write(self)


def host_peak() -> int:
    """Peak memory of this process in bytes, whatever a GPU holds."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0 if torch.cuda.is_initialized() else held("VmHWM")
    line = next(li for li in status.read_text(encoding="utf-8").splitlines() if li.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


class Steps:
    """AdamW on ``loss(step)``, which must be finite."""

    def __init__(self, module: torch.nn.Module, loss: Callable[[int], torch.Tensor]):
        self.loss, self.told = loss, []
        self.optimiser = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-6)

    def __call__(self, n: int) -> str:
        """n more steps; the first and the last loss."""
        for _ in range(n):
            self.optimiser.zero_grad()
            (value := self.loss(len(self.told))).backward()
            self.optimiser.step()
            self.told.append(value.item())
        if not np.isfinite(self.told).all():
            raise ArithmeticError(f"a loss that is not finite: {self.told}")
        return f"loss {self.told[0]:.3g} to {self.told[-1]:.3g}"
