"""The CPU executor when ONNX Runtime fails; what it computes is tested against the integer reference in tests/compiler."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as state

from duq.runtime import EngineError, Policy
from duq.runtime.errors import PlanError
from duq.runtime.executors import cpu
from tests.support.observations import OBSERVATIONS

CLASSES = [each for each in vars(state).values() if isinstance(each, type) and issubclass(each, Exception)]


@pytest.fixture(scope="module")
def policy(tiny_plans):
    with Policy(tiny_plans("pi0", "none").plan, threads=1, seed=0) as opened:
        yield opened


def test_onnxruntime_has_no_error_that_is_not_caught():
    assert {"Fail", "InvalidArgument", "InvalidProtobuf", "InvalidGraph"} <= {each.__name__ for each in CLASSES}
    assert all(issubclass(each, cpu.ONNXRUNTIME_ERRORS) for each in [*CLASSES, RuntimeError, ValueError, MemoryError])


@pytest.mark.parametrize("error", [*CLASSES, RuntimeError, ValueError, MemoryError], ids=lambda each: each.__name__)
def test_a_call_that_onnxruntime_fails_is_one_error_and_the_next_works(policy, monkeypatch, error):
    executor, observation, noise = policy._opened.engine.executor, OBSERVATIONS["libero"](), np.zeros((8, 32), np.float32)
    expected = policy.infer(observation, noise)["actions"]

    def fail(*_):
        raise error("no room")

    with monkeypatch.context() as patch:
        failing = SimpleNamespace(get_inputs=executor._step.get_inputs, run_with_ort_values=fail)
        patch.setitem(executor.__dict__, "_step", failing)
        with pytest.raises(EngineError, match=f"plan: ONNX Runtime failed .{error.__name__}: no room"):
            policy.infer(observation, noise)
    np.testing.assert_array_equal(policy.infer(observation, noise)["actions"], expected)


@pytest.mark.parametrize("error", CLASSES, ids=lambda each: each.__name__)
def test_a_graph_that_cannot_be_loaded_is_a_plan_error(tiny_plans, monkeypatch, error):
    def fail(*_, **__):
        raise error("no such operator")

    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    with pytest.raises(PlanError, match="plan: ONNX Runtime .* cannot load its prefix graph: .*no such operator"):
        Policy(tiny_plans("pi0", "none").plan).warmup()
