"""Independent work in processes of one thread each: two small models train faster beside each other
than one after the other on two threads, and give the same bytes however many there are."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from tqdm import tqdm


def one_thread() -> None:
    """Make this process as every worker is: one thread, tiny numbers flushed to zero (they cost ten times)."""
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def in_processes(function: Callable, items: Iterable[tuple], workers: int = 2, desc: str = "") -> list[Any]:
    """``[function(*item) for item in items]``, ``workers`` at a time, in the items' order.

    ``function`` must be importable by name. The first error stops what has not begun and is raised here.
    """
    items = list(items)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, os.cpu_count() or 1), context, one_thread) as pool:
        futures = [pool.submit(function, *item) for item in items]
        try:
            for future in tqdm(as_completed(futures), total=len(items), desc=desc, mininterval=2):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]
