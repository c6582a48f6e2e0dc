"""The TensorRT executor's own work with stand-ins for the engines: staging, bindings, recording, order, replay, download.

A stand-in computes something of every tensor it is bound to, with torch, from the bare addresses.
"""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest

from duq.runtime.executors.tensorrt import MAX_GRAPHS, Calls
from tests.support import launch
from tests.support.stand_ins import (
    ACTIONS,
    SIZES,
    STEPS,
    StandIn,
    embed,
    expected_of_steps,
    expected_of_steps_with_history,
    observation,
    parts,
    policy,
    prefix,
    signatures_and_manifest,
    step,
    step_with_history,
)


@contextmanager
def calls(engines):
    launch.compute_capability()
    yield Calls(engines, *signatures_and_manifest(engines), embed)


def test_prefix_and_steps():
    engines = {"prefix": StandIn("prefix", prefix), "step": StandIn("step", step)}
    with calls(engines) as whole:
        for seed, size in enumerate([*SIZES, *SIZES]):
            inputs, noise = (
                observation(*size, seed),
                np.random.default_rng(seed).integers(-8, 8, ACTIONS).astype(np.float32),
            )
            actions, timing = whole.run(inputs, noise)
            np.testing.assert_array_equal(actions, expected_of_steps(inputs, noise))
            assert timing["prefix_ms"] > 0 and timing["denoise_ms"] > 0
        assert engines["prefix"].calls == 2 * len(SIZES), "a size is run once and recorded once; the rest is replay"
        assert engines["step"].calls == 2 * len(SIZES) * STEPS


def test_the_history_of_a_solver_moves_along_and_starts_at_zero():
    engines = {"prefix": StandIn("prefix", prefix), "step": StandIn("step", step_with_history)}
    with calls(engines) as whole:
        for seed, size in enumerate([*SIZES, *SIZES]):
            inputs = observation(*size, seed)
            noise = np.random.default_rng(seed).integers(-8, 8, ACTIONS).astype(np.float32)
            actions, _ = whole.run(inputs, noise)
            np.testing.assert_array_equal(actions, expected_of_steps_with_history(inputs, noise))


def test_one_engine():
    engines = {"policy": StandIn("policy", policy)}
    with calls(engines) as whole:
        whole.warmup()
        for seed, size in enumerate([*SIZES, *SIZES]):
            inputs, noise = observation(*size, seed), np.full(ACTIONS, seed, np.float32)
            actions, timing = whole.run(inputs, noise)
            _, last, token, state, _ = parts(inputs)
            np.testing.assert_array_equal(actions, 2 * noise + token + last + state)
            assert timing["policy_ms"] > 0


def test_the_number_of_graphs_is_bounded():
    engines = {"policy": StandIn("policy", policy)}
    with calls(engines) as whole:
        for prompt in range(1, MAX_GRAPHS + 3):
            whole.run(observation(1, prompt, prompt), np.zeros(ACTIONS, np.float32))
        assert len(whole._graphs) == MAX_GRAPHS


@pytest.mark.parametrize("name", ["prefix", "step"])
def test_an_engine_that_fails_leaves_the_stream_usable(name):
    def fail(t, shapes):
        raise RuntimeError("no")

    engines = {"prefix": StandIn("prefix", prefix), "step": StandIn("step", step)}
    with calls(engines) as whole:
        broken = engines[name].compute
        engines[name].compute = fail
        with pytest.raises(RuntimeError):
            whole.run(observation(1, 3, 0), np.zeros(ACTIONS, np.float32))
        engines[name].compute = broken
        inputs = observation(1, 3, 1)
        actions, _ = whole.run(inputs, np.zeros(ACTIONS, np.float32))
        np.testing.assert_array_equal(actions, expected_of_steps(inputs, np.zeros(ACTIONS, np.float32)))
