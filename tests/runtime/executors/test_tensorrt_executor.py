"""The TensorRT executor without a GPU: its driver is host memory, its engines the stand-ins of tests/gpu."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from duq.runtime.errors import PlanError
from duq.runtime.executors import tensorrt as executor
from tests.support.stand_ins import (
    ACTIONS,
    SIZES,
    Block,
    Event,
    StandIn,
    Stream,
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


class OnTheHost(StandIn):
    def enqueue(self, stream):
        assert set(self.bound) == set(self.types)
        self.compute({name: self.tensor(name) for name in self.types}, self.shapes)

    def at(self, address: int, size: int) -> torch.Tensor:
        return torch.from_numpy(np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)))


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.setattr(executor, "driver", SimpleNamespace(Memory=Block, PinnedArray=Block, Stream=Stream, Event=Event))

    def make(**computes) -> executor.Calls:
        engines = {name: OnTheHost(name, compute) for name, compute in computes.items()}
        return executor.Calls(engines, *signatures_and_manifest(engines), embed)

    return make


def test_prefix_and_steps(calls):
    whole = calls(prefix=prefix, step=step)
    for seed, size in enumerate([*SIZES, *SIZES]):
        inputs, noise = observation(*size, seed), np.random.default_rng(seed).integers(-8, 8, ACTIONS).astype(np.float32)
        actions, timing = whole.run(inputs, noise)
        np.testing.assert_array_equal(actions, expected_of_steps(inputs, noise))
        assert set(timing) == {"prefix_ms", "denoise_ms"}


def test_the_history_of_a_solver_moves_along_and_starts_at_zero(calls):
    whole = calls(prefix=prefix, step=step_with_history)
    for seed, size in enumerate([*SIZES, *SIZES]):
        inputs, noise = observation(*size, seed), np.random.default_rng(seed).integers(-8, 8, ACTIONS).astype(np.float32)
        actions, _ = whole.run(inputs, noise)
        np.testing.assert_array_equal(actions, expected_of_steps_with_history(inputs, noise))


def test_one_engine(calls):
    whole = calls(policy=policy)
    whole.warmup()
    for seed, size in enumerate(SIZES):
        inputs, noise = observation(*size, seed), np.full(ACTIONS, seed, np.float32)
        actions, timing = whole.run(inputs, noise)
        _, last, token, state, _ = parts(inputs)
        np.testing.assert_array_equal(actions, 2 * noise + token + last + state)
        assert set(timing) == {"policy_ms"}


@pytest.mark.parametrize(
    ("section", "version"), [({}, 1), ({"plugins_version": executor.PLUGINS_VERSION + 1}, executor.PLUGINS_VERSION + 1)]
)
def test_plugins_of_another_version_are_refused(section, version, monkeypatch):
    """Before anything of the plan but its manifest is read, or TensorRT is loaded."""
    monkeypatch.setattr(executor, "driver", SimpleNamespace(open_device=lambda: 86))
    monkeypatch.setattr(executor, "trt", None)
    plan = SimpleNamespace(path="old.plan", manifest={"graphs": {"sm86": section}})
    says = f"old.plan: its plugins are of version {version}, this runtime's of version 2; compile it again"
    with pytest.raises(PlanError, match=says):
        executor.TensorRTExecutor(plan)
