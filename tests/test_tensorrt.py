"""The tensorrt target: engines built without a GPU, what the plugins infer, what is refused. tests/gpu runs the plugins."""
import importlib.util
import itertools
import json
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from rich.progress import Progress

from compiler.cli import compile_main
from compiler.targets import tensorrt
from compiler.targets.tensorrt import builder, network
from plugins import bitblas, nodes, ops, trt
from plugins.bitblas import Tile
from plugins.errors import KernelError
from plugins.nodes import RotateQuantize, W4A8Linear
from runtime.plan import Plan

INSTALLED = any(importlib.util.find_spec(name) for name in trt.FLAVOURS) and importlib.util.find_spec("bitblas")
needs_tensorrt = pytest.mark.skipif(not INSTALLED, reason="neither the tensorrt nor the tensorrt-rtx extra, or no bitblas")

ROTATIONS = ["hadamard+per_token", "per_token", "scale+permute+rotation+per_tensor", "hadamard+per_tensor"]
EPILOGUES = ["plain", "bias", "output_rotation", "output_rotation+bias"]
TILE = Tile(1, 2, 32, 32, 2, True)


NODES_OF_EVERY_KIND = [
    *(("RotateQuantize", RotateQuantize(stages)) for stages in ROTATIONS),
    *(("W4A8Linear", W4A8Linear(stages, TILE, "Bf16")) for stages in EPILOGUES),
]


@pytest.mark.parametrize(("op", "node"), NODES_OF_EVERY_KIND, ids=str)
def test_operands_are_the_operators(op, node):
    assert node.operands == ops.inputs_of(op, node.stages)


SHAPES = {
    "x": (1, 5, 128), "input_scale": (128,), "permutation": (128,), "hadamard": (64, 64), "rotation": (2, 64, 64),
    "activation_scale": (), "x_q": (1, 5, 128), "x_scale": (1, 5, 1), "weight": (128, 96), "weight_scale": (96,),
    "output_rotation": (6, 16, 16), "bias": (96,),
}  # fmt: skip
DTYPES = {"permutation": np.int64, "x_q": np.int8, "weight": np.int8}


@pytest.mark.parametrize(("op", "node"), NODES_OF_EVERY_KIND, ids=str)
def test_shapes_and_types_are_those_of_the_operators_function(op, node):
    """Runs the ONNX function that defines the operator and compares what comes out with what the plugin announces."""
    names = node.operands
    body = ir.serde.serialize_function(ops.function(op, node.stages, 23))
    body.name, body.overload = "F", ""
    outputs = list(body.output)
    info = [onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(DTYPES.get(n, np.float32))), SHAPES[n]) for n in names]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("F", names, outputs, domain="duq")], "g", info,
        [onnx.ValueInfoProto(name=name) for name in outputs],
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("duq", 1)]
    model = onnx.helper.make_model(graph, functions=[body], opset_imports=opsets, ir_version=10)
    feeds = {name: np.ones(SHAPES[name], DTYPES.get(name, np.float32)) for name in names}
    results = onnx.reference.ReferenceEvaluator(model).run(None, feeds)
    assert [tuple(shape) for shape in node.output_shapes([SHAPES[n] for n in names])] == [each.shape for each in results]
    types = {"int8": np.int8, "float": np.float32, "Bf16": np.float32}  # y is the float32 result, rounded
    assert [types[name] for name in node.output_types(["float"])] == [each.dtype for each in results]


@pytest.mark.parametrize(("op", "node"), NODES_OF_EVERY_KIND, ids=str)
def test_fields_make_the_same_plugin_again(op, node):
    stored = {name: value for name, value in trt.attributes(node).items() if not name.startswith("plugin_")}
    fields = [SimpleNamespace(name=n, data=np.array(v, np.int32) if isinstance(v, list) else v.encode()) for n, v in stored.items()]
    assert trt.from_fields(op, fields) == node
    with pytest.raises(KernelError, match="compile the plan with this duq"):
        trt.from_fields(op, fields[1:])


def test_types_are_accepted_where_the_kernels_take_them():
    prologue, linear = RotateQuantize("permute+per_token"), W4A8Linear("bias", TILE, "Bf16")
    good = ["Bf16", "int32", "int8", "float"]
    assert all(prologue.accepts(i, good) for i in range(4))
    assert not prologue.accepts(0, ["int8"]) and not prologue.accepts(1, ["Bf16", "int64"])
    good = ["int8", "float", "int8", "float", "float", "Bf16"]
    assert all(linear.accepts(i, good) for i in range(6))
    assert not linear.accepts(5, [*good[:5], "Half"]) and not linear.accepts(4, [*good[:4], "Bf16"])


@pytest.fixture(scope="module")
def compiled(tiny_plans, tmp_path_factory):
    """(policy, loop) -> the plan, compiled once with the integers of the cpu plan's preset."""
    import functools

    from compiler.accuracy.synthetic import synthetic_observations
    from compiler.checkpoint import load_checkpoint
    from compiler.pipeline import Options, compile_policy, quantize_checkpoint
    from compiler.quant import load_recipe
    from runtime.preprocess import Preprocessor

    directory = tmp_path_factory.mktemp("tensorrt")

    @functools.cache
    def quantization(policy):
        source = load_checkpoint(tiny_plans(policy, "llm+expert-mlp").checkpoint)
        preprocessor = Preprocessor(source.config)
        inputs = [preprocessor.model_inputs(each) for each in synthetic_observations(source.config, cameras=3, count=2)]
        with Progress(disable=True) as progress:
            return source, quantize_checkpoint(source, load_recipe("llm+expert-mlp", environment={}), inputs, progress)

    @functools.cache
    def plan(policy, loop, float_type="bf16"):
        source, integers = quantization(policy)
        out = directory / f"{policy}.{loop}.{float_type}.plan"
        options = Options(target="tensorrt", sm=(86,), robot="libero", num_steps=4, loop=loop, float_type=float_type)
        with Progress(disable=True) as progress:
            compile_policy(source, integers, out, options, progress)
        return Plan(out)

    return plan


PLANS = list(itertools.product(["pi0", "pi05"], ["graph", "unrolled"]))


@needs_tensorrt
@pytest.mark.parametrize(("policy", "loop"), PLANS)
def test_engines_are_built_without_a_gpu(compiled, policy, loop):
    plan = compiled(policy, loop)
    section = plan.manifest["graphs"]["sm86"]
    assert section["flavour"] in trt.FLAVOURS and section["version"] == trt.library().__version__
    assert set(section["engines"]) == ({"prefix", "step"} if loop == "graph" else {"policy"})
    for name, engine in section["engines"].items():
        assert len(plan.read(f"engine/sm86/{name}")) == engine["bytes"] > 1 << 20
        count = sum(number for op, number in engine["ops"].items() if op.startswith("duq::"))
        assert engine["plugins"] == count > 0
        assert b"Engine generation completed" in bytes(plan.read(f"engine/sm86/{name}.log"))
    assert {kernel["cubin"] for kernel in section["kernels"]} <= set(plan.names)
    assert all(bytes(plan.read(kernel["cubin"])).startswith(b"\x7fELF") for kernel in section["kernels"])


@needs_tensorrt
@pytest.mark.parametrize("policy", ["pi0", "pi05"])
def test_every_quantised_linear_runs_a_bitblas_kernel(compiled, policy):
    plan = compiled(policy, "graph")
    section = plan.manifest["graphs"]["sm86"]
    merged = {part for name in section["linears"] for part in name.split("+")}
    assert merged <= set(plan.manifest["quantization"]["linears"])
    dead = {"llm.layers.1." + name for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.o_proj")}
    assert set(plan.manifest["quantization"]["linears"]) - merged <= dead | {"llm.layers.1.self_attn.q_proj"}
    kernels = {kernel["expression"] for kernel in section["kernels"] if kernel["source"] == "bitblas"}
    assert set(section["linears"].values()) == kernels


@needs_tensorrt
@pytest.mark.parametrize("policy", ["pi0", "pi05"])
def test_loops_have_the_same_operators_per_step(compiled, policy):
    graph = compiled(policy, "graph").manifest["graphs"]["sm86"]["engines"]
    (unrolled,) = compiled(policy, "unrolled").manifest["graphs"]["sm86"]["engines"].values()
    assert unrolled["plugins"] == graph["prefix"]["plugins"] + 4 * graph["step"]["plugins"]
    for op in ("Attention", "RMSNormalization", "MatMul", "Gelu", "duq::W4A8Linear"):
        assert unrolled["ops"][op] == graph["prefix"]["ops"].get(op, 0) + 4 * graph["step"]["ops"][op]


@needs_tensorrt
def test_fp16_builds_as_well(compiled):
    section = compiled("pi05", "graph", "fp16").manifest["graphs"]["sm86"]
    assert section["engines"]["step"]["inputs"]["key.0"]["dtype"] == "float16"
