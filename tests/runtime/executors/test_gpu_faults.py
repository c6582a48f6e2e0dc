"""What becomes of a policy when the GPU fails: every call of the driver that opening, warming up and inferring make."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from duq.plugins import driver
from duq.plugins.errors import DuqError, KernelError
from duq.runtime import EngineError, PlanError, Policy
from duq.runtime.executors import cuda
from tests.support.fake_driver import GIVES_BACK, ILLEGAL_ADDRESS, OUT_OF_MEMORY, FakeDriver
from tests.support.observations import image
from tests.support.plans import schedule, write_cuda_plan

NOISE = np.random.default_rng(0).standard_normal((50, 32), np.float32)
OBSERVATION = {
    "image": {"base_0_rgb": image(0)}, "state": np.ones(8, np.float32),
    "tokenized_prompt": np.arange(5), "tokenized_prompt_mask": np.ones(5, bool),
}  # fmt: skip

OPENING = (
    "cuInit", "cuDriverGetVersion", "cuDeviceGet", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent",
    "cuStreamCreate", "cuEventCreate", "cuMemGetInfo", "cuMemAlloc", "cuMemHostAlloc", "cuMemcpyHtoDAsync",
    "cuEventRecord", "cuEventSynchronize", "cuStreamSynchronize", "cuModuleLoadData", "cuModuleGetFunction",
    "cuFuncGetParamInfo", "cuFuncSetAttribute",
)  # fmt: skip
FIRST_CALL = (  # with the recording of its graph
    "cuCtxSetCurrent", "cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate", "cuEventCreate", "cuEventRecord",
    "cuEventRecordWithFlags", "cuStreamWaitEvent", "cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuMemsetD8Async",
    "cuLaunchKernelEx", "cuFuncSetAttribute", "cuGraphLaunch", "cuStreamSynchronize", "cuEventElapsedTime",
)  # fmt: skip
LATER_CALL = ("cuCtxSetCurrent", "cuGraphLaunch", "cuStreamSynchronize", "cuEventElapsedTime")


class Library:
    def prepare(self, problem, algorithm):
        pass

    def matmul(self, problem, algorithm, **operands):
        pass

    def close(self):
        pass


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu") / "engine.plan"
    write_cuda_plan(path)
    return path


@pytest.fixture
def gpu(monkeypatch):
    fake = FakeDriver(schedule())
    monkeypatch.setattr(driver, "_driver", lambda: fake)
    monkeypatch.setattr(cuda, "CublasLt", Library)
    monkeypatch.setattr(cuda, "STAGING_BYTES", 2 << 10)  # of which a piece takes a quarter
    monkeypatch.setattr(cuda, "WORKSPACE_BYTES", 1 << 10)
    driver._device.cache_clear()
    yield fake
    driver._device.cache_clear()


def infer(policy) -> np.ndarray:
    return policy.infer(OBSERVATION, NOISE)["actions"]


def called(fake, work) -> set[str]:
    before = fake.calls.copy()
    work()
    return {name for name in fake.calls if fake.calls[name] > before[name]} - GIVES_BACK


def test_the_functions_are_all_that_are_called(gpu, plan):
    """So that a call of the driver that is added is tested, too."""
    opened = []
    assert called(gpu, lambda: opened.append(Policy(plan))) == set(OPENING)
    assert called(gpu, lambda: infer(opened[0])) == set(FIRST_CALL)
    assert called(gpu, lambda: infer(opened[0])) == set(LATER_CALL)
    np.testing.assert_array_equal(infer(opened[0]), NOISE)  # kernels do nothing here: what was uploaded comes back


@pytest.mark.parametrize("status", [ILLEGAL_ADDRESS, OUT_OF_MEMORY], ids=["illegal address", "out of memory"])
@pytest.mark.parametrize("name", OPENING)
def test_opening_that_fails_holds_nothing(gpu, plan, name, status):
    """While the error is looked at, and whichever call it is."""
    with Policy(plan):
        times = gpu.calls[name]
    driver._device.cache_clear()
    for call in {(times + 1) // 2} if status is OUT_OF_MEMORY else {1, times}:
        gpu.fail(name, call, status)
        with pytest.raises((EngineError, PlanError)) as error:
            Policy(plan)
        assert not gpu.held, name
        assert name in str(error.value) and status.name[11:].replace("_", " ").lower() in str(error.value)
        assert ("no memory left: end what else uses it" in str(error.value)) == (status is OUT_OF_MEMORY)
        assert str(plan) in str(error.value) and "\n" not in str(error.value)
        driver._device.cache_clear()
    np.testing.assert_array_equal(infer(Policy(plan)), NOISE)


@pytest.mark.parametrize(("name", "warm"), [*((n, False) for n in FIRST_CALL), *((n, True) for n in LATER_CALL)])
def test_a_call_that_fails_leaves_a_policy_that_can_be_used(gpu, plan, name, warm):
    policy = Policy(plan)
    if warm:
        infer(policy)
    gpu.fail(name, 1, OUT_OF_MEMORY)
    with pytest.raises(EngineError, match=f"{name}: out of memory: .* end what else .*; the policy can still be used"):
        infer(policy)
    np.testing.assert_array_equal(infer(policy), NOISE)
    policy.close()
    assert not gpu.held


@pytest.mark.parametrize(("name", "warm"), [*((n, False) for n in FIRST_CALL), *((n, True) for n in LATER_CALL)])
def test_a_gpu_that_fails_for_good_is_not_asked_again(gpu, plan, name, warm):
    policy = Policy(plan)
    if warm:
        infer(policy)
    gpu.fail(name, 1, ILLEGAL_ADDRESS, for_good=True)
    says = f"plan: must be opened again, in a new process: the GPU or its driver failed .{name}: illegal address"
    with pytest.raises(EngineError, match=says):
        infer(policy)
    calls = gpu.calls.copy()
    for later in (lambda: infer(policy), policy.warmup, lambda: policy.infer_batch([OBSERVATION])):
        with pytest.raises(EngineError, match=says):
            later()
    assert gpu.calls == calls
    with pytest.raises(EngineError, match="cannot be opened"):
        policy.reload()
    policy.close()
    with pytest.raises(EngineError, match="is closed"):
        infer(policy)


def test_a_policy_that_failed_takes_a_new_plan_where_the_gpu_works_again(gpu, plan):
    policy = Policy(plan)
    gpu.fail("cuGraphLaunch", 1, for_good=True)
    with pytest.raises(EngineError):
        infer(policy)
    gpu.mend()
    policy.reload()
    np.testing.assert_array_equal(infer(policy), NOISE)


def test_out_of_memory_in_warm_up(gpu, plan):
    policy = Policy(plan)
    held = dict(gpu.held)
    gpu.fail("cuGraphInstantiate", 1, OUT_OF_MEMORY)
    with pytest.raises(EngineError, match="cuGraphInstantiate: out of memory: the GPU has no memory left"):
        policy.warmup()
    assert gpu.held == held
    policy.warmup()
    np.testing.assert_array_equal(infer(policy), NOISE)


def test_two_policies_on_one_card(gpu, plan):
    first, second = Policy(plan), Policy(plan)
    infer(first)
    of_both = len(gpu.held)
    first.close()
    np.testing.assert_array_equal(infer(second), NOISE)
    assert 0 < len(gpu.held) < of_both + 2
    second.close()
    assert not gpu.held


def test_a_policy_that_is_dropped_frees_the_memory(gpu, plan):
    policy = Policy(plan)
    infer(policy)
    del policy
    assert set(gpu.held.values()) <= {"cuModuleLoadData"}  # code, which a graph somewhere might still launch


def test_reload_holds_one_plan_again(gpu, plan):
    policy = Policy(plan)
    policy.warmup()
    held = sorted(gpu.held.values())
    policy.reload()
    assert sorted(gpu.held.values()) == held
    gpu.fail("cuMemAlloc", 1, OUT_OF_MEMORY)
    with pytest.raises(EngineError, match="cuMemAlloc: out of memory"):
        policy.reload()
    assert sorted(gpu.held.values()) == held
    np.testing.assert_array_equal(infer(policy), NOISE)


# --- batches: calls beside each other -----------------------------------------------------------------------------------

NOISES = np.random.default_rng(2).standard_normal((7, 50, 32), np.float32)


def infer_batch(policy, noises=NOISES) -> None:
    replies = policy.infer_batch([OBSERVATION] * len(noises), noises)
    np.testing.assert_array_equal([each["actions"] for each in replies], noises)


@pytest.mark.parametrize("in_flight", [None, 1, 2, 3])
def test_a_batch_opens_what_it_needs_and_no_second_copy_of_the_weights(gpu, plan, in_flight):
    policy = Policy(plan, in_flight=in_flight)
    infer(policy)
    infer_batch(policy, NOISES[:1])
    one, uploads = gpu.held.copy(), gpu.calls["cuModuleLoadData"]
    for _ in range(2):
        infer_batch(policy)
    lanes = in_flight or cuda.CudaExecutor.in_flight
    assert policy._opened.engine.lanes == policy.in_flight == lanes and gpu.calls["cuModuleLoadData"] == uploads
    allocated = [list(held.values()).count("cuMemAlloc") for held in (one, gpu.held)]
    assert allocated == [5, 5 + 4 * (lanes - 1)]  # an arena and three workspaces; and once the weights
    infer(policy)
    policy.close()
    assert not gpu.held


def test_batches_and_calls_of_many_threads(gpu, plan):
    policy = Policy(plan)
    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(infer_batch, policy) for _ in range(10)] + [pool.submit(infer, policy) for _ in range(20)]:
            done.result()
    assert policy._opened.engine.lanes == policy.in_flight


@pytest.mark.parametrize("name", ["cuStreamCreate", "cuEventCreate", "cuMemAlloc", "cuMemHostAlloc"])
def test_no_memory_for_a_second_call_leaves_the_policy_as_it_was(gpu, plan, name):
    policy = Policy(plan)
    infer(policy)
    held = gpu.held.copy()
    gpu.fail(name, 1, OUT_OF_MEMORY)
    with pytest.raises(EngineError, match=f"{name}: out of memory: .*; the policy can still be used"):
        infer_batch(policy)
    assert gpu.held == held
    infer_batch(policy)
    policy.close()
    assert not gpu.held


def test_too_little_memory_for_a_second_call_says_how_to_do_without(gpu, plan):
    policy = Policy(plan)
    gpu.gpu["free"] = 1 << 19
    with pytest.raises(PlanError, match="for one more call at a time, needs 0.00 GB .*; pass in_flight=1, or end"):
        infer_batch(policy)
    infer(policy)
    infer_batch(policy, NOISES[:1])


@pytest.mark.parametrize("call", [1, 2, 3, 7])
@pytest.mark.parametrize("name", LATER_CALL)
def test_a_call_of_a_batch_that_fails_ends_it(gpu, plan, name, call):
    policy = Policy(plan)
    infer_batch(policy)
    gpu.fail(name, call, OUT_OF_MEMORY)
    with pytest.raises(EngineError, match=f"{name}: out of memory: .*; the policy can still be used"):
        infer_batch(policy)
    assert policy._opened.engine._calls == 0
    infer_batch(policy)
    gpu.fail(name, call, ILLEGAL_ADDRESS, for_good=True)
    with pytest.raises(EngineError, match="must be opened again, in a new process"):
        infer_batch(policy)
    calls = gpu.calls.copy()
    with pytest.raises(EngineError, match="must be opened again, in a new process"):
        infer_batch(policy)
    assert gpu.calls == calls
    policy.close()


def test_reload_has_as_many_lanes_ready(gpu, plan):
    policy = Policy(plan)
    infer_batch(policy)
    policy.reload()
    held = sorted(gpu.held.values())
    policy.reload()
    assert sorted(gpu.held.values()) == held
    calls = gpu.calls["cuStreamBeginCapture"]
    infer_batch(policy)
    assert (
        gpu.calls["cuStreamBeginCapture"] == calls + policy.in_flight
    )  # of the size with one camera, which warm-up leaves out


@pytest.mark.parametrize("in_flight", [0, -1, 1.5, True, "2"])
def test_numbers_in_flight_that_are_none(gpu, plan, in_flight):
    with pytest.raises(PlanError, match=f"in_flight={in_flight!r}: expected a number of calls, 1 or more"):
        Policy(plan, in_flight=in_flight)
    assert not gpu.held


def test_a_fork_neither_uses_nor_frees_the_parent_s(gpu, plan, monkeypatch):
    policy = Policy(plan)
    held, calls = dict(gpu.held), gpu.calls.copy()
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: -1)
        with pytest.raises(EngineError, match="was opened by process .*, which this one was forked from"):
            infer(policy)
        with pytest.raises(KernelError, match="CUDA does not outlive a fork; start this one with multiprocessing's"):
            driver.open_device()
        with pytest.raises(DuqError, match="CUDA does not outlive a fork"):
            Policy(plan)
        policy.close()
        driver.Memory.close(policy._opened.engine.executor._arena)
        assert gpu.held == held and gpu.calls == calls
    np.testing.assert_array_equal(infer(policy), NOISE)
