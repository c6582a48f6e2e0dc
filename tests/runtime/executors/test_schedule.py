"""The schema of a cuda plan's schedule: how an error reads, and that any edit is refused or leaves every number in bounds."""

import copy
import json
import re

import pytest
from hypothesis import HealthCheck, given, settings

import duq.runtime.plan
from duq.runtime.errors import PlanError
from duq.runtime.executors.schedule import Context, check_schedule, read_schedule
from duq.runtime.plan import Plan
from tests.support.json_edits import edited
from tests.support.plans import CONFIG, schedule, write_cuda_plan

SIZES = {"weights/w": 4000, "cubin/sm90/0": 64, "ptx/sm90/0": 64}
CONTEXT = Context(CONFIG.to_json(), 10, 3, SIZES)


@pytest.fixture(autouse=True)
def no_wait(monkeypatch):
    monkeypatch.setattr(duq.runtime.plan, "_TICK_NS", 0)


def test_a_schedule_is_read(tmp_path):
    write_cuda_plan(tmp_path / "engine.plan")
    assert read_schedule(Plan(tmp_path / "engine.plan"), "schedule/sm90.json") == schedule()


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        ("arena_bytes", 0, "arena_bytes is 0; it should be greater than or equal to 1"),
        ("arena_bytes", 10_000, "variants.0: images ends at "),
        ("weights.w", [0, 4001], "weights.w has 4001 bytes, its entry 4000"),
        ("weights.w", [1 << 40, 4000], "weights.w is at offset 1099511627776, the one before ends at 0"),
        ("weights.v", [0, 10], "weights.v has 10 bytes, its entry None"),
        ("kernels.0.cubin", "other", "kernels.0.cubin is 'other', which is no entry of the plan"),
        ("kernels.0.parameters.2", ["count", "long"], "kernels.0.parameters: count is of type 'long', expected a pointer"),
        ("calls.cublaslt", [], "calls.cublaslt has parameters that this runtime does not call it with"),
        ("variants.1.cameras", 1, "variants: 2 are for 1 cameras and 48 prompt tokens"),
        ("variants.0.inputs.x", [0, 4], "variants.0.inputs.x is of 4 bytes, expected 6400 bytes"),
        ("variants.0.zeroed", [[1 << 20, 1]], "variants.0: zeroed 1048576 ends at 1048577, beyond arena_bytes 1048576"),
        ("variants.0.outputs.key\\.0.rows", 1 << 20, "variants.0.outputs.key.0 lies beyond the arena"),
        ("variants.0.outputs.key\\.0.after", 2, "variants.0.outputs.key.0 lies beyond the arena, or after a launch that is not"),
        ("variants.0.step", [], "variants.0.step is a list of 0; list should have at least 1 item"),
        ("variants.0.prefix.0.kernel", 1, "variants.0.prefix.0 (norm): kernel is 1, there are 1"),
        ("variants.0.prefix.0.grid", [-1, 1, 1], "variants.0.prefix.0.grid.0 is -1; it should be greater than or equal to 1"),
        ("variants.0.prefix.0.grid", [1, 1, 70000], "variants.0.prefix.0 (norm): grid [1, 1, 70000] in clusters None is more"),
        ("variants.0.prefix.0.threads", 2048, "variants.0.prefix.0.threads is 2048; it should be less than or equal to 1024"),
        ("variants.0.prefix.0.call", "cublaslt", "variants.0.prefix.0 (norm): has a kernel and a call, or neither"),
        ("variants.0.prefix.0.args.x", ["a", 1 << 20], 'variants.0.prefix.0 (norm): args.x is ["a", 1048576]'),
        ("variants.0.prefix.0.args.x", ["a", -1], "variants.0.prefix.0 (norm): args.x is"),
        ("variants.0.prefix.0.args.x", 5, "variants.0.prefix.0 (norm): args.x is 5, which is no const float* of this"),
        ("variants.0.prefix.0.args.weight", ["w", "w", 500, 0], "variants.0.prefix.0 (norm): args.weight is"),
        ("variants.0.prefix.0.args.weight", ["w", "v", 0, 0], "variants.0.prefix.0 (norm): args.weight is"),
        ("variants.0.prefix.0.args.count", 1 << 31, "variants.0.prefix.0 (norm): args.count is 2147483648"),
        ("variants.0.prefix.0.args.count", True, "variants.0.prefix.0 (norm): args.count is true"),
        ("variants.0.prefix.0.args.epsilon", ["f", 1e39], "variants.0.prefix.0 (norm): args.epsilon is"),
        ("variants.0.prefix.0.args.more", 1, "variants.0.prefix.0 (norm): is given the arguments x, weight, count, epsilon, more"),
        ("variants.0.step.0.wait_for", [2], "variants.0.step.0 (norm): waits for launch 2, which is not before it"),
        ("variants.0.prefix.0.wait_for", [0], "variants.0.prefix.0 (norm): waits for launch 0, which is not before it"),
    ],
)  # fmt: skip
def test_an_error_names_the_launch_and_what_is_wrong(place, value, says):
    data = copy.deepcopy(schedule())
    *keys, last = [key.replace("\\.", ".") for key in re.split(r"(?<!\\)\.", place)]
    holder = data
    for key in keys:
        holder = holder[int(key) if isinstance(holder, list) else key]
    holder[int(last) if isinstance(holder, list) else last] = value
    with pytest.raises(PlanError) as error:
        check_schedule(data, CONTEXT)
    assert str(error.value).startswith(says)


def with_a_chain() -> dict:
    """A schedule whose step is three launches, of which the last two are a chain."""
    data = copy.deepcopy(schedule())
    parameters = data["kernels"][0]["parameters"]
    both = [[f"part{part}_{name}", kind] for part in (0, 1) for name, kind in parameters]
    links = [["links", "int*"], ["stale_links", "int*"]]
    data["kernels"].append(data["kernels"][0] | {"expression": "chain", "parameters": [*both, *links]})
    for variant in data["variants"]:
        variant["step"] *= 3
        args = {"links": ["a", 256], "stale_links": ["a", 320]}
        variant["chains"] = [
            {"first": 1, "last": 2, "kernel": 1, "grid": [8, 1, 1], "threads": 128, "shared": 1024, "args": args}
        ]
    return data


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"first": 2}, "is of launches 2 to 2, expected some from 0 on, up to 2"),
        ({"last": 3}, "is of launches 1 to 3, expected some from 0 on, up to 2"),
        ({"first": 0}, "its kernel does not take the arguments of launches 0 to 2"),
        ({"kernel": 0}, "its kernel does not take the arguments of launches 1 to 2"),
        ({"kernel": 2}, "kernel is 2, there are 2"),
        ({"args": {"links": ["a", 256]}}, "is given the arguments links"),
        ({"args": {"links": ["a", 1 << 20], "stale_links": ["a", 0]}}, 'args.links is ["a", 1048576], which is no int*'),
        ({"args": {"links": 5, "stale_links": ["a", 0]}}, "args.links is 5, which is no int*"),
    ],
)
def test_what_a_chain_may_say(change, says):
    check_schedule(with_a_chain(), CONTEXT)
    data = with_a_chain()
    data["variants"][0]["chains"][0] |= change
    with pytest.raises(PlanError) as error:
        check_schedule(data, CONTEXT)
    assert str(error.value).startswith(f"variants.0.chains.0: {says}")


def test_chains_follow_each_other_and_make_no_calls():
    data = with_a_chain()
    data["variants"][0]["chains"] *= 2
    with pytest.raises(PlanError, match=re.escape("variants.0.chains.1: is of launches 1 to 2, expected some from 3 on")):
        check_schedule(data, CONTEXT)
    data = with_a_chain()
    data["variants"][0]["step"][2] = data["variants"][0]["prefix"][1]
    with pytest.raises(PlanError, match=re.escape("variants.0.chains.0: is of launches 1 to 2, of which one is a call")):
        check_schedule(data, CONTEXT)


@pytest.mark.parametrize("missing", ["state", "past"])
def test_an_input_that_the_executor_writes_has_a_place(missing):
    data = copy.deepcopy(schedule())
    del data["variants"][0]["inputs"][missing]
    with pytest.raises(PlanError, match=f"variants.0.inputs.{missing} is missing, expected"):
        check_schedule(data, CONTEXT)


@given(data=edited(json.loads(json.dumps(schedule()))))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_edit_is_refused_or_stays_in_bounds(tmp_path, data):
    """Bounds computed here, from the schedule as it is followed."""
    write_cuda_plan(tmp_path / "engine.plan", **data)
    plan = Plan(tmp_path / "engine.plan")
    try:
        found = read_schedule(plan, "schedule/sm90.json")
    except PlanError as error:
        assert str(error).startswith(f"{plan.path}: schedule/sm90.json") and "\n" not in str(error)
        return
    arena, weight = found["arena_bytes"], found["weights"]["w"][1]
    for variant in found["variants"]:
        assert all(offset + size <= arena for offset, size in variant["inputs"].values())
        for launch in [*variant["prefix"], *variant["step"]]:
            for argument in launch["args"].values():
                match argument:
                    case ["a", offset]:
                        assert 0 <= offset < arena
                    case ["w", _, step_bytes, offset]:
                        assert 0 <= offset and 0 <= step_bytes and offset + 9 * step_bytes < weight
                    case int():
                        assert -(2**31) <= argument < 2**31


def test_nesting_without_end(tmp_path):
    write_cuda_plan(tmp_path / "engine.plan")
    plan = Plan(tmp_path / "engine.plan")
    for text, says in ((b"[" * 100_000, "is nested deeper"), (b"\xff", "is not JSON"), (b"3", "is 3, expected an object")):
        plan.read = lambda name, text=text: text
        with pytest.raises(PlanError, match=f"engine.plan: schedule/sm90.json {says}"):
            read_schedule(plan, "schedule/sm90.json")
