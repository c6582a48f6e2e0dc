"""Tasks on all cores: results in order, few of them held, and no task started after one has failed."""

from __future__ import annotations

import time

import pytest
import torch

from duq.compiler.parallel import in_order, thread_pool


def test_results_come_in_order_and_few_are_held():
    started = []

    def task(number: int) -> int:
        started.append(number)
        time.sleep(0.002 * (number % 3))
        return number

    with thread_pool() as pool:
        for seen, result in enumerate(in_order(pool, ((lambda n=n: task(n), 10) for n in range(40)), limit=30)):
            assert result == seen and len(started) <= seen + 1 + 3


def test_a_task_larger_than_the_limit_runs_alone():
    with thread_pool() as pool:
        assert list(in_order(pool, [(lambda n=n: n, 100) for n in range(5)], limit=1)) == list(range(5))


def test_a_failure_is_raised_in_its_turn_and_stops_the_rest():
    started = []

    def task(number: int) -> int:
        started.append(number)
        if number == 3:
            raise ValueError("three")
        return number

    with thread_pool() as pool, pytest.raises(ValueError, match="three"):
        list(in_order(pool, ((lambda n=n: task(n), 1) for n in range(1000)), limit=4))
    assert len(started) < 10


def test_torch_has_its_threads_back():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    with thread_pool() as pool:
        assert pool.submit(torch.get_num_threads).result() == 1
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)
