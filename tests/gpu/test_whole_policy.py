"""Whole policies on the GPU: the cuda plan against the CPU engine's plan of the same weights, stage by stage."""

from __future__ import annotations

import functools
import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file

from duq.compiler.accuracy.metrics import difference
from duq.compiler.accuracy.synthetic import synthetic_observations
from duq.compiler.checkpoint import Checkpoint, load_checkpoint
from duq.compiler.checkpoint.synthetic import make_checkpoint
from duq.compiler.pipeline import compile_policy, quantize_checkpoint
from duq.compiler.quant import Quantization, load_recipe
from duq.compiler.quant.calibrate import calibration_inputs
from duq.compiler.settings import Choices, settle
from duq.compiler.targets import Options
from duq.compiler.targets.cuda import CudaOptions
from duq.plugins.driver import free_memory, open_device
from duq.plugins.gpu import runs_code_of
from duq.runtime import Policy
from duq.runtime.errors import PlanError
from duq.runtime.executors.cpu import CpuExecutor
from duq.runtime.executors.cuda import CudaExecutor
from duq.runtime.executors.programs import Program
from duq.runtime.plan import Plan
from duq.runtime.preprocess import ModelInputs, Preprocessor

NUM_STEPS = 4
CASES = [(3, 48), (1, 1), (2, 33)]  # cameras, prompt tokens
RECIPES = {  # besides the presets
    "duquant": ("llm+expert-mlp", {"scheme": "duquant"}),  # output rotations
    "w4a16": ("all", {"activation_bits": 0}),
}
SHIPPED = Path(__file__).parents[2] / "examples" / "metaworld_policy"
SILENT = Progress(disable=True)
TIMED = ("pi0", "llm+expert-mlp")  # with tactics by timing, the others with the table's: timing takes a while


@functools.cache
def policy(name: str, quant: str, directory, float_images: bool = False, program: int | None = None, solver: str = "euler"):
    """The checkpoint's config and the paths of its cpu and cuda plans, the latter for this GPU or for the SM `program`."""
    sizes = dict(depth=3, vision_depth=2, action_horizon=50)
    stem = directory / f"{name}.{quant}{'.float_images' * float_images}{f'.sm{program}' if program else ''}.{solver}"
    checkpoint = load_checkpoint(make_checkpoint(stem, pi05=name == "pi05", robot="libero", **sizes))
    preprocessor = Preprocessor(checkpoint.config)
    inputs = [preprocessor.model_inputs(each) for each in synthetic_observations(checkpoint.config, cameras=3, count=2)]
    preset, settings = RECIPES.get(quant, (quant, {}))
    timing = (name, quant) == TIMED and not float_images and solver == "euler"
    return checkpoint.config, both_plans(checkpoint, preset, settings, inputs, stem, timing, float_images, program, solver)


def both_plans(
    checkpoint: Checkpoint,
    preset: str,
    settings: dict,
    inputs: list[ModelInputs],
    stem: Path,
    timing: bool = False,
    float_images: bool = False,
    program: int | None = None,
    solver: str = "euler",
) -> dict[str, Path]:
    recipe = load_recipe(preset, settings, environment={})
    integers = Quantization(recipe) if preset == "none" else quantize_checkpoint(checkpoint, recipe, inputs, SILENT)
    plans = {}
    common = dict(num_steps=NUM_STEPS, solver=solver, float_images=float_images)
    for options in (Options(**common), CudaOptions(sm=(program or open_device(),), timing=timing, **common)):
        plans[options.target] = stem.with_name(f"{stem.name}.{options.target}.plan")
        compile_policy(checkpoint, integers, plans[options.target], options, SILENT)
    return plans


@functools.cache
def cuda_executor(path) -> CudaExecutor:
    return CudaExecutor(Plan(path))


def make_inputs(config, cameras: int, prompt: int, seed: int = 0) -> tuple[ModelInputs, np.ndarray]:
    random, size = np.random.default_rng(seed), config.vision.image_size
    inputs = ModelInputs(
        images=random.integers(0, 256, (3, size, size, 3), np.uint8),
        image_mask=np.arange(3) < cameras,
        tokens=random.integers(0, config.vocab_size, config.max_prompt_tokens),
        token_mask=np.arange(config.max_prompt_tokens) < prompt,
        state=random.standard_normal(config.action_dim).astype(np.float32),
    )
    return inputs, random.standard_normal((config.action_horizon, config.action_dim), np.float32)


@pytest.mark.parametrize(("cameras", "prompt"), CASES)
@pytest.mark.parametrize("quant", ["none", "llm+expert-mlp", "llm", "all", "duquant", "w4a16"])
@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_equals_cpu_engine(name, quant, cameras, prompt, directory):
    config, plans = policy(name, quant, directory)
    # A flipped rounding of one INT8 activation moves what follows by as much as quantization itself does: the bound
    # with quantization is above that noise (docs/accuracy.md), the one without is bf16's.
    check_stages(plans, *make_inputs(config, cameras, prompt), at_least=0.9999 if quant in ("none", "w4a16") else 0.9995)


@pytest.mark.parametrize("quant", ["none", "llm+expert-mlp"])
@pytest.mark.parametrize(("name", "solver"), [("pi0", "ab2"), ("pi05", "ab2"), ("pi0", "ab3")])
def test_multistep_solvers_equal_the_cpu_engine(name, solver, quant, directory):
    """In the graph and launch by launch, whatever the size, and nothing of one call's history in the next."""
    config, plans = policy(name, quant, directory, solver=solver)
    for case in CASES:
        check_stages(plans, *make_inputs(config, *case), at_least=0.9999 if quant == "none" else 0.9995)
    _, eulers = policy(name, quant, directory)
    inputs, noise = make_inputs(config, *CASES[0])
    mistaken, _ = cuda_executor(eulers["cuda"]).run(inputs, noise)
    actions, _ = cuda_executor(plans["cuda"]).run(inputs, noise)
    expected, _ = CpuExecutor(Plan(plans["cpu"])).run(inputs, noise)
    assert np.abs(actions - expected).max() < np.abs(actions - mistaken).max()


@pytest.mark.parametrize(("cameras", "prompt"), CASES)
@pytest.mark.parametrize("quant", ["none", "llm+expert-mlp"])
def test_float_images_equal_cpu_engine(quant, cameras, prompt, directory):
    """Values that no byte stands for, and padding as LeRobot 0.4 has it."""
    config, plans = policy("pi0", quant, directory, float_images=True)
    inputs, noise = make_inputs(config, cameras, prompt)
    images = np.random.default_rng(prompt).uniform(-1, 1, inputs.images.shape).astype(np.float32)
    images[:, :5] = -3
    check_stages(plans, replace(inputs, images=images), noise, at_least=0.9999 if quant == "none" else 0.9995)
    as_floats = replace(inputs, images=inputs.pixels().transpose(0, 2, 3, 1))
    executor = cuda_executor(plans["cuda"])
    np.testing.assert_array_equal(executor.run(inputs, noise)[0], executor.run(as_floats, noise)[0])


@pytest.mark.parametrize("quant", ["none", "llm+expert-mlp"])
@pytest.mark.parametrize("program", [80, 86, 89])
def test_a_program_of_an_older_gpu_runs_as_ptx(program, quant, directory):
    """Compiled by the driver for the GPU at hand; without what only that GPU has."""
    if runs_code_of(open_device(), program) or open_device() < program:
        pytest.skip(f"PTX for SM {program} is for other GPUs than this")
    config, plans = policy("pi0", quant, directory, program=program)
    executor = CudaExecutor(Plan(plans["cuda"]), program=program)
    assert executor.program == Program(program, "ptx")
    for case in CASES:
        inputs, noise = make_inputs(config, *case)
        check_stages(plans, inputs, noise, at_least=0.9999 if quant == "none" else 0.9995)
        np.testing.assert_array_equal(executor.run(inputs, noise)[0], cuda_executor(plans["cuda"]).run(inputs, noise)[0])


def test_shipped_policy_equals_cpu_engine(directory):
    """Trained weights, observations of the robot that it is for, and an expert of 192 channels."""
    checkpoint = load_checkpoint(SHIPPED)
    inputs = calibration_inputs(
        SHIPPED / "calibration.npz", Preprocessor(checkpoint.config, tokenizer=checkpoint.tokenizer.read_bytes()), 4
    )
    plans = both_plans(checkpoint, "llm+expert-mlp", {}, inputs, directory / "shipped")
    for each in inputs:
        _, noise = make_inputs(checkpoint.config, 2, 1)
        check_stages(plans, each, noise, at_least=0.9995)


def check_stages(plans: dict[str, Path], inputs: ModelInputs, noise: np.ndarray, at_least: float) -> None:
    executor, stages, expected = cuda_executor(plans["cuda"]), {}, {}
    CpuExecutor(Plan(plans["cpu"])).run(inputs, noise, expected)
    actions, _ = executor.run(inputs, noise, stages)
    assert set(stages) == set(expected)
    cosines = {stage: difference(expected[stage], stages[stage]).cosine for stage in expected}
    assert min(cosines.values()) >= at_least, cosines
    np.testing.assert_array_equal(actions, stages["x"][-1])
    for _ in range(2):  # from the graph: the same bits, call after call
        np.testing.assert_array_equal(executor.run(inputs, noise)[0], actions)


def test_padding_is_never_read(directory):
    """What an earlier call left behind, and which rows pad the prompt, changes nothing."""
    config, plans = policy("pi0", "llm+expert-mlp", directory)
    executor = cuda_executor(plans["cuda"])
    inputs, noise = make_inputs(config, 2, 7)
    before, _ = executor.run(inputs, noise)
    executor.run(*make_inputs(config, 3, 48, seed=1))
    other = replace(inputs, tokens=np.where(inputs.token_mask, inputs.tokens, 3), images=inputs.images.copy())
    other.images[2] = 5
    np.testing.assert_array_equal(executor.run(other, noise)[0], before)


def test_threads_and_second_policy(directory):
    """Two threads on one executor and another executor beside it: everyone gets the actions that they get alone."""
    config, plans = policy("pi0", "llm+expert-mlp", directory)
    executors = [cuda_executor(plans["cuda"]), CudaExecutor(Plan(plans["cuda"]))]
    calls = [make_inputs(config, *case, seed=seed) for seed, case in enumerate(CASES)]
    alone = [executors[0].run(*call)[0] for call in calls]
    failures: list = []

    def work(executor: CudaExecutor, index: int) -> None:
        for _ in range(50):
            if not np.array_equal(executor.run(*calls[index])[0], alone[index]):
                failures.append(index)

    threads = [threading.Thread(target=work, args=(executors[i % 2], i % len(calls))) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_other_gpu_is_an_error(directory, monkeypatch):
    _, plans = policy("pi0", "none", directory)
    monkeypatch.setattr("duq.runtime.executors.cuda.driver.open_device", lambda: 75)
    with pytest.raises(PlanError, match=r"is made for SM \d+, this machine's GPU is SM 75; compile it with --sm 75"):
        CudaExecutor(Plan(plans["cuda"]))


def test_too_little_memory_is_an_error(directory, monkeypatch):
    _, plans = policy("pi0", "none", directory)
    monkeypatch.setattr("duq.runtime.executors.cuda.driver.free_memory", lambda: (1 << 20, 80 << 30))
    with pytest.raises(PlanError, match="needs .* GB of GPU memory, 0.00 of .* are free"):
        CudaExecutor(Plan(plans["cuda"]))


def test_memory_does_not_grow(directory):
    config, plans = policy("pi0", "llm+expert-mlp", directory)
    executor, call = cuda_executor(plans["cuda"]), make_inputs(config, 3, 48)
    executor.warmup()
    for _ in range(20):
        executor.run(*call)
    before = free_memory()[0]
    for _ in range(500):
        executor.run(*call)
    assert free_memory()[0] == before


def test_a_lerobot_policy_acts_as_on_the_cpu(directory):
    """From raw observations: images resized in float, a state wider than the actions, rounded rotary frequencies, its own steps."""
    path = make_checkpoint(
        directory / "lerobot", layout="lerobot", robot="libero", depth=2, vision_depth=1, action_horizon=8
    )
    weights = load_file(path / "model.safetensors")
    wide = torch.zeros(256, 40, dtype=torch.bfloat16)
    wide[:, :32] = weights["model.state_proj.weight"]
    save_file(weights | {"model.state_proj.weight": wide}, path / "model.safetensors")
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"max_state_dim": 40, "num_inference_steps": 3}))
    checkpoint, settings = settle(load_checkpoint(path), Choices())
    assert checkpoint.config.rotary == "bfloat16" and settings.num_steps == 3
    policies = {}
    for options in (Options(settings=settings), CudaOptions(sm=(open_device(),), timing=False, settings=settings)):
        plan = path.with_name(f"lerobot.{options.target}.plan")
        compile_policy(checkpoint, Quantization(load_recipe("none", environment={})), plan, options, SILENT)
        policies[options.target] = Policy(plan)
    random = np.random.default_rng(0)
    for size in ((224, 224), (90, 120), (480, 640)):
        images = {
            f"observation.images.{name}": random.integers(0, 256, (*size, 3), np.uint8) for name in ("image", "wrist_image")
        }
        observation = images | {"observation.state": random.standard_normal(8), "task": "Open_the drawer"}
        noise = random.standard_normal((8, 32), np.float32)
        found = {target: policy.infer(observation, noise)["actions"] for target, policy in policies.items()}
        assert found["cuda"].shape == (8, 7) and difference(found["cpu"], found["cuda"]).cosine > 0.9999
