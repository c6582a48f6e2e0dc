"""A thread for each core, for work that numpy and torch do outside the interpreter's lock."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Result = TypeVar("Result")


@contextmanager
def thread_pool() -> Iterator[ThreadPoolExecutor]:
    """A thread for each core, in which torch starts no threads of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def in_background(task: Callable[[], Result]) -> Future[Result]:
    """Starts the task in a thread of its own."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(task)
    pool.shutdown(wait=False)
    return future


def in_order(pool: Executor, tasks: Iterable[tuple[Callable[[], Result], int]], limit: int) -> Iterator[Result]:
    """The results of (task, size) pairs in order, each task started while those before it have less than `limit` in sum.

    Unlike `pool.map`, which would hold the results of all tasks that are ahead of their reader.
    """
    pending: deque = deque()
    size = 0
    try:
        for task, own in tasks:
            while size >= limit:
                future, done = pending.popleft()
                yield future.result()
                size -= done
            pending.append((pool.submit(task), own))
            size += own
        while pending:
            yield pending.popleft()[0].result()
    finally:
        for future, _ in pending:
            future.cancel()
