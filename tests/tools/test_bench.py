"""duq-bench: the time of a plan; --program, what it refuses before it compiles anything, and what the table says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from rich.progress import Progress

from duq.runtime.errors import EngineError
from duq.runtime.executors.programs import Program
from duq.runtime.observations import save_observations
from duq.runtime.plan import Plan
from duq.tools import bench, bench_cpu, bench_gpu, bench_plan
from duq.tools.made_up import robot_observations

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("gpu", "arguments", "says"),
    [
        (90, ("--program", "86"), "--program 86: is for --suite gpu; leave it out for cpu"),
        (90, ("--suite", "gpu", "--program", "75"), "no kernels for SM 75"),
        (
            100,
            ("--suite", "gpu", "--program", "90"),
            "--program 90: SM 100 cannot stand in for H100 (SM 90): it lacks wgmma, clusters, programmatic launch",
        ),
        (
            86,
            ("--suite", "gpu", "--program", "100"),
            "--program 100: SM 86 cannot stand in for B200 (SM 100): it lacks 227 KB of shared memory a thread block",
        ),
    ],
)
def test_a_program_that_cannot_run_is_refused(gpu, arguments, says, command_line, monkeypatch):
    monkeypatch.setattr(bench_cpu, "open_device", lambda: gpu)
    ran = command_line(bench.main, *arguments)
    assert ran.code == 2 and says in ran.err and ran.err.count("\n") == 1


@pytest.mark.parametrize(
    ("wanted", "ran", "gpu", "says"),
    [
        (86, Program(86, "ptx"), 90, "; foreign program: made for SM 86, run as PTX on SM 90"),
        (86, Program(86, "cubin"), 89, "; foreign program: made for SM 86, run as machine code on SM 89"),
        (
            120,
            Program(90, "cubin"),
            90,
            "; foreign program: schedule of SM 120, compiled for SM 90 without what it lacks",
        ),
        (90, Program(90, "cubin"), 90, ""),
        (None, Program(90, "cubin"), 90, ""),
    ],
)
def test_a_foreign_program_is_said_to_be_one(wanted, ran, gpu, says):
    assert bench_gpu._foreign(wanted, ran, gpu) == says


# --- a plan ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan(tiny_plans):
    return tiny_plans("pi0", "none").plan


def test_a_plan_is_timed_without_torch(plan):
    arguments = [str(plan), "--calls", "4", "--warm-up", "1", "--repetitions", "2", "--cameras", "2", "--json"]
    code = f"""
import sys
sys.modules["torch"] = sys.modules["onnx"] = None
sys.argv = ["x", *{arguments!r}]
from duq import commands
commands.bench()
"""
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=False, env=variables)
    found = json.loads(ran.stdout)
    times = found["times_ms"]
    assert len(times) == 4 and found["case"]["cameras"] == 2 and found["case"]["prompt_tokens"] == 48
    assert found["latency_ms"]["p50"] == pytest.approx(np.median(times)) and found["latency_ms"]["max"] == max(times)
    assert found["calls_per_second"] == pytest.approx(1e3 / np.mean(times))
    stages = found["stages_ms"]
    assert set(stages) == {"preprocess_ms", "prefix_ms", "denoise_ms"}
    assert sum(each["min"] for each in stages.values()) <= min(times)
    assert found["memory_bytes"]["host"] > 0 and found["plan"]["bytes"] == plan.stat().st_size
    assert found["machine"]["libraries"]["onnxruntime"]


def test_the_table_shows_percentiles_stages_throughput_and_spread(plan, command_line, tmp_path):
    data = tmp_path / "observations.npz"
    save_observations(data, robot_observations(Plan(plan), 1))
    ran = command_line(bench.main, plan, "--calls", 2, "--warm-up", 1, "--observations", data)
    assert ran.code == 0, ran.err
    for text in ("p50", "p99", "prefix", "control", "calls/s", "between repetitions", f"observations of {data}"):
        assert text in ran.out.replace("\n", ""), text


def test_batches_are_timed_beside_single_calls(plan, command_line):
    options = ("--calls", 4, "--warm-up", 1, "--repetitions", 2, "--cameras", 1, "--batch", "1,4,2,4")
    found = json.loads(command_line(bench.main, plan, *options, "--json").out)["batches"]
    assert found["in_flight"] == 1 and set(found["memory_bytes"]) == {"host"}
    assert [each["batch"] for each in found["sizes"]] == [1, 4, 2]
    for each in found["sizes"]:
        assert each["calls_per_second"] == pytest.approx(1e3 * each["batch"] / each["batch_ms"]["p50"])
        assert each["single_calls_per_second"] == pytest.approx(1e3 * each["batch"] / each["single_ms"]["p50"])
        assert each["faster"] == pytest.approx(each["calls_per_second"] / each["single_calls_per_second"])


def test_every_size_has_as_many_calls():
    """2 rounds, in each as many of every size as the largest has calls."""
    sizes, counts = [], Counter()

    class Timed:
        metadata, in_flight = {"action_horizon": 2, "model_action_dim": 3}, 2

        def infer(self, observation, noise):
            counts["single"] += 1
            return {"actions": noise + observation["n"]}

        def infer_batch(self, observations, noise):
            sizes.append(len(observations))
            return [{"actions": given + each["n"]} for each, given in zip(observations, noise, strict=True)]

    with Progress(disable=True) as progress:
        found = bench_plan.in_batches(Timed(), [{"n": 1}, {"n": 2}], [1, 2, 4], 8, 2, progress)
        assert Counter(sizes) == {1: 8, 2: 4, 4: 3} and counts["single"] == 24 + 4 and found["in_flight"] == 2
        Timed.infer_batch = lambda self, observations, noise: [{"actions": given} for given in noise]
        with pytest.raises(EngineError, match="infer_batch gives other actions than single calls"):
            bench_plan.in_batches(Timed(), [{"n": 1}], [2], 1, 2, progress)


def test_the_table_of_batches(plan, command_line):
    ran = command_line(bench.main, plan, "--calls", 2, "--warm-up", 1, "--cameras", 1, "--repetitions", 2, "--batch", "2")
    assert "single calls/s" in ran.out and "infer_batch, up to 1 at once" in ran.out.replace("\n", " "), ran.err


@pytest.mark.parametrize("sizes", ["0", "1,,2", "a", "-1", "1.5", "", "1025"])
def test_batches_of_no_size(sizes, plan, command_line):
    ran = command_line(bench.main, plan, f"--batch={sizes}")
    assert ran.code == 2 and f"--batch {sizes}: expected sizes of 1 to 1024, as 1,2,4,8,16" in ran.err


def test_the_spread_is_that_of_the_repetitions_medians():
    assert bench_plan.spread([1, 1, 9, 2, 2, 2], 2) == pytest.approx((2 - 1) / 2)
    assert bench_plan.spread([3, 3, 3, 3], 4) == 0
    assert bench_plan.spread([1, 2], 5) == pytest.approx(1 / 1.5)  # no more parts than calls
    assert bench_plan.summary(range(101)) == {"min": 0, "p50": 50, "p90": 90, "p99": 99, "max": 100}


@pytest.mark.parametrize(("control", "warned"), [(0.05, False), (0.5, True)])
def test_a_machine_that_is_not_steady_is_a_warning(control, warned):
    assert bool(bench_plan.unsteady({"spread": {"engine": 0.5, "control": control}})) is warned


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--suite", "cpu"], "--suite: is for suites; leave it out to time"),
        (["--pi05"], "--pi05: is for suites"),
        (["--in-flight", "2"], "--in-flight: is for batches; name their sizes: --batch"),
        (["--batch", "2", "--in-flight", "2"], "in_flight=2: a plan for cpu runs one call at a time; leave it out"),
        (["--prompt-tokens", "49"], "--prompt-tokens 49: "),
        (["--observations", "o.npz", "--cameras", "1"], "leave --cameras and --prompt-tokens out"),
    ],
)
def test_what_does_not_go_with_a_plan_is_refused(arguments, says, plan, command_line):
    ran = command_line(bench.main, plan, *arguments)
    assert ran.code == 2 and says in ran.err and ran.out == ""


def test_observations_without_a_plan_are_refused(command_line):
    ran = command_line(bench.main, "--observations", "o.npz")
    assert ran.code == 2 and "name it: duq-bench engine.plan" in ran.err
