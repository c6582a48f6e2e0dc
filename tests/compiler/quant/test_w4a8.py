"""The CPU engine against the quantizer's own integer arithmetic, for every kind of recipe."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from duq.compiler import pipeline
from duq.compiler.model import build_model
from duq.compiler.pipeline import compile_policy, quantize_checkpoint
from duq.compiler.quant import fake_quantize, load_recipe
from duq.compiler.quant.quantize import sqnr_db
from duq.compiler.targets import Options
from duq.compiler.targets.gpu import GPU_PHASES
from duq.runtime.executors import cpu
from duq.runtime.executors.cpu import CpuExecutor
from duq.runtime.plan import Plan
from tests.support.quant_policy import SILENT, observation, sample_actions
from tests.support.replay import replay, run_recorded
from tests.support.same_integers import Given, run_given

NUM_STEPS = 2
RECIPES = {
    "default": {},
    "llm": {"preset": "llm"},
    "all": {"preset": "all"},
    "all, per-tensor": {"preset": "all", "activation_scale": "per-tensor"},
    "all, permuted": {"preset": "all", "permute": True, "block_size": 16},
    "duquant": {"scheme": "duquant"},
    "duquant, all, row rotation off": {"scheme": "duquant", "preset": "all", "row_rotation": "0"},
    "W8A8, compensated": {"weight_bits": 8, "compensate": True},
    "mixed bits": {"preset": "all", "layer_bits": {"layers.0": 8, "vision": 16}},
}
SLOW = {  # -> where all that it does is tested too
    "llm": "default",
    "all": "test_merged_linears_compute_the_same_integers",
    "all, permuted": "duquant",
}


@pytest.fixture(scope="module")
def policy(calibrated_policy):
    return calibrated_policy


def compiled(policy, path, settings, transforms=None):
    checkpoint, calibration, _ = policy
    settings = dict(settings)
    recipe = load_recipe(settings.pop("preset", None), settings, {})
    quantization = quantize_checkpoint(checkpoint, recipe, calibration, SILENT, transforms)
    compile_policy(checkpoint, quantization, path, Options(num_steps=NUM_STEPS), SILENT)
    return quantization


def noise_of(policy) -> np.ndarray:
    config = policy[0].config
    return np.random.default_rng(7).standard_normal((config.action_horizon, config.action_dim), np.float32)


def check_replay(policy, path, quantization) -> None:
    checkpoint, _, inputs = policy
    noise = noise_of(policy)
    actions, calls = run_recorded(path, inputs, noise)
    assert set(calls) == set(quantization.packs)  # every pack runs as integers, and nothing else does
    expected, flipped = replay(build_model(checkpoint), quantization, calls, inputs, noise, NUM_STEPS)
    np.testing.assert_allclose(actions, expected, atol=1e-4)
    roundings = sum(x_q.size for runs in calls.values() for x_q, _ in runs)
    assert flipped < 1e-3 * roundings


@pytest.mark.parametrize("name", [pytest.param(each, marks=[pytest.mark.slow] * (each in SLOW)) for each in RECIPES])
def test_engine_computes_the_quantizers_integers(policy, tmp_path, name):
    quantization = compiled(policy, tmp_path / "engine.plan", RECIPES[name])
    check_replay(policy, tmp_path / "engine.plan", quantization)


@pytest.mark.parametrize("settings", [{"weight_bits": 8, "preset": "all"}, RECIPES["mixed bits"]], ids=str)
def test_both_forms_of_8_bit_weights_compute_the_same_integers(policy, tmp_path, monkeypatch, settings):
    """The form for CPUs whose products saturate, bit for bit that of others. On the former only this one is right."""
    _, _, inputs = policy
    path, noise = tmp_path / "engine.plan", noise_of(policy)
    quantization = compiled(policy, path, settings)
    entries = {"graph/prefix.uint8.onnx", "graph/step.uint8.onnx"}
    assert {name for name in Plan(path).names if ".uint8." in name} == entries
    expected, _ = CpuExecutor(Plan(path), threads=1).run(inputs, noise)
    monkeypatch.setattr(cpu, "multiplies_exactly", lambda unsigned_weights: unsigned_weights)
    executor = CpuExecutor(Plan(path), threads=1)
    assert set(executor._entries.values()) == entries
    actions, _ = executor.run(inputs, noise)
    np.testing.assert_array_equal(actions, expected)
    check_replay(policy, path, quantization)


def test_plans_of_4_bit_weights_have_one_form(policy, tmp_path):
    compiled(policy, tmp_path / "engine.plan", {"preset": "all"})
    graphs = [name for name in Plan(tmp_path / "engine.plan").names if name.startswith("graph/")]
    assert graphs == ["graph/prefix.onnx", "graph/step.onnx"]


def test_foreign_packs_that_share_nothing(policy, tmp_path):
    """Every linear with a permutation and rotations of its own: a prologue each, and nothing to merge."""
    checkpoint, calibration, _ = policy
    reference = load_recipe("llm", {"scheme": "reference"}, {})
    transforms = quantize_checkpoint(checkpoint, reference, calibration, SILENT).packs
    path = tmp_path / "engine.plan"
    quantization = compiled(policy, path, {"preset": "llm", "scheme": "duquant"}, transforms)
    check_replay(policy, path, quantization)
    found = Plan(path).manifest["graphs"]["prefix"]["ops"]
    assert found["duq::RotateQuantize"] == found["duq::W4A8Linear"] == len(transforms)


def test_shared_transforms_leave_one_prologue_a_group(policy, tmp_path):
    quantization = compiled(policy, tmp_path / "engine.plan", {})
    graphs, depth = Plan(tmp_path / "engine.plan").manifest["graphs"], policy[0].config.llm.depth
    # Prologues: qkv, o, gate-up, down in every layer but the last, of which only k and v run; pi0's state token runs
    # through the expert's MLPs as well, up to its last layer.
    state_layers = 0 if policy[0].config.pi05 else depth - 1
    assert graphs["prefix"]["ops"]["duq::RotateQuantize"] == 4 * (depth - 1) + 1 + 2 * state_layers
    assert graphs["step"]["ops"]["duq::RotateQuantize"] == 2 * depth
    linears = graphs["prefix"]["ops"]["duq::W4A8Linear"] + graphs["step"]["ops"]["duq::W4A8Linear"]
    assert linears == len(quantization.packs) + 3 * state_layers


def test_merged_linears_compute_the_same_integers(policy, tmp_path, monkeypatch):
    """As targets with larger products want them: q, k, v in one, gate and up in one."""
    monkeypatch.setattr(pipeline, "PHASES", (*pipeline.PHASES, *GPU_PHASES))
    quantization = compiled(policy, tmp_path / "engine.plan", {"preset": "all"})
    check_replay(policy, tmp_path / "engine.plan", quantization)
    found = Plan(tmp_path / "engine.plan").manifest["graphs"]["step"]["ops"]
    assert found["duq::RotateQuantize"] == found["duq::W4A8Linear"] == 4 * policy[0].config.expert.depth


@pytest.mark.parametrize("settings", [{"preset": "all"}, {"scheme": "duquant"}, {"weight_bits": 8}], ids=str)
def test_float_activations(policy, tmp_path, settings):
    """W4A16 and W8A16 round no activation, so that engine and oracle agree without a replay."""
    checkpoint, _, inputs = policy
    quantization = compiled(policy, tmp_path / "engine.plan", {**settings, "activation_bits": 0})
    noise = noise_of(policy)
    actions, _ = CpuExecutor(Plan(tmp_path / "engine.plan"), threads=1).run(inputs, noise)
    fake = fake_quantize(build_model(checkpoint), quantization)
    fields = (inputs.pixels(), inputs.image_mask, inputs.tokens, inputs.token_mask, inputs.state, noise)
    expected = fake.sample_actions(*(torch.from_numpy(field)[None] for field in fields), num_steps=NUM_STEPS)[0]
    np.testing.assert_allclose(actions, expected, atol=1e-4)


def test_padding_and_absent_cameras_do_not_change_the_integers(policy, tmp_path):
    """What is compacted away here is masked in PyTorch: the policy is the same, to the noise of 8-bit activations."""
    checkpoint, _, _ = policy
    quantization = compiled(policy, tmp_path / "engine.plan", {"weight_bits": 8})
    inputs = observation(checkpoint.config, 11, cameras=2)
    noise = torch.randn(
        1, checkpoint.config.action_horizon, checkpoint.config.action_dim, generator=torch.Generator().manual_seed(9)
    )
    expected = sample_actions(fake_quantize(build_model(checkpoint), quantization), inputs)
    actions, _ = CpuExecutor(Plan(tmp_path / "engine.plan"), threads=1).run(inputs, noise[0].numpy())
    assert sqnr_db(expected[0], torch.from_numpy(actions)) > 35


@pytest.mark.parametrize("preset", ["llm+expert-mlp", "all"])
def test_given_its_own_integers_the_engine_does_the_same(policy, tmp_path, preset):
    """tests/support/same_integers.py, by which other engines are measured; and one integer that is off is seen."""
    path, (_, _, inputs), noise = tmp_path / "engine.plan", policy, noise_of(policy)
    compiled(policy, path, {"preset": preset})
    actions, calls = run_recorded(path, inputs, noise)
    plan = Given(path)
    for graph in ("prefix", "step"):
        plan.read(f"graph/{graph}.onnx")
    of_prefix, of_step = ([linear.removesuffix(".weight_q") for linear, *_ in found] for found in plan.quantizers.values())
    prefix = [(linear, calls[linear][0]) for linear in of_prefix]
    steps = [[(linear, calls[linear][step - NUM_STEPS]) for linear in of_step] for step in range(NUM_STEPS)]
    stages, roundings = run_given(path, prefix, steps, inputs, noise)
    assert np.array_equal(stages["x"][-1], actions) and roundings.different == 0 < roundings.count
    x_q = prefix[-1][1][0]
    x_q[0, 0] += 3 if x_q[0, 0] < 0 else -3
    changed, roundings = run_given(path, prefix, steps, inputs, noise)
    assert roundings.farthest == 3 and any(not np.array_equal(stages[name], changed[name]) for name in stages)
