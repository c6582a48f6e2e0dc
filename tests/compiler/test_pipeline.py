"""The compiler end to end, and each of its rewrites, against the PyTorch reference in float32."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from rich.progress import Progress

from duq.compiler.checkpoint import load_checkpoint
from duq.compiler.checkpoint.synthetic import make_checkpoint
from duq.compiler.graph.export import export
from duq.compiler.graph.passes.merge import merge_quantized_linears
from duq.compiler.model import build_model, timesteps
from duq.compiler.phases import passes_of, rewrite
from duq.compiler.pipeline import PHASES, TARGETS, compile_policy, quantize_checkpoint
from duq.compiler.quant import Quantization, Recipe, load_recipe
from duq.compiler.targets import Options
from duq.plugins import ops
from duq.runtime.executors.cpu import CpuExecutor
from duq.runtime.plan import Plan
from duq.runtime.preprocess import ModelInputs
from tests.support.inputs import make_inputs, make_noise, reference

ONNXRUNTIME = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])


def run_graphs(graphs, inputs: ModelInputs, noise: np.ndarray) -> np.ndarray:
    """Runs both graphs whatever inputs they have at this point of the compiler."""
    for _, model in graphs.items():
        ops.add_functions(model)
    compacted = "image_mask" not in {value.name for value in graphs.prefix.graph.inputs}
    image_mask, token_mask = inputs.image_mask, inputs.token_mask
    feeds = {
        "images": inputs.pixels()[image_mask] if compacted else inputs.pixels(),
        "tokens": inputs.tokens[token_mask] if compacted else inputs.tokens,
        "image_mask": image_mask,
        "token_mask": token_mask,
        "prefix_mask": np.concatenate([np.repeat(image_mask, graphs.config.vision.tokens), token_mask]),
        "state": inputs.state,
    }
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    prefix, step = (
        onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options) for _, model in graphs.items()
    )
    names = [output.name for output in prefix.get_outputs()]
    feeds |= dict(
        zip(names, prefix.run(names, {value.name: feeds[value.name] for value in prefix.get_inputs()}), strict=True)
    )
    x = noise
    for index, time in enumerate(timesteps(graphs.num_steps)):
        feeds |= {"x": x, "time": np.array(time, np.float32), "step": np.array(index)}
        (x,) = step.run(["x_next"], {value.name: feeds[value.name] for value in step.get_inputs()})
    return x


@pytest.mark.skipif(ONNXRUNTIME < (1, 24), reason="Python 3.10's ONNX Runtime has no Cos of opset 22")
@pytest.mark.parametrize("policy", ["pi0", "pi05"])
def test_every_rewrite_is_exact(policy, tiny_plans):
    checkpoint = load_checkpoint(tiny_plans(policy, "none").checkpoint)
    inputs, noise = make_inputs(checkpoint.config), make_noise(checkpoint.config)
    expected = reference(build_model(checkpoint), inputs, noise, num_steps=4)
    graphs = export(checkpoint.config, checkpoint.weights, num_steps=4)
    np.testing.assert_allclose(run_graphs(graphs, inputs, noise), expected, atol=1e-5)
    for each in passes_of((*PHASES, *TARGETS["cuda"].phases)):
        each.run(graphs)
        np.testing.assert_allclose(run_graphs(graphs, inputs, noise), expected, atol=1e-5, err_msg=each.name)
    # What the rewrites are for: no masks, no state and no time in the loop.
    assert {value.name for value in graphs.prefix.graph.inputs} <= {"images", "tokens", "state"}
    step_inputs = {value.name for value in graphs.step.graph.inputs if not value.name.startswith(("key.", "value."))}
    assert step_inputs == {"x", "step"}
    # One node for each rotary embedding, of queries and keys; the last layer of the prefix has keys only, and so has
    # that of pi0's state token.
    rotations = sum(node.op_type == "RotaryEmbedding" for _, model in graphs.items() for node in model.graph)
    depth = checkpoint.config.llm.depth
    assert rotations == 2 * depth + (2 * depth - 1) * (1 if policy == "pi05" else 2)


@pytest.mark.skipif(ONNXRUNTIME < (1, 24), reason="Python 3.10's ONNX Runtime confuses overloads")
@pytest.mark.parametrize("policy", ["pi0", "pi05"])
def test_merging_quantized_linears_changes_no_bit(policy, tiny_plans):
    checkpoint = load_checkpoint(tiny_plans(policy, "none").checkpoint)
    inputs, noise = make_inputs(checkpoint.config), make_noise(checkpoint.config)
    with Progress(disable=True) as progress:
        quantization = quantize_checkpoint(checkpoint, load_recipe("llm+expert-mlp", environment={}), [inputs], progress)
    weights = checkpoint.weights | quantization.float_weights
    graphs = export(checkpoint.config, weights, num_steps=4, packs=quantization.packs)
    rewrite(graphs, PHASES)
    expected, linears = run_graphs(graphs, inputs, noise), count_linears(graphs)
    assert merge_quantized_linears(graphs) > 0
    np.testing.assert_array_equal(run_graphs(graphs, inputs, noise), expected)
    assert 0 < count_linears(graphs) < linears


def count_linears(graphs) -> int:
    return sum(node.op_type == "W4A8Linear" for _, model in graphs.items() for node in model.graph)


@pytest.mark.parametrize("policy", ["pi0", "pi05"])
def test_float_plan_equals_pytorch(policy, tiny_plans, tmp_path):
    source, plan = tiny_plans(policy, "none")
    checkpoint = load_checkpoint(source)
    model, noise = build_model(checkpoint), make_noise(checkpoint.config)
    path = tmp_path / "a plan.of-any-name"
    path.hardlink_to(plan)
    executor = CpuExecutor(Plan(path), threads=1)
    full = checkpoint.config.max_prompt_tokens
    cases = [((True, False, False), 1), ((True, False, True), full), ((True, True, True), 5)]
    for seed, (cameras, prompt) in enumerate(cases):
        inputs = make_inputs(checkpoint.config, cameras, prompt, seed)
        actions, _ = executor.run(inputs, noise)
        np.testing.assert_allclose(actions, reference(model, inputs, noise, num_steps=4), atol=1e-3)
        again, _ = executor.run(inputs, noise)
        np.testing.assert_array_equal(actions, again)


def test_long_chunks_equal_pytorch(tmp_path):
    """Masks grow with the square of the chunk, and are no weights however large they are."""
    checkpoint = load_checkpoint(make_checkpoint(tmp_path / "checkpoint", "tiny", action_horizon=64))
    with Progress(disable=True) as progress:
        compile_policy(checkpoint, Quantization(Recipe()), tmp_path / "engine.plan", Options(num_steps=2), progress)
    inputs, noise = make_inputs(checkpoint.config, (True, False, False), 5), make_noise(checkpoint.config)
    actions, _ = CpuExecutor(Plan(tmp_path / "engine.plan"), threads=1).run(inputs, noise)
    np.testing.assert_allclose(actions, reference(build_model(checkpoint), inputs, noise, num_steps=2), atol=1e-3)
