"""Plans with a multistep solver: every target against the PyTorch reference with the same solver."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from rich.progress import Progress

import duq.compiler.accuracy.compare
from duq.compiler.accuracy.compare import compare
from duq.compiler.accuracy.synthetic import synthetic_observations
from duq.compiler.checkpoint import load_checkpoint
from duq.compiler.errors import DuqError
from duq.compiler.graph.export import export
from duq.compiler.model import build_model, integrate
from duq.compiler.phases import rewrite
from duq.compiler.pipeline import PHASES, TARGETS, compile_policy
from duq.compiler.quant import Quantization, load_recipe
from duq.compiler.settings import Choices, settle
from duq.compiler.targets import Options
from duq.compiler.targets.cuda import CudaOptions
from duq.runtime import Policy
from duq.runtime.executors.cpu import CpuExecutor
from duq.runtime.guidance import Guidance
from duq.runtime.inspect import settings_rows
from duq.runtime.plan import Plan
from duq.runtime.preprocess import Preprocessor
from duq.runtime.solver import Solver
from tests.support import emulate
from tests.support.comparison import run_here
from tests.support.inputs import make_inputs, make_noise

STEPS = 4
SILENT = Progress(disable=True)


def sample(model, inputs, noise, solver: str, num_steps: int = STEPS) -> np.ndarray:
    fields = (inputs.pixels(), inputs.image_mask, inputs.tokens, inputs.token_mask, inputs.state, noise)
    return model.sample_actions(*(torch.from_numpy(each)[None] for each in fields), num_steps, solver)[0].numpy()


@pytest.fixture(scope="module")
def compiled(tiny_plans, tmp_path_factory):
    """(policy, solver, target) -> the plan of a float policy, for SM 86; the checkpoint's folder beside it."""
    directory, made = tmp_path_factory.mktemp("solvers"), {}

    def compile_once(policy: str, solver: str, target: str = "cpu") -> tuple[Path, Path]:
        source = tiny_plans(policy, "none").checkpoint
        path = directory / f"{policy}.{solver}.{target}.plan"
        if path not in made:
            common = dict(robot="libero", num_steps=STEPS, solver=solver, cameras=2)
            options = CudaOptions(sm=(86,), timing=False, ptx=False, **common) if target == "cuda" else Options(**common)
            recipe = load_recipe("none", environment={})
            compile_policy(load_checkpoint(source), Quantization(recipe), path, options, SILENT)
            made[path] = True
        return source, path

    return compile_once


PI05 = pytest.param("pi05", "ab2", marks=pytest.mark.slow)


@pytest.mark.parametrize(("policy", "solver"), [("pi0", "ab2"), PI05, ("pi0", "ab3")])
def test_the_cpu_engine_computes_what_pytorch_does(policy, solver, compiled):
    source, path = compiled(policy, solver)
    checkpoint = load_checkpoint(source)
    model, inputs, noise = build_model(checkpoint), make_inputs(checkpoint.config), make_noise(checkpoint.config)
    trace: dict = {}
    executor = CpuExecutor(Plan(path), threads=1)
    actions, _ = executor.run(inputs, noise, trace)
    expected = sample(model, inputs, noise, solver)
    assert np.abs(expected - sample(model, inputs, noise, "euler")).max() > 1e-3  # what a mistaken solver would give
    np.testing.assert_allclose(actions, expected, atol=1e-4)
    np.testing.assert_array_equal(executor.run(inputs, noise)[0], actions)  # nothing is left of the first call
    assert len(trace["x"]) == STEPS + 1


@pytest.mark.parametrize(("policy", "solver"), [("pi0", "ab2"), pytest.param("pi05", "ab3", marks=pytest.mark.slow)])
def test_the_schedule_computes_what_the_cpu_engine_does(policy, solver, compiled):
    plans = {target: Plan(compiled(policy, solver, target)[1]) for target in ("cpu", "cuda")}
    config = load_checkpoint(compiled(policy, solver)[0]).config
    inputs, noise = make_inputs(config), make_noise(config)
    expected, found = {}, {}
    CpuExecutor(plans["cpu"], threads=1).run(inputs, noise, expected)
    actions = emulate.run(plans["cuda"], 86, inputs, noise, found)
    euler = CpuExecutor(Plan(compiled(policy, "euler")[1]), threads=1).run(inputs, noise)[0]
    error = np.abs(actions - expected["x"][-1]).max()
    assert error < 0.2 * np.abs(euler - expected["x"][-1]).max()  # bf16 is between, the solver is not
    schedule = json.loads(bytes(plans["cuda"].read("schedule/sm86.json")))
    steps = [launch for launch in schedule["variants"][0]["step"] if "coefficients" in launch["args"]]
    assert len(steps) == 1 and steps[0]["args"]["history"] is not None
    assert len(schedule["variants"][0]["step"]) == len(
        json.loads(bytes(Plan(compiled(policy, "euler", "cuda")[1]).read("schedule/sm86.json")))["variants"][0]["step"]
    )  # no launch more than Euler's


def test_guidance_reaches_the_steps_that_read_a_guided_one(compiled):
    """Real-time chunking corrects the velocity; the solver then takes corrected velocities throughout."""
    source, path = compiled("pi0", "ab2")
    checkpoint = load_checkpoint(source)
    config, model = checkpoint.config, build_model(checkpoint)
    inputs, noise = make_inputs(config), make_noise(config)
    target = np.random.default_rng(3).standard_normal(noise.shape).astype(np.float32)
    weights = np.linspace(1, 0, len(noise), dtype=np.float32)[:, None]
    actions, _ = CpuExecutor(Plan(path), threads=1).run(inputs, noise, guidance=Guidance(target, weights, 5.0))

    fields = (inputs.pixels(), inputs.image_mask, inputs.tokens, inputs.token_mask, inputs.state, noise)
    images, image_mask, tokens, token_mask, state, x = (torch.from_numpy(each)[None] for each in fields)
    mask = torch.cat((image_mask.repeat_interleave(config.vision.tokens, dim=1), token_mask), dim=1)
    with torch.no_grad():
        _, past = model.prefix(model.embed_images(images), tokens, mask)

        def velocity(x: torch.Tensor, time: float) -> torch.Tensor:
            v, behind = model.velocity(state, x, torch.tensor([time]), mask, past), 1 - time
            gain = 5.0 if behind < 1e-6 else min(5.0, time / behind * (behind**2 + time**2) / time**2)
            return v - gain * torch.from_numpy(weights) * (torch.from_numpy(target) - (x - time * v))

        expected = integrate(velocity, x, Solver("ab2", STEPS))[0][0].numpy()
    np.testing.assert_allclose(actions, expected, atol=1e-3)


@pytest.mark.parametrize("policy", ["pi0"])
def test_the_tensorrt_network_computes_what_pytorch_does(policy, tiny_plans):
    """In float32: the unrolled engine, and one step of a loop by hand; and what stays float32 in a bf16 network."""
    pytest.importorskip("onnx_graphsurgeon")
    from onnx.reference import ReferenceEvaluator

    from duq.compiler.targets.tensorrt.engines import adapt
    from duq.compiler.targets.tensorrt.network import unroll
    from duq.compiler.targets.tensorrt.options import FLOAT_TYPES, FloatType
    from duq.compiler.targets.tensorrt.prepare import prepare, take_embeddings
    from tests.support.networks import with_weights

    checkpoint = load_checkpoint(tiny_plans(policy, "none").checkpoint)
    inputs, noise = make_inputs(checkpoint.config, (True, False, False)), make_noise(checkpoint.config)
    graphs = export(checkpoint.config, checkpoint.weights, STEPS, solver="ab2")
    rewrite(graphs, (*PHASES, *TARGETS["tensorrt"].phases))
    table = take_embeddings(graphs.prefix).const_value.numpy().astype(np.float32)
    float32 = FloatType("fp32", ir.DataType.FLOAT, np.float32, "float")
    ops = {name: prepare(model) for name, model in graphs.items()}
    narrow = adapt(graphs.step, ops["step"], FLOAT_TYPES["bf16"], 86, 816).network.graph
    (x_next,) = [value for value in narrow.outputs if value.name == "x_next"]
    assert "x" in {value.name for value in x_next.inputs[0].inputs}  # as it is, not rounded to bf16
    assert any(node.op == "Concat" and "history" in {each.name for each in node.inputs} for node in narrow.nodes)
    assert not [node for node in narrow.nodes if node.domain == "duq"]

    prefix, step = (adapt(model, ops[name], float32, 86, 816).network for name, model in graphs.items())
    shown = {"x": noise, "step": np.array(1), "history": np.full((1, *noise.shape), 0.5, np.float32)}
    shapes = {value.name: value.shape for value in step.graph.inputs}
    caches = {n: np.ones([s if isinstance(s, int) else 5 for s in shape], np.float32) for n, shape in shapes.items()
              if n.startswith(("key.", "value."))}  # fmt: skip
    x_next, history = ReferenceEvaluator(with_weights(step)).run(["x_next", "history_next"], shown | caches)
    np.testing.assert_allclose(x_next, noise + 1.5 * history[0] - 0.25, atol=1e-5)

    feeds = {
        "images": inputs.pixels()[inputs.image_mask],
        "embeddings": table[inputs.tokens[inputs.token_mask]],
        "state": inputs.state,
        "x": noise,
    }
    whole = unroll(prefix, step, STEPS)
    assert {value.name for value in whole.graph.inputs} == set(feeds)
    (actions,) = ReferenceEvaluator(with_weights(whole)).run(None, feeds)
    np.testing.assert_allclose(actions, sample(build_model(checkpoint), inputs, noise, "ab2"), atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["graph", "unrolled"])
def test_tensorrt_builds_the_engines(loop, tiny_plans, tmp_path):
    """Its parser takes the operators of the definition, and the flow stays float32."""
    pytest.importorskip("tensorrt_rtx")
    from duq.compiler.targets.tensorrt.options import TensorRTOptions

    options = TensorRTOptions(sm=(86,), robot="libero", num_steps=3, solver="ab2", loop=loop)
    checkpoint = load_checkpoint(tiny_plans("pi0", "none").checkpoint)
    compile_policy(checkpoint, Quantization(load_recipe("none", environment={})), tmp_path / "a.plan", options, SILENT)
    graphs = Plan(tmp_path / "a.plan").manifest["graphs"]
    if loop == "unrolled":
        assert "history" not in graphs["sm86/policy"]["inputs"]
        return
    step = graphs["sm86/step"]
    assert step["inputs"]["history"] == {"dtype": "float", "shape": [1, 8, 32]}
    assert {step["outputs"][name]["dtype"] for name in ("x_next", "history_next")} == {"float"}


def test_a_comparison_is_with_ten_euler_steps(compiled, monkeypatch):
    """The solver's error is in the actions, and in no stage before them."""
    source, path = compiled("pi0", "ab2")
    checkpoint, noise = load_checkpoint(source), np.random.default_rng([0, 0]).standard_normal((8, 32), np.float32)
    monkeypatch.setattr(duq.compiler.accuracy.compare, "run_worker", run_here)
    observations = synthetic_observations(checkpoint.config, cameras=1, count=1)
    found = compare(checkpoint, Plan(path), observations, SILENT, threads=1)
    assert (found.summary["plan"]["solver"], found.summary["plan"]["num_steps"]) == ("ab2", STEPS)
    assert found.summary["reference"] == {"solver": "euler", "num_steps": 10}
    inputs = Preprocessor(checkpoint.config, robot="libero", norm_stats=checkpoint.norm_stats).model_inputs(observations[0])
    expected = {name: sample(build_model(checkpoint), inputs, noise, name, steps)[:, :7]
                for name, steps in (("euler", 10), ("ab2", STEPS))}  # fmt: skip
    np.testing.assert_allclose(found.reference[0], expected["euler"], atol=1e-5)
    stages = found.summary["stages"]
    error = np.abs(expected["euler"] - expected["ab2"]).max()
    assert stages["actions"]["max_error"] == pytest.approx(error, rel=0.01) and error > 1e-3
    assert max(stages[name]["max_error"] for name in ("velocity", "actions_same_solver")) < 1e-3


def test_the_plan_says_it(compiled):
    _, path = compiled("pi0", "ab2")
    policy = Policy(path, threads=1)
    assert (policy.metadata["solver"], policy.metadata["num_steps"]) == ("ab2", STEPS)
    assert ("solver", "ab2", "") in settings_rows(Plan(path).manifest)


def test_the_user_chooses(tiny_pi0):
    checkpoint = load_checkpoint(tiny_pi0)
    common = dict(robot="none", action_horizon=8)
    _, settings = settle(checkpoint, Choices(solver="ab2", num_steps=5, **common))
    assert (settings.solver, settings.num_steps, settings.sources["solver"]) == ("ab2", 5, "--solver")
    _, settings = settle(checkpoint, Choices(**common))
    assert (settings.solver, settings.num_steps, settings.sources["solver"]) == ("euler", 10, "the default")
    with pytest.raises(DuqError, match="--solver heun: unknown, one of euler, ab2, ab3"):
        settle(checkpoint, Choices(solver="heun", **common))
    with pytest.raises(DuqError, match="--solver ab3: its first steps are those of lower orders, and so would be all 2"):
        settle(checkpoint, Choices(solver="ab3", num_steps=2, **common))
