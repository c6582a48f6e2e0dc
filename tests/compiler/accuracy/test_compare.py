"""The comparison of an engine with its checkpoint: the measures, the stages, and tools/compare.py as a user runs it."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rich.progress import Progress

import duq.compiler.accuracy.compare
import duq.tools.compare
import duq.tools.compare_checkpoint
from duq.compiler.accuracy.compare import compare
from duq.compiler.accuracy.metrics import Difference, difference, jerk
from duq.compiler.accuracy.reference import tensors
from duq.compiler.accuracy.report import drawn_units, joint_panels, joint_table
from duq.compiler.accuracy.stages import Stages
from duq.compiler.accuracy.thresholds import Thresholds
from duq.compiler.accuracy.worker import run_worker
from duq.compiler.checkpoint import load_checkpoint
from duq.compiler.checkpoint.synthetic import make_checkpoint
from duq.compiler.model import build_model
from duq.plugins.errors import DuqError
from duq.runtime import Policy
from duq.runtime.observations import save_observations
from duq.runtime.plan import Plan
from duq.runtime.preprocess import Preprocessor
from duq.runtime.solver import Solver
from tests.support.comparison import run_here, two_observations

TOOLS = Path(duq.tools.compare.__file__).parent
W4A8 = "llm+expert-mlp"
STAGES = ["image_features", "keys", "values", "velocity_at_engine_x", "velocity", "actions", "robot_actions"]

# --- measures --------------------------------------------------------------------------------------------------------

values = st.floats(-1e3, 1e3, width=32)
pairs = st.integers(1, 60).flatmap(lambda size: st.tuples(*[hnp.arrays(np.float32, size, elements=values)] * 2))


@given(pairs, st.integers(0, 60))
def test_measures_against_their_formulas(pair, split):
    reference, engine = (array.astype(np.float64) for array in pair)
    found = Difference()
    for part in (slice(0, split), slice(split, None)):  # however the values arrive
        found.add(pair[0][part], pair[1][part])
    assert found.max_error == max(abs(r - e) for r, e in zip(reference, engine, strict=True))
    size, error = np.linalg.norm(reference), np.linalg.norm(reference - engine)
    if size > 1e-9 and np.linalg.norm(engine) > 1e-9:
        assert found.cosine == pytest.approx(reference / size @ (engine / np.linalg.norm(engine)), abs=1e-9)
    if size > 1e-9 and error > 1e-9:
        assert found.sqnr_db == pytest.approx(20 * math.log10(size / error), abs=1e-6)
    halves = [difference(pair[0][part], pair[1][part]) for part in (slice(0, split), slice(split, None))]
    assert Difference.sum(halves).to_json() == pytest.approx(found.to_json(), nan_ok=True)


def test_measures_at_the_edges():
    zeros, ones = np.zeros(3, np.float32), np.ones(3, np.float32)
    assert difference(ones, ones).to_json() == {"cosine": 1.0, "max_error": 0.0, "sqnr_db": math.inf}
    assert difference(zeros, zeros).cosine == 1 and difference(zeros, ones).cosine == 0
    assert difference(zeros, ones).sqnr_db == -math.inf
    assert difference(ones, -ones).cosine == pytest.approx(-1)
    bad = difference(ones, np.array([1, np.nan, 1], np.float32))
    bad.add(ones, ones)  # what comes later does not hide it
    assert all(math.isnan(value) for value in bad.to_json().values())
    with pytest.raises(ValueError, match="cannot compare"):
        difference(ones, np.ones((3, 1), np.float32))


def test_jerk_is_the_mean_squared_third_difference():
    actions = np.random.default_rng(0).standard_normal((2, 9, 4)).astype(np.float32)
    a = actions.astype(np.float64)
    squares = [(a[n, t + 3] - 3 * a[n, t + 2] + 3 * a[n, t + 1] - a[n, t]) ** 2 for n in range(2) for t in range(6)]
    assert jerk(actions) == pytest.approx(np.mean(squares))
    time = np.arange(20.0)[:, None]
    assert jerk(0.5 * time**3) == pytest.approx((6 * 0.5) ** 2) and jerk(3 * time**2 - time) == pytest.approx(0)
    assert jerk(np.zeros((3, 2))) is None


def test_thresholds_name_the_worst_observation():
    def observation(cosine, max_error, sqnr_db):
        return {"actions": {"cosine": cosine, "max_error": max_error, "sqnr_db": sqnr_db}}

    good, worse = observation(0.99, 0.1, 20.0), observation(0.95, 0.2, 15.0)
    assert Thresholds().failures([good, worse]) == Thresholds(0.95, 0.2, 15.0).failures([good, worse]) == []
    failures = Thresholds(0.96, 0.15, 16.0).failures([good, worse])
    assert [line.split(" is past ")[1] for line in failures] == ["--min-cosine 0.96", "--max-error 0.15", "--min-sqnr 16"]
    assert all("observation 1" in line for line in failures)
    broken = observation(math.nan, math.nan, math.nan)
    assert len(Thresholds(0.5, 9.0, 1.0).failures([good, broken])) == 4  # every bound, and that it is not finite
    assert "not finite" in Thresholds().failures([good, broken])[0]


# --- stages ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tiny_plans):
    """(policy, preset) -> the comparison of that plan over `two_observations`."""

    @functools.cache
    def result(policy: str, quant: str):
        source, path = tiny_plans(policy, quant)
        checkpoint = load_checkpoint(source)
        with pytest.MonkeyPatch.context() as patch, Progress(disable=True) as progress:
            patch.setattr(duq.compiler.accuracy.compare, "run_worker", run_here)
            return compare(checkpoint, Plan(path), two_observations(checkpoint.config), progress, threads=1)

    return result


def all_measures(summary: dict) -> dict[str, dict]:
    """Of every stage, and of every layer and step."""
    parts = {f"{kind}.{index}": layer[kind] for index, layer in enumerate(summary["layers"]) for kind in ("key", "value")}
    steps = {
        f"{kind}.{index}": step[kind] for index, step in enumerate(summary["steps"]) for kind in step if kind != "time"
    }
    return summary["stages"] | parts | steps


@pytest.mark.parametrize("policy", ["pi0", "pi05"])
def test_a_float_plan_is_the_checkpoint(compared, policy):
    summary = compared(policy, "none").summary
    assert list(summary["stages"]) == STAGES and len(summary["layers"]) == 2 and len(summary["steps"]) == 4
    for name, found in all_measures(summary).items():
        assert found["sqnr_db"] > 100 and found["cosine"] > 1 - 1e-10 and found["max_error"] < 1e-3, name
    assert summary["linears"]["sqnr"] == {}


@pytest.mark.parametrize("policy", ["pi0", "pi05"])
def test_a_quantized_plan_is_further_off(compared, policy):
    summary = compared(policy, W4A8).summary
    for name, found in all_measures(summary).items():
        low, high = (80, 200) if name == "image_features" else (8, 60)  # SigLIP stays in float
        assert low < found["sqnr_db"] < high, name
    linears = summary["linears"]["sqnr"]
    assert [found["sqnr_db"] for found in linears.values()] == sorted(found["sqnr_db"] for found in linears.values())
    assert "llm.layers.0.mlp.down_proj" in linears and "expert.layers.1.mlp.up_proj" in linears
    assert all(8 < found["sqnr_db"] < 60 and found["weight_bits"] == 4 for found in linears.values())


def test_actions_are_those_of_the_policy_and_of_the_model(compared, tiny_plans):
    """What is compared, against the public interface of either side and the measures' formulas."""
    source, path = tiny_plans("pi0", W4A8)
    comparison, checkpoint = compared("pi0", W4A8), load_checkpoint(source)
    policy, model = Policy(path, threads=1), build_model(checkpoint)
    preprocessor = Preprocessor(
        checkpoint.config, robot="libero", norm_stats=checkpoint.norm_stats, tokenizer=checkpoint.tokenizer.read_bytes()
    )
    for index, observation in enumerate(two_observations(checkpoint.config)):
        noise = np.random.default_rng([0, index]).standard_normal((8, 32), np.float32)
        engine = policy.infer(observation, noise)["actions"]
        inputs = tensors(preprocessor.model_inputs(observation))
        reference = model.sample_actions(*inputs, torch.from_numpy(noise)[None], num_steps=4)[0].numpy()
        np.testing.assert_allclose(comparison.reference[index], reference[:, :7], atol=1e-5)  # LIBERO reads 7
        if index == 0:
            engine = engine[:, :7]
            np.testing.assert_allclose(comparison.engine[0], engine, atol=1e-6)
            found = comparison.summary["observations"][0]
            assert (found["cameras"], found["prompt_tokens"]) == (1, 48)
            expected = reference[:, :7]
        else:
            found = {"actions": comparison.summary["stages"]["robot_actions"]}
            expected = preprocessor.robot_actions(reference, observation)
            third = np.diff(expected.astype(np.float64), 3, axis=0)
            assert comparison.summary["jerk"]["robot"]["reference"] == pytest.approx(np.square(third).mean(), rel=1e-4)
        error = np.abs(engine - expected)
        assert found["actions"]["max_error"] == pytest.approx(error.max(), rel=1e-3)
        sqnr = 10 * math.log10(np.square(expected).sum() / np.square(error).sum())
        assert found["actions"]["sqnr_db"] == pytest.approx(sqnr, abs=0.01)


def test_what_a_worker_cannot_do_is_said_by_the_parent(tmp_path):
    with pytest.raises(DuqError, match="nothing.plan: cannot be read: No such file"):
        run_worker("duq.compiler.accuracy.engine", [tmp_path, 1, 1, tmp_path / "nothing.plan"], lambda: None)
    with pytest.raises(DuqError, match=r"no_such_module failed \(1\)"):
        run_worker("no_such_module", [], lambda: None)


# --- the tool --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tool(compared, command_line, monkeypatch):
    """(checkpoint, plan, *options) -> Ran, with the comparisons that are there already. The policies' weights are random: no
    verdict fails, unless a test says so."""

    def recall(checkpoint, plan, *_, **__):
        return compared("pi05" if checkpoint.config.pi05 else "pi0", Path(plan.path).name.split(".")[1])

    monkeypatch.setattr(duq.tools.compare_checkpoint, "compare", recall)

    def run(*arguments):
        options = () if "--fail-on" in arguments else ("--fail-on", "never")
        return command_line(duq.tools.compare.main, *arguments, *options)

    return run


def finite_json(text: str) -> dict:
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_as_a_script_with_nothing_but_the_two_paths(tiny_plans, tmp_path):
    """From another directory, with modules in it that must not be taken for ours or the standard library's."""
    source, path = tiny_plans("pi0", W4A8)
    (tmp_path / "runtime").mkdir()
    for name in ("profile.py", "compiler.py", "runtime/__init__.py"):
        (tmp_path / name).write_text("raise ImportError('not this one')")
    (tmp_path / "engine.plan").hardlink_to(path)
    command = [
        sys.executable,
        TOOLS / "compare.py",
        source,
        "engine.plan",
        "--json",
        "--threads",
        "1",
        "--fail-on",
        "never",
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    summary = finite_json(result.stdout)
    assert "made up" in summary["source"] and len(summary["observations"]) == 3 and summary["failures"] == []
    assert {found["cameras"] for found in summary["observations"]} == {1, 2, 3}
    for side in ("reference", "engine"):
        cost = summary["cost"][side]
        assert cost["peak_bytes"] > cost["libraries_bytes"] > 1e7
        assert len(cost["milliseconds"]) == 3 and cost["median_ms"] == sorted(cost["milliseconds"])[1]
    assert (
        summary["cost"]["engine"]["libraries_bytes"] < 0.6 * summary["cost"]["reference"]["libraries_bytes"]
    )  # no PyTorch


def test_every_tool_imports_from_the_repository():
    for script in TOOLS.glob("*.py"):
        text = script.read_text()
        if 'if __name__ == "__main__"' in text:
            assert text.count("    sys.path[0] = str(Path(__file__).resolve().parents[1])\n") == 1, script


def test_json(tool, tiny_plans):
    result = tool(*tiny_plans("pi0", "none"), "--json", "--min-sqnr", 60)
    summary = finite_json(result.out)
    assert result.code == 0 and "made up" in summary["source"] and summary["thresholds"] == {"min_sqnr": 60}
    assert set(summary) == {
        "source", "command", "verdict", "thresholds", "failures", "checkpoint", "plan", "reference", "threads", "seed", "date",
        "machine", "versions", "stages", "layers", "steps", "observations", "linears", "jerk", "cost", "dimensions", "range",
        "chunk", "padding_dimensions",
    }  # fmt: skip
    measures = [*all_measures(summary).values(), *(found["actions"] for found in summary["observations"])]
    for found in measures:
        assert set(found) == {"cosine", "max_error", "sqnr_db"} and all(type(value) is float for value in found.values())
    assert set(summary["jerk"]) == {"model", "robot"} and set(summary["cost"]) == {"reference", "engine", "speedup"}


def test_infinite_and_nan_are_null(compared):
    summary = compared("pi0", "none").summary
    altered = duq.compiler.accuracy.compare.Comparison({**summary, "a": math.inf, "b": [math.nan, 1.5]}, None, None)
    found = finite_json(duq.tools.compare_checkpoint.to_json(altered, []))
    assert found["a"] is None and found["b"] == [None, 1.5]


def test_text_names_every_stage_and_the_worst_linears(tool, tiny_plans, compared):
    result = tool(*tiny_plans("pi05", W4A8))
    assert result.code == 0
    for stage in STAGES:
        assert stage.replace("_", " ") in result.out
    linears = list(compared("pi05", W4A8).summary["linears"]["sqnr"])
    assert all(name in result.out for name in linears[:10]) and linears[10] not in result.out
    assert max(map(len, result.out.splitlines()[1:])) <= 80


def test_text_and_json_name_every_action_that_the_robot_reads(tool, tiny_plans, monkeypatch):
    """And none that it does not, but under the key that says so."""
    out = tool(*tiny_plans("pi0", W4A8)).out
    assert out.count("axis_angle_z") == 1 and out.count("gripper") == 1 and "action 7" not in out and "RMS error" in out
    summary = finite_json(tool(*tiny_plans("pi0", W4A8), "--json").out)
    assert [each["name"] for each in summary["dimensions"]] == [
        "x",
        "y",
        "z",
        "axis_angle_x",
        "axis_angle_y",
        "axis_angle_z",
        "gripper",
    ]
    assert summary["padding_dimensions"]["count"] == 25 and summary["padding_dimensions"]["max_error"] > 0


def test_a_comparison_says_where_it_comes_from(tool, tiny_plans):
    summary = finite_json(tool(*tiny_plans("pi0", W4A8), "--json").out)
    assert summary["versions"]["duq"] == duq.__version__ == summary["plan"]["compiled_by"]["duq"]
    written = datetime.fromisoformat(summary["date"].replace("Z", "+00:00"))
    assert abs((datetime.now(timezone.utc) - written).total_seconds()) < 3600
    assert summary["machine"]["cores"] == len(os.sched_getaffinity(0)) and summary["machine"]["gpu"] is None
    weights = next(tiny_plans("pi0", W4A8).checkpoint.glob("*.safetensors"))
    assert summary["checkpoint"]["fingerprint"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert summary["command"].startswith("program ") and str(tiny_plans("pi0", W4A8).plan) in summary["command"]


def test_each_dimension_against_the_formulas(compared, tiny_plans):
    """In normalized units over all observations, in the robot's over its own; padding and joints do not leak."""
    comparison = compared("pi0", W4A8)
    robot = comparison.robot
    assert list(robot.reference) == list(robot.engine) == [1]
    for index, found in enumerate(comparison.summary["dimensions"]):
        pairs = {
            "normalized": (comparison.reference[..., index], comparison.engine[..., index]),
            "robot": (robot.reference[1][:, index], robot.engine[1][:, index]),
        }
        for units, (reference, engine) in pairs.items():
            reference, error = reference.astype(np.float64), (engine - reference).astype(np.float64)
            assert found[units]["max_error"] == pytest.approx(np.abs(error).max(), rel=1e-5)
            assert found[units]["rms_error"] == pytest.approx(np.sqrt(np.square(error).mean()), rel=1e-5)
            sqnr = 10 * math.log10(np.square(reference).sum() / np.square(error).sum())
            assert found[units]["sqnr_db"] == pytest.approx(sqnr, abs=1e-3)
    per_dimension = [found["normalized"]["max_error"] for found in comparison.summary["dimensions"]]
    assert comparison.summary["stages"]["actions"]["max_error"] == max(per_dimension)


def test_dimensions_that_only_pad_count_nowhere_else():
    """Whatever the engine computes there, no measure changes but the one of the padding."""
    random = np.random.default_rng(0)
    basis = {"image_features": np.ones((1, 1)), "key.0": np.ones(1), "value.0": np.ones(1)}
    x, v = random.normal(size=(3, 5, 6)), random.normal(size=(2, 5, 6))
    reference = basis | {"v": v, "v_at_engine_x": v, "actions": x[2]}

    def measured(noise: float) -> dict:
        engine = basis | {"x": x + 0, "actions": x[2] + 0}
        for key in ("x", "actions"):
            engine[key][..., 4:] += noise * random.normal(size=engine[key][..., 4:].shape)
        stages = Stages(Solver("euler", 2), True, [None], dims=4)
        stages.add(reference, engine)
        return stages.to_json()

    quiet, loud = measured(0), measured(100)
    assert quiet.pop("padding_dimensions")["max_error"] == 0 and loud.pop("padding_dimensions")["max_error"] > 10
    assert quiet == loud
    every = Stages(Solver("euler", 2), True, [None], dims=6)
    every.add(reference, basis | {"x": x, "actions": x[2]})
    assert every.to_json()["padding_dimensions"] is None


class Arm:
    """A robot that names its actions."""

    action_names, action_units = ("shoulder", "elbow", "grip"), ("rad", "rad", "")


def test_joints_are_named_with_their_units(compared):
    names, units = duq.compiler.accuracy.compare.action_labels(SimpleNamespace(robot=Arm(), action_dim=3))
    assert (names, units) == (["shoulder", "elbow", "grip"], ["rad", "rad", ""])
    bare = SimpleNamespace(robot=None, action_dim=2)
    assert duq.compiler.accuracy.compare.action_labels(bare) == (["action 0", "action 1"], ["", ""])
    random = np.random.default_rng(0)
    chunks = random.normal(size=(2, 5, 3)).astype(np.float32)
    summary = dict(compared("pi0", "none").summary)
    summary["dimensions"] = [
        {"name": n, "unit": u, "normalized": {}, "robot": {"max_error": 1}, "percent_of_range": {}}
        for n, u in zip(names, units, strict=True)
    ]
    summary["observations"] = [{"actions": {"max_error": 0.1}}, {"actions": {"max_error": 0.2}}]
    robot = duq.compiler.accuracy.compare.RobotActions({1: chunks[1]}, {1: chunks[1]})
    comparison = duq.compiler.accuracy.compare.Comparison(summary, chunks, chunks, robot)
    panels = joint_panels(comparison)
    assert [(panel["name"], panel["unit"]) for panel in panels] == list(zip(names, units, strict=True))
    assert drawn_units(comparison) == "the robot's units"
    comparison.robot = None
    assert [panel["unit"] for panel in joint_panels(comparison)] == ["", "", ""]  # the model's numbers are not radians
    assert [row[:2] for row in joint_table(summary)] == [("shoulder", "rad"), ("elbow", "rad"), ("grip", "-")]


def test_bounds_in_the_robot_s_units():
    def observation(error, robot):
        robot = None if robot is None else {"max_error": robot, "worst_dimension": "elbow"}
        return {"actions": {"cosine": 1.0, "max_error": error, "sqnr_db": 50.0}, "robot_actions": robot}

    observations = [observation(9.0, None), observation(0.1, 2.0), observation(0.1, 1.0)]
    bounds = Thresholds(max_robot_error=1.5).failures(observations)
    assert bounds == ["robot actions of observation 1: max_error 2 (elbow) is past --max-robot-error 1.5"]
    assert Thresholds(max_robot_error=2.0).failures(observations) == []
    assert len(Thresholds(max_error=8.0, max_robot_error=0.5).failures(observations)) == 2
    assert "observation 2" in Thresholds(max_robot_error=2.0).failures([*observations[:2], observation(0.1, math.nan)])[0]


@pytest.mark.parametrize("flag", ["--min-cosine", "--max-error", "--min-sqnr", "--max-robot-error"])
@pytest.mark.parametrize("bound", ["nan", "inf", "-inf"])
def test_bounds_that_are_no_bounds_are_refused(tool, tiny_plans, flag, bound):
    result = tool(*tiny_plans("pi0", "none"), flag, bound)
    assert result.code == 2 and result.err == f"error: {flag} {bound}: must be a finite number\n"


def test_a_bound_in_the_robot_s_units_takes_the_robot_s_observations(tool, tiny_plans, tmp_path, compared):
    result = tool(*tiny_plans("pi0", W4A8), "--max-robot-error", 1)
    assert result.code == 2 and "--max-robot-error: no observation is one of a robot (the plan's: libero)" in result.err
    observation = two_observations(load_checkpoint(tiny_plans("pi0", W4A8).checkpoint).config)[1]
    save_observations(tmp_path / "robot.npz", [observation])
    found = compared("pi0", W4A8).summary["observations"][1]["robot_actions"]["max_error"]
    options = [*tiny_plans("pi0", W4A8), "--observations", tmp_path / "robot.npz", "--max-robot-error"]
    assert tool(*options, found * 1.01).code == 0
    result = tool(*options, found * 0.99)
    assert result.code == 1 and "robot actions of observation 1" in result.err and "(gripper)" in result.err


def test_past_a_threshold_the_exit_code_is_1(tool, tiny_plans, tmp_path):
    bounds = ["--min-cosine", 0.9999999, "--max-error", 1e-9, "--min-sqnr", 100]
    result = tool(*tiny_plans("pi0", W4A8), *bounds, "--report", tmp_path / "report.html")
    assert result.code == 1
    assert result.err.count("failed: actions of observation") == 3
    page = (tmp_path / "report.html").read_text()
    assert 'class="verdict fail"' in page and page.count("is past --") == 3
    result = tool(*tiny_plans("pi0", W4A8), "--min-cosine", 0.5, "--max-error", 10, "--min-sqnr", 3)
    assert result.code == 0 and "failed" not in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("quant", ["none", W4A8])
def test_the_page_has_the_verdict_and_the_worst_linears(tool, tiny_plans, compared, tmp_path, quant):
    assert tool(*tiny_plans("pi0", quant), "--min-sqnr", 3, "--report", tmp_path / "report.html").code == 0
    page = (tmp_path / "report.html").read_text().replace("<wbr>", "")
    assert 'class="verdict look"' in page and "made up" in page and "min sqnr 3." in page
    for name in list(compared("pi0", quant).summary["linears"]["sqnr"])[:10]:
        assert name in page
    assert compared("pi0", quant).summary["checkpoint"]["fingerprint"] in page


def test_the_verdict_is_the_exit_code_that_was_asked_for(tool, tiny_plans, tmp_path, compared):
    """A float plan passes on a robot's observation; on made-up ones it is worth a look, whatever its errors."""
    float_plan, robot = tiny_plans("pi0", "none"), tmp_path / "robot.npz"
    save_observations(robot, [two_observations(load_checkpoint(float_plan.checkpoint).config)[1]])
    result = tool(*float_plan, "--fail-on", "look")
    assert result.code == 1 and "Verdict: look" in result.out and "made up" in result.out
    assert tool(*float_plan, "--fail-on", "fail").code == 0
    result = tool(*float_plan, "--observations", robot, "--fail-on", "look")
    assert result.code == 0 and "Verdict: pass" in result.out
    quantized = (*tiny_plans("pi0", W4A8), "--observations", robot, "--criterion", "joint-error=0.001,0.002")
    result = tool(*quantized, "--fail-on", "fail", "--json")
    verdict = finite_json(result.out)["verdict"]
    assert result.code == 1 and verdict["result"] == "fail" and "expected at most 0.002%" in verdict["reasons"][0]
    assert verdict["checks"][0]["value"] == max(
        joint["percent_of_range"]["rms"] for joint in compared("pi0", W4A8).summary["dimensions"]
    )
    assert tool(*quantized, "--fail-on", "never").code == 0


def test_criteria_that_are_none_are_refused_before_any_work(tool, tmp_path):
    result = tool(tmp_path / "no", tmp_path / "such.plan", "--criterion", "joint-eror=1,2")
    assert result.code == 2 and "there is no 'joint-eror', one of joint-error, joint-peak, cosine, stage" in result.err


def test_another_checkpoint_is_refused(tool, tiny_plans, tmp_path):
    plan = tiny_plans("pi0", "none").plan
    result = tool(tiny_plans("pi05", "none").checkpoint, plan)
    assert result.code == 2 and result.out == "" and "has pi05 True, but" in result.err
    sizes = dict(depth=2, vision_depth=1, action_horizon=8, robot="libero")
    longer = make_checkpoint(tmp_path / "longer", **sizes | {"vocab_size": 600})
    assert "has vocab_size 600, but" in tool(longer, plan).err
    deeper = make_checkpoint(tmp_path / "deeper", **sizes | {"vision_depth": 2})
    assert "has vision.depth 2, but" in tool(deeper, plan).err
    other = make_checkpoint(tmp_path / "other", **sizes, seed=1)
    result = tool(other, plan)
    assert result.code == 2 and "other weights than those that" in result.err and "--any-checkpoint" in result.err
    assert tool(other, plan, "--any-checkpoint").code == 0
