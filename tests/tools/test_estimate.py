"""duq-estimate: which program it takes, what it sums up, what it refuses."""

import json

import pytest

from benchmarks import schedules
from duq.plugins.gpu import gpu_of
from duq.runtime.config import ModelConfig
from duq.runtime.plan import Plan
from duq.tools import estimate, profile


@pytest.fixture(scope="module")
def plan(tiny_plans):
    """For SM 86, also as PTX, and 90."""
    return tiny_plans("pi0", "llm+expert-mlp", "cuda").plan


def test_the_table_of_a_plan(plan, command_line):
    ran = command_line(estimate.main, plan, "--gpu", "rtx4090")
    assert ran.code == 0
    assert (
        "An estimate for RTX 4090 (SM 89), not a measurement: the program for SM 86, 3 cameras, 48 prompt tokens" in ran.out
    )
    assert all(part in ran.out for part in ("vision (SigLIP)", "LLM", "state token", "a denoising step", "The call: "))
    assert "How far it is off elsewhere, nobody has measured" in " ".join(ran.out.split())


@pytest.mark.parametrize(
    ("gpu", "program"),
    [
        ("a40", {"sm": 86, "image": "cubin"}),
        ("h200", {"sm": 90, "image": "cubin"}),
        ("rtx 5090", {"sm": 86, "image": "ptx"}),
    ],
)
def test_it_is_the_program_that_the_gpu_would_run(gpu, program, plan, command_line):
    assert json.loads(command_line(estimate.main, plan, "--gpu", gpu, "--json").out)["program"] == program


def test_its_sums_are_of_its_parts(plan, command_line):
    found = json.loads(command_line(estimate.main, plan, "--gpu", "a40", "--json").out)
    vision, llm, state, step = (part["ms"] for part in found["parts"])
    assert found["estimate"] is True
    assert found["in_turn_ms"]["prefix"] == pytest.approx(vision + llm + state)
    assert found["in_turn_ms"]["step"] == pytest.approx(step)
    assert found["steps_ms"] == pytest.approx(3 * step)  # of 4 steps, the first beside the prefix
    assert vision + llm < found["prefix_ms"] < vision + llm + state + step
    assert found["call_ms"] == pytest.approx(found["prefix_ms"] + found["steps_ms"])


def test_fewer_cameras_take_less(plan, command_line):
    def call(*options):
        return json.loads(command_line(estimate.main, plan, "--gpu", "a40", "--json", *options).out)

    assert call("--cameras", 1)["call_ms"] < call("--cameras", 3)["call_ms"]
    short = call("--prompt-tokens", 20)
    assert short["prompt_tokens"] == 32 and short["call_ms"] < call()["call_ms"]


def test_a_plan_without_a_program_says_what_to_compile(plan, command_line):
    ran = command_line(estimate.main, plan, "--gpu", "a100")
    assert ran.code == 2 and ran.err.count("\n") == 1
    assert "is made for SM 86, 90, and A100 (SM 80) runs none of it; compile it with --sm 80" in ran.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "gb10"], "GB10: its int8_rate and bf16_rate are not public; say what to assume: --assume int8_rate=..."),
        (["--gpu", "b200"], "B200: its int8_rate are not public"),
        (["--gpu", "a40", "--assume", "int8_rate=2048"], "--assume int8_rate=2048: the int8_rate of A40 is known"),
        (["--gpu", "b200", "--assume", "int8_rate=x"], "--assume int8_rate=x: is none of int8_rate, bf16_rate, l2_bytes"),
        (["--gpu", "b200", "--assume", "clock=1"], "--assume clock=1: is none of"),
        (["--gpu", "voodoo"], "--gpu voodoo: unknown; known are A100"),
        (["--gpu", "a40", "--prompt-tokens", "999"], "is not for 3 cameras and 999 prompt tokens, but for up to 3 and 48"),
    ],
)
def test_what_is_refused(options, message, plan, command_line):
    ran = command_line(estimate.main, plan, *options)
    assert ran.code == 2 and message in ran.err and ran.err.count("\n") == 1


def test_what_is_assumed_is_said(plan, command_line):
    ran = command_line(estimate.main, plan, "--gpu", "b200", "--assume", "int8_rate=2048")
    assert ran.code == 0 and "Assumed: int8_rate=2048." in ran.out


def test_a_plan_for_cpus_is_refused(tiny_plans, command_line):
    ran = command_line(estimate.main, tiny_plans("pi0", "none").plan, "--gpu", "a40")
    assert ran.code == 2 and "is for target cpu; an estimate needs a plan of --target cuda" in ran.err


def test_duq_profile_estimates_no_more(plan, command_line):
    assert command_line(profile.main, plan, "--gpu", "a40").code == 2


@pytest.mark.parametrize("sm", [86, pytest.param(90, marks=pytest.mark.slow)])
def test_a_schedule_from_sizes_is_that_of_a_plan(sm, plan, monkeypatch):
    """Launch by launch: the compiler's schedule of weights that are not there, which docs/performance.md is made of."""
    opened = Plan(plan, verify=False)
    compiled = json.loads(opened.read(f"schedule/sm{sm}.json"))
    monkeypatch.setattr(schedules, "STEPS", opened.manifest["num_steps"])
    made = schedules.schedule_for(ModelConfig.from_json(opened.manifest["model"]), gpu_of(sm))
    for ours, theirs in zip(made["variants"], compiled["variants"], strict=True):
        for half in ("prefix", "step"):
            assert [_without_places(made, launch) for launch in ours[half]] == [
                _without_places(compiled, launch) for launch in theirs[half]
            ]


def _without_places(schedule, launch):
    kept = {key: value for key, value in launch.items() if key not in ("args", "kernel")}
    numbers = {name: value for name, value in launch["args"].items() if isinstance(value, int)}
    return kept, numbers, estimate.kernel_of(schedule, launch)
