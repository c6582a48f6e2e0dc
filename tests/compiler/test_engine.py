"""What a compiled engine promises beside its numbers: graphs others can read, weights at their size, quiet calls."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from duq.compiler.checkpoint import load_checkpoint
from duq.compiler.phases import passes_of
from duq.compiler.pipeline import PHASES, compile_policy, quantize_checkpoint
from duq.compiler.quant import load_recipe
from duq.compiler.quant.recipe import DEFAULT_PRESET
from duq.compiler.targets import Options
from duq.runtime import Policy
from duq.runtime.plan import Plan
from tests.support.quant_policy import SILENT, observation

ONNXRUNTIME = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])


@pytest.mark.parametrize("preset", [pytest.param("llm+expert-mlp", marks=pytest.mark.slow), "none"])
def test_the_graph_of_every_phase_is_plain_onnx(calibrated_policy, tmp_path, preset):
    checkpoint, calibration, _ = calibrated_policy
    quantization = quantize_checkpoint(checkpoint, load_recipe(preset, environment={}), calibration, SILENT)
    compile_policy(checkpoint, quantization, tmp_path / "engine.plan", Options(num_steps=2), SILENT, tmp_path / "graphs")
    files = sorted((tmp_path / "graphs").glob("*.onnx"))
    passes = ["export", *(each.name for each in passes_of(PHASES))]
    stems = [f"{index:02d}-{name}-{graph}" for index, name in enumerate(passes) for graph in ("prefix", "step")]
    assert [file.stem for file in files] == stems
    for file in files:
        onnx.checker.check_model(file)
        if ONNXRUNTIME < (1, 24):
            continue  # Python 3.10's lacks Cos of opset 22 and confuses overloads; the plan itself it runs
        onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    operators = {node.op_type for node in onnx.load(files[-1], load_external_data=False).graph.node}
    assert ("W4A8Linear" in operators) == (preset != "none")


def test_int4_weights_take_four_bits(tiny_plans):
    plan = Plan(tiny_plans("pi0", DEFAULT_PRESET).plan)
    linears, entries = plan.manifest["quantization"]["linears"], plan.manifest["entries"]
    weights = {name: entry["bytes"] for name, entry in entries.items() if ".weight_q" in name}
    assert sum(weights.values()) == sum(np.prod(linear["shape"]) // 2 for linear in linears.values())
    in_float = [f"{name}.weight_kn" for name in linears]
    assert linears and not any(name in entry for name in in_float for entry in entries)  # and no float copy is kept


def test_calls_after_warm_up_open_nothing_and_take_no_memory(tiny_plans, monkeypatch):
    policy = Policy(tiny_plans("pi0", DEFAULT_PRESET).plan, threads=1)
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (300, 400, 3)).astype(np.uint8)
    first = {
        "observation/image": image,
        "observation/state": random.standard_normal(8).astype(np.float32),
        "prompt": "push",
    }
    second = first | {"observation/wrist_image": image, "prompt": "pick up the red cup and put it on the plate"}
    policy.warmup()
    policy.infer(second)

    monkeypatch.setattr(onnxruntime, "InferenceSession", None)  # no session is created from here on
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = _peak_bytes()
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))  # and no file can be opened
    try:
        with pytest.raises(OSError):
            open("/dev/null")
        for obs in (first, second, first):  # the prompt and the cameras change from call to call
            assert policy.infer(obs)["actions"].shape == (8, 7)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    weights = Plan(tiny_plans("pi0", DEFAULT_PRESET).plan).manifest["graphs"]["prefix"]["weight_bytes"]
    assert _peak_bytes() - before < 0.5 * weights


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def test_the_same_noise_gives_the_same_actions(tiny_plans):
    policy = Policy(tiny_plans("pi05", DEFAULT_PRESET).plan, threads=1)
    observed = observation_of(tiny_plans("pi05", DEFAULT_PRESET))
    noise = np.random.default_rng(1).standard_normal((8, 32), np.float32)
    first, second = (policy.infer(observed, noise=noise)["actions"] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - policy.infer(observed, noise=-noise)["actions"]).max() > 1e-3


def observation_of(compiled) -> dict:
    inputs = observation(load_checkpoint(compiled.checkpoint).config, 3, cameras=2)
    return {
        "image": {"base_0_rgb": inputs.images[0], "left_wrist_0_rgb": inputs.images[1]},
        "state": inputs.state,
        "tokenized_prompt": inputs.tokens[inputs.token_mask],
        "tokenized_prompt_mask": np.ones(int(inputs.token_mask.sum()), bool),
    }
