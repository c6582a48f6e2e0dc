"""duq-compare A.plan B.plan, and the made-up observations that it and duq-bench take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from duq.runtime.observations import save_observations
from duq.runtime.plan import Plan, PlanWriter
from duq.runtime.policy import Policy
from duq.tools.compare import main
from duq.tools.compare_plans import Side, summarize
from duq.tools.made_up import robot_observations

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def plans(tiny_plans):
    return tiny_plans("pi0", "none").plan, tiny_plans("pi0", "llm+expert-mlp").plan


def rewritten(plan: Path, to: Path, **changes) -> Path:
    """The same plan with other sections in its manifest."""
    source = Plan(plan)
    with PlanWriter(to) as writer:
        for name in source.names:
            writer.write(name, bytes(source.read(name)))
        writer.finish(source.manifest | changes)
    return to


def test_a_plan_equals_itself(plans, command_line):
    ran = command_line(main, plans[0], plans[0], "--count", 2, "--json", "--min-cosine", 1, "--max-robot-error", 0)
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert all(each["max_error"] == 0 and each["sqnr_db"] is None for each in found["dimensions"])
    assert found["failures"] == [] and found["settings_that_differ"] == {} and found["in_robot_units"]


def test_errors_are_those_of_the_policies_in_the_robot_s_units(plans, command_line, tmp_path):
    data = tmp_path / "observations.npz"
    observations = robot_observations(Plan(plans[0]), 1, seed=3)
    save_observations(data, observations)
    ran = command_line(main, *plans, "--observations", data, "--seed", 5, "--json")
    found = json.loads(ran.out)
    one, other = (Policy(plan) for plan in plans)
    noise = np.random.default_rng([5, 0]).standard_normal((8, 32), np.float32)
    error = one.infer(observations[0], noise)["actions"] - other.infer(observations[0], noise)["actions"]
    assert found["count"] == 1 and len(found["dimensions"]) == 7
    np.testing.assert_allclose([each["max_error"] for each in found["dimensions"]], np.abs(error).max(0), rtol=1e-3)
    np.testing.assert_allclose([each["rms_error"] for each in found["dimensions"]], np.sqrt((error**2).mean(0)), rtol=1e-3)
    assert [each["name"] for each in found["dimensions"]][-1] == "gripper"
    assert found["second"]["recipe"]["include"] != found["first"]["recipe"]["include"]


def test_a_threshold_that_is_broken_is_exit_code_1(plans, command_line):
    ran = command_line(main, *plans, "--count", 1, "--min-sqnr", 200, "--max-robot-error", 1e-9)
    assert ran.code == 1 and ran.err.count("failed: ") == 2 and "--max-robot-error" in ran.err
    assert "gripper" in ran.out and "normalized" in ran.out


def test_other_robots_and_sizes_are_refused(plans, tmp_path, command_line):
    manifest = Plan(plans[0]).manifest
    robot = manifest["robot_description"]
    for changes, says in (
        ({"model": manifest["model"] | {"action_horizon": 9}}, "their action horizon differ: 8 and 9"),
        ({"robot_description": None, "robot": "none"}, "their robot differ: libero and none"),
        ({"robot_description": robot | {"action_units": ["rad"] * 7}}, "their units differ"),
    ):
        other = rewritten(plans[0], tmp_path / "other.plan", **changes)
        ran = command_line(main, plans[0], other)
        assert ran.code == 2 and says in ran.err and ran.err.count("\n") == 1


@pytest.mark.parametrize(
    "option",
    [("--report", "r.html"), ("--any-checkpoint",), ("--base", "b"), ("--criterion", "stage=9,3"), ("--fail-on", "look")],
)
def test_options_about_a_checkpoint_are_refused(plans, command_line, option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = command_line(main, *plans, *option)
    assert ran.code == 2 and f"{option[0]}: is for a comparison with a checkpoint" in ran.err


def test_settings_that_differ_are_shown(plans, command_line, tmp_path):
    other = rewritten(plans[0], tmp_path / "other.plan", num_steps=2)
    found = json.loads(command_line(main, plans[0], other, "--count", 1, "--json").out)
    assert found["settings_that_differ"] == {"denoising steps": ["4", "2"]}


def test_measures_without_a_robot_are_of_normalized_actions(plans, tmp_path):
    bare = Plan(rewritten(plans[0], tmp_path / "bare.plan", robot_description=None, robot="none"))
    reference = np.ones((2, 8, 32), np.float32)
    changed = reference.copy()
    changed[1, :, 4] = 0.5
    found = summarize((bare, bare), Side(reference, None), Side(changed, None))
    assert not found["in_robot_units"] and found["dimensions"][4]["unit"] == "normalized"
    assert [each["max_error"] for each in found["dimensions"]] == [0.5 if index == 4 else 0 for index in range(32)]
    assert [each["actions"]["max_error"] for each in found["by_observation"]] == [0, 0.5]


def test_made_up_observations_are_the_robot_s(plans):
    plan = Plan(plans[0])
    first, last = robot_observations(plan, 2, seed=1)
    assert set(first) == {
        "observation/image", "observation/wrist_image", "observation/state", "tokenized_prompt", "tokenized_prompt_mask"
    }  # fmt: skip
    assert len(first["tokenized_prompt"]) == 48 and len(last["tokenized_prompt"]) == 1
    stats = plan.manifest["norm_stats"]["state"]
    assert (np.abs(first["observation/state"] - np.array(stats["mean"])[:8]) <= np.array(stats["std"])[:8] + 1e-6).all()
    again = robot_observations(plan, 2, seed=1)[0]
    assert all(np.array_equal(first[key], again[key]) for key in first)


def test_it_needs_no_torch(plans):
    code = f"""
import sys
sys.modules["torch"] = sys.modules["onnx"] = None
sys.argv = ["x", {str(plans[0])!r}, {str(plans[0])!r}, "--count", "1", "--json"]
from duq import commands
commands.compare()
"""
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=False, env=variables)
    assert ran.returncode == 0 and json.loads(ran.stdout)["count"] == 1, ran.stderr
