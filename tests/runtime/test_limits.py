"""Limits of a robot's actions: read from its file, carried by the plan, reported and never applied."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from duq.runtime.errors import PlanError
from duq.runtime.limits import LimitCheck
from duq.runtime.robots import Robot, load_robot, read_robot
from duq.runtime.schema import RobotDescription, check

LIBERO = load_robot("libero")
LIMITED = replace(LIBERO, limits={"x": (-1.1, 1.1), "gripper": (0.0, 1.0)})
TOML = """
name = "arm"
[[cameras]]
key = "front"
[[state]]
key = "joints"
names = ["elbow", "grip"]
[actions]
names = ["elbow", "grip"]
limits = LIMITS
"""


def described(tmp_path, limits: str) -> Robot:
    file = tmp_path / "arm.toml"
    file.write_text(TOML.replace("LIMITS", limits))
    return read_robot(file)


def test_a_file_s_limits_come_with_the_plan(tmp_path):
    robot = described(tmp_path, "{ elbow = [-90, 135.5] }")
    assert robot.limits == {"elbow": (-90.0, 135.5)}
    assert Robot.from_json(robot.to_json()) == robot and robot.to_json()["limits"] == {"elbow": [-90.0, 135.5]}
    assert "limits" not in LIBERO.to_json() and Robot.from_json(LIBERO.to_json()) == LIBERO


@pytest.mark.parametrize("limits", [
    "{ elbow = [90, -90] }", "{ elbow = [0, 0] }", "{ elbow = [0] }", "{ elbow = [0, 1, 2] }", "{ elbow = 3 }",
    "{ elbow = ['0', '1'] }", "{ elbow = [nan, 1] }", "{ elbow = [0, inf] }", "{ elbow = [false, true] }",
    "{ elbow = [0, '1', 2] }",
])  # fmt: skip
def test_what_is_no_range_is_refused(tmp_path, limits):
    with pytest.raises(PlanError, match=r"arm.toml: \[actions\] limits: elbow is .*, expected \[lowest, highest\]"):
        described(tmp_path, limits)


@pytest.mark.parametrize("limits", [{"x": [1.0, -1.0]}, {"x": [0.0]}, {"x": [0.0, "1"]}, {"knee": [0.0, 1.0]}, {"x": 3}, 3])
def test_a_plan_s_limits_are_checked_when_it_is_opened(limits):
    described = LIBERO.to_json()
    check(RobotDescription, described | {"limits": {"x": [-1.0, 1.0]}})
    with pytest.raises(PlanError, match="limits"):
        check(RobotDescription, described | {"limits": limits})


def test_limits_of_no_action_are_refused(tmp_path):
    with pytest.raises(PlanError, match="limits: 'knee' is no action, of elbow, grip"):
        described(tmp_path, "{ knee = [0, 1] }")
    with pytest.raises(PlanError, match="limits is .*, expected a table"):
        described(tmp_path, "[0, 1]")


def chunk(**values) -> np.ndarray:
    """Zeros [4, 7] but for some actions."""
    actions = np.zeros((4, 7), np.float32)
    for name, each in values.items():
        actions[:, LIBERO.action_names.index(name)] = each
    return actions


def test_what_is_outside_is_reported_by_action():
    limits = LimitCheck(LIMITED)
    assert limits.outside(chunk()) == []
    actions = chunk(x=[0, 1.5, -9, 1], gripper=[0, 1, 2, 0], y=100)
    before = actions.copy()
    assert limits.outside(actions) == [
        {"action": "x", "low": -1.1, "high": 1.1, "steps": 2, "first": 1, "worst": -9.0},
        {"action": "gripper", "low": 0.0, "high": 1.0, "steps": 1, "first": 2, "worst": 2.0},
    ]
    assert np.array_equal(actions, before)


def test_a_limit_itself_is_inside():
    """1.1 as a float32 is more than 1.1."""
    limits = LimitCheck(LIMITED)
    assert limits.outside(chunk(x=[1.1, -1.1, 1.1, -1.1], gripper=[0, 1, 0, 1])) == []
    assert limits.outside(chunk(x=np.nextafter(np.float32(1.1), np.float32(2))))


def test_each_action_is_counted_by_chunks_and_said_once(caplog):
    caplog.set_level(logging.WARNING)
    counts: Counter[str] = Counter()
    for limits in (LimitCheck(LIMITED, counts), LimitCheck(LIMITED, counts)):  # as before and after a reload
        for _ in range(3):
            limits.outside(chunk(x=5))
    limits.outside(chunk(gripper=-1))
    assert counts == {"x": 6, "gripper": 1}
    assert [record.message.split(" (")[0] for record in caplog.records] == [
        "robot libero: action x is 5 at step 0, outside of -1.1..1.1",
        "robot libero: action gripper is -1 at step 0, outside of 0..1",
    ]
