"""Work in several processes: our own on a plain CPU, or those that ``accelerate launch`` started.

Our own have one thread each: two small models train faster beside each other than one after the other on
two threads, and give the same bytes however many there are. On Linux they are forks of this process and begin
with all that it has loaded.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

PATIENCE = timedelta(hours=6)  # that processes wait for one that works alone


def one_thread() -> None:
    """Make this process as every worker is: one thread, tiny numbers flushed to zero (they cost ten times)."""
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def processes(cpu: bool = False) -> PartialState:
    """The processes that ``accelerate launch`` started, this one among them; without it this one alone.

    The first call decides whether they meet on the ``cpu``: if it says so, or ACCELERATE_USE_CPU, or no GPU is there.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    cpu = cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    return PartialState(cpu=cpu, timeout=PATIENCE)


def accelerated(accumulate: int, precision: str | None, cpu: bool) -> Accelerator:
    """What joins :func:`processes` in a training. It leaves a model where it is, on the ``cpu`` or not.

    Raises ValueError for what is not supported: fp16, and parameters sharded by FSDP, DeepSpeed or Megatron.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType

    processes(cpu)
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # a fusion need not use them all
    found = Accelerator(
        device_placement=False, mixed_precision=precision, gradient_accumulation_steps=accumulate,
        kwargs_handlers=[unused],
    )  # fmt: skip
    sharded = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if found.distributed_type in sharded or found.mixed_precision not in ("no", "bf16"):
        raise ValueError(
            f"training under {found.distributed_type.value} in {found.mixed_precision} is not supported: "
            "launch with --multi_gpu and --mixed_precision no or bf16"
        )
    return found


def forks() -> bool:
    """Whether our processes are forks of this one: on Linux, where no GPU is in use.

    A fork with one thread can compute, as in torch's DataLoader; elsewhere they are new interpreters.
    """
    import torch

    return sys.platform == "linux" and not torch.cuda.is_available()


def in_processes(
    function: Callable, items: Iterable[tuple], workers: int = 2, desc: str = "", fresh: bool = False
) -> list[Any]:
    """``[function(*item) for item in items]``, ``workers`` at a time, in the items' order.

    With ``fresh`` each item has a process that did nothing before it.

    ``function`` must be importable by name. The first error stops what has not begun and is raised here.
    Where ``accelerate launch`` started several processes the items are done one after the other, and all
    processes share each of them.
    """
    items = list(items)
    if processes().num_processes > 1:
        return [function(*item) for item in items]
    context = multiprocessing.get_context("fork" if forks() and not fresh else "spawn")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers has threads, and warns of forks
    workers, tasks = min(workers, os.cpu_count() or 1), 1 if fresh else None
    with ProcessPoolExecutor(workers, context, one_thread, max_tasks_per_child=tasks) as pool:
        futures = [pool.submit(function, *item) for item in items]
        try:
            for future in tqdm(as_completed(futures), total=len(items), desc=desc, mininterval=2):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]
