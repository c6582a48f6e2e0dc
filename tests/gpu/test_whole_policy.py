"""Whole policies on the GPU: the cuda plan against the CPU engine's plan of the same weights, stage by stage."""

from __future__ import annotations

import fcntl
import functools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
from duq.compiler.targets.cuda import CudaOptions, cubins, options_of_program
from duq.plugins.driver import free_memory, open_device
from duq.plugins.gpu import runs_code_of, runs_ptx_of
from duq.plugins.nvrtc import Cubin
from duq.runtime import Policy
from duq.runtime.errors import PlanError
from duq.runtime.executors.cpu import CpuExecutor
from duq.runtime.executors.cuda import CudaExecutor
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
    """The checkpoint's config and the paths of its cpu and cuda plans, the latter for this GPU or of the SM `program`.

    Each is made by the first of the test processes that wants it.
    """
    stem = directory / f"{name}.{quant}{'.float_images' * float_images}.{solver}"
    timing = (name, quant) == TIMED and not float_images and program is None and solver == "euler"
    common = dict(num_steps=NUM_STEPS, float_images=float_images, solver=solver)
    cuda = options_of_program(program or open_device(), open_device(), timing=timing, **common)
    checkpoint, plans = checkpoint_of(name, directory), {}
    for options, kind in ((Options(**common), "cpu"), (cuda, f"cuda.sm{program or open_device()}")):
        plans[options.target] = plan = stem.with_name(f"{stem.name}.{kind}.plan")
        with one_process(plan):
            if not plan.exists():
                compile_policy(checkpoint, quantization(name, quant, directory), plan, options, SILENT)
    return checkpoint.config, plans


@contextmanager
def one_process(path: Path) -> Iterator[None]:
    """Of those that make `path` or look whether it is there, one at a time."""
    with open(path.with_name(f"{path.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def checkpoint_of(name: str, directory: Path) -> Checkpoint:
    path = directory / name
    with one_process(path):
        if not path.exists():
            make_checkpoint(path, pi05=name == "pi05", robot="libero", depth=3, vision_depth=2, action_horizon=50)
        return load_checkpoint(path)


@functools.cache
def quantization(name: str, quant: str, directory: Path) -> Quantization:
    checkpoint = checkpoint_of(name, directory)
    preset, settings = RECIPES.get(quant, (quant, {}))
    preprocessor = Preprocessor(checkpoint.config)
    inputs = [preprocessor.model_inputs(each) for each in synthetic_observations(checkpoint.config, cameras=3, count=2)]
    return quantized(checkpoint, preset, settings, inputs)


def quantized(checkpoint: Checkpoint, preset: str, settings: dict, inputs: list[ModelInputs]) -> Quantization:
    recipe = load_recipe(preset, settings, environment={})
    return Quantization(recipe) if preset == "none" else quantize_checkpoint(checkpoint, recipe, inputs, SILENT)


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


@pytest.mark.parametrize(("name", "quant"), [("pi0", "none"), ("pi0", "llm+expert-mlp"), ("pi05", "llm+expert-mlp")])
def test_the_program_of_another_gpu(name, quant, program, directory):
    """From PTX, which the driver compiles, or by a stand-in; without what only this GPU has."""
    config, plans = policy(name, quant, directory, program=program)
    executor, here = cuda_executor(plans["cuda"]), open_device()
    runs = (
        (program, "cubin")
        if runs_code_of(here, program)
        else (program, "ptx")
        if runs_ptx_of(here, program)
        else (here, "cubin")
    )
    assert (executor.program.sm, executor.program.image) == runs
    for case in CASES:
        check_stages(plans, *make_inputs(config, *case), at_least=0.9999 if quant == "none" else 0.9995)


def test_a_plan_for_a_later_gpu_is_refused(directory, monkeypatch):
    """That a stand-in runs in another plan changes nothing about it. Its kernels are not looked at."""
    if open_device() >= 120:
        pytest.skip("duq has a row for no GPU that is later than this one")
    for each in ("compile_cubin", "compile_ptx"):
        monkeypatch.setattr(cubins, each, lambda source, gpu, kernels, headers: Cubin(b"\0", {k: k for k in kernels}))
    plan, options = directory / "later.plan", CudaOptions(sm=(120,), num_steps=NUM_STEPS)
    compile_policy(checkpoint_of("pi0", directory), quantization("pi0", "none", directory), plan, options, SILENT)
    with pytest.raises(PlanError, match="is made for SM 120, this machine's GPU is SM"):
        CudaExecutor(Plan(plan))
    with pytest.raises(PlanError, match="has no program for SM 120 that a GPU of SM"):
        CudaExecutor(Plan(plan), program=120)


def test_shipped_policy_equals_cpu_engine(directory):
    """Trained weights, observations of the robot that it is for, and an expert of 192 channels."""
    checkpoint = load_checkpoint(SHIPPED)
    inputs = calibration_inputs(
        SHIPPED / "calibration.npz", Preprocessor(checkpoint.config, tokenizer=checkpoint.tokenizer.read_bytes()), 4
    )
    integers, plans = quantized(checkpoint, "llm+expert-mlp", {}, inputs), {}
    for options in (Options(num_steps=NUM_STEPS), CudaOptions(sm=(open_device(),), timing=False, num_steps=NUM_STEPS)):
        plans[options.target] = directory / f"shipped.{options.target}.plan"
        compile_policy(checkpoint, integers, plans[options.target], options, SILENT)
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


@pytest.mark.alone
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
