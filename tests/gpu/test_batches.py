"""Batches on a GPU: calls that run at once give what they give alone, to the bit, and share the weights."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from duq.plugins import driver
from duq.runtime import Policy
from tests.gpu.test_whole_policy import policy as plans_of
from tests.support.observations import image

SLOTS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


@pytest.fixture(scope="module", params=["pi0", "pi05"])
def plan(request, directory):
    return plans_of(request.param, "llm+expert-mlp", directory)[1]["cuda"]


def observations(count: int) -> list[dict]:
    """Of 1 to 3 cameras and prompts of every length: neighbors follow different graphs."""
    return [
        {
            "image": {
                slot: image(10 * index + camera, (30 + index, 40, 3)) for camera, slot in enumerate(SLOTS[: 1 + index % 3])
            },
            "state": np.full(8, index / 10, np.float32),
            "tokenized_prompt": np.arange(index, index + 1 + index % 40),
            "tokenized_prompt_mask": np.ones(1 + index % 40, bool),
        }
        for index in range(count)
    ]


def noises(policy: Policy, count: int) -> np.ndarray:
    shape = (count, policy.metadata["action_horizon"], policy.metadata["model_action_dim"])
    return np.random.default_rng(0).standard_normal(shape, np.float32)


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_a_batch_equals_single_calls_to_the_bit(plan, in_flight):
    with Policy(plan, in_flight=in_flight) as policy:
        found, noise = observations(48), noises(policy, 48)
        expected = [policy.infer(*each)["actions"] for each in zip(found, noise, strict=True)]
        for size in (1, 2, 5, 48):
            for start in range(0, 48, size):
                replies = policy.infer_batch(found[start : start + size], noise[start : start + size])
                np.testing.assert_array_equal([each["actions"] for each in replies], expected[start : start + size])
        same = policy.infer_batch([found[2]] * 64, [noise[2]] * 64)
        assert all(np.array_equal(each["actions"], expected[2]) for each in same)


def test_batches_and_single_calls_of_threads(plan):
    with Policy(plan) as policy:
        found, noise = observations(12), noises(policy, 12)
        expected = [policy.infer(*each)["actions"] for each in zip(found, noise, strict=True)]

        def batch() -> bool:
            replies = policy.infer_batch(found, noise)
            return all(np.array_equal(each["actions"], one) for each, one in zip(replies, expected, strict=True))

        def single() -> bool:
            return all(np.array_equal(policy.infer(*each)["actions"], one)
                       for each, one in zip(zip(found, noise, strict=True), expected, strict=True))  # fmt: skip

        with ThreadPoolExecutor(4) as pool:
            assert all(done.result() for done in [pool.submit(work) for _ in range(10) for work in (batch, single)])


@pytest.mark.alone
def test_batches_leave_no_memory_behind_nor_take_more_with_time(plan):
    free = []
    for _ in range(3):
        with Policy(plan) as policy:
            found = observations(12)
            policy.infer_batch(found)
            policy.infer_batch(found)
            before = driver.free_memory()[0]
            for _ in range(20):
                policy.infer_batch(found)
            assert driver.free_memory()[0] == before
        free.append(driver.free_memory()[0])
    assert free[0] - free[-1] < 32 << 20
