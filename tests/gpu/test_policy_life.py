"""A policy's life on a GPU: what it took comes back, and a GPU that failed is not asked again."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from duq.plugins import driver
from duq.runtime import EngineError, Policy
from tests.gpu.test_whole_policy import policy as plans_of
from tests.support.observations import image

NOTICEABLE = 32 << 20


@pytest.fixture(scope="module")
def plan(directory):
    return plans_of("pi0", "all", directory)[1]["cuda"]


def infer(policy: Policy) -> np.ndarray:
    size, horizon = policy.metadata, policy.metadata["action_horizon"]
    observation = {
        "image": {"base_0_rgb": image(0)}, "state": np.ones(8, np.float32),
        "tokenized_prompt": np.arange(5), "tokenized_prompt_mask": np.ones(5, bool),
    }  # fmt: skip
    return policy.infer(observation, np.ones((horizon, size["model_action_dim"]), np.float32))["actions"]


@pytest.mark.alone
def test_opening_reloading_and_closing_leave_no_memory_behind(plan):
    with Policy(plan) as policy:
        expected = infer(policy)
    free = driver.free_memory()[0]
    for _ in range(10):
        with Policy(plan) as policy:
            np.testing.assert_array_equal(infer(policy), expected)
            policy.reload()
            np.testing.assert_array_equal(infer(policy), expected)
    assert free - driver.free_memory()[0] < NOTICEABLE


def test_two_policies_share_the_card(plan):
    with Policy(plan) as first, Policy(plan) as second:
        expected = infer(first)
        np.testing.assert_array_equal(infer(second), expected)
        first.close()
        np.testing.assert_array_equal(infer(second), expected)
        with pytest.raises(EngineError, match="is closed"):
            infer(first)


FAILS = """
import sys
import pytest
from duq.plugins import driver
from duq.plugins.nvrtc import Cubin
from duq.runtime import EngineError, Policy
from tests.gpu.test_policy_life import infer

PTX = ".version 7.0\\n.target sm_80\\n.address_size 64\\n.visible .entry bad() { .reg .b64 %a; .reg .b32 %r; " \\
    "mov.u64 %a, 16; mov.u32 %r, 1; st.global.u32 [%a], %r; ret; }"
with Policy(sys.argv[1]) as policy:
    infer(policy)
    executor = policy._opened.engine.executor
    kernel = driver.load(Cubin(PTX.encode() + b"\\0", {"bad": "bad"}))["bad"]
    kernel.launch(driver.Shape((1, 1, 1), 1, 0), [], executor._stream.handle)
    for _ in range(2):
        with pytest.raises(EngineError, match="plan: must be opened again, in a new process: .*illegal memory access"):
            infer(policy)
    with pytest.raises(EngineError):
        Policy(sys.argv[1])
print("ended")
"""


def test_an_illegal_address_ends_in_errors_that_say_so(plan):
    """In a process of its own, whose context is lost."""
    ran = subprocess.run([sys.executable, "-c", FAILS, str(plan)], capture_output=True, text=True, timeout=300)
    assert ran.stdout == "ended\n", ran.stderr
