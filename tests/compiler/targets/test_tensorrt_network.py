"""The tensorrt target's network on the CPU: ONNX's reference runs it, and every plugin enqueues kernels that numpy emulates.

This shows that the rewrites, packed weights, operands and arguments of launches are right. Whether the kernels do what
their comments say is shown elsewhere (tests/plugins/test_bitblas.py, tests/gpu).
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from rich.progress import Progress

from duq.compiler.accuracy.synthetic import synthetic_observations
from duq.compiler.checkpoint import load_checkpoint
from duq.compiler.graph.export import export
from duq.compiler.phases import rewrite
from duq.compiler.pipeline import PHASES, TARGETS, quantize_checkpoint
from duq.compiler.quant import load_recipe
from duq.compiler.targets.tensorrt.engines import adapt
from duq.compiler.targets.tensorrt.network import Network, unroll
from duq.compiler.targets.tensorrt.options import FloatType
from duq.compiler.targets.tensorrt.precision import is_key_value
from duq.compiler.targets.tensorrt.prepare import prepare, take_embeddings
from duq.plugins import bitblas, nodes, ops, trt
from duq.plugins.bitblas import Tile
from duq.plugins.kernels.reference import Memory, Pointer
from duq.plugins.layout import pack_bitblas, unpack_bitblas
from duq.plugins.nodes import RotateQuantize, Tensor, W4A8Linear
from duq.runtime.executors.cpu import CpuExecutor
from duq.runtime.plan import Plan
from duq.runtime.preprocess import Preprocessor
from tests.support import emulate
from tests.support.networks import with_weights

NAMES = {np.dtype(np.float32): "float", np.dtype(np.int8): "int8", np.dtype(np.int32): "int32"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}


def generated_gemm(n, k, x_q, weight, y, tokens):
    w = unpack_bitblas(weight.read("unsigned char", n * k // 2), (n, k))
    y.write("int", (x_q.read("signed char", tokens, k).astype(np.int64) @ w.T).astype(np.int32))


class Host:
    """Gives a plugin addresses of numpy arrays, and runs what it enqueues."""

    def __init__(self):
        self.buffers: list[Memory] = []

    def tensor(self, array: np.ndarray) -> Tensor:
        self.buffers.append(Memory(array.reshape(-1).view(np.uint8)))
        return Tensor(array.shape, NAMES[array.dtype], len(self.buffers) << 40)

    def pointer(self, address: int | None) -> Pointer | None:
        return Pointer(self.buffers[(address >> 40) - 1], address & ((1 << 40) - 1)) if address else None

    def __getitem__(self, name: nodes.KernelName):
        kernel, _, template = name.expression.rstrip(">").partition("<")

        def launch(shape, arguments, stream):
            values = [self.pointer(a.value) if type(a).__name__ == "c_void_p" else a.value for a in arguments]
            if kernel == bitblas.SYMBOL:
                generated_gemm(*map(int, template.split(", ")[:2]), *values)
            else:
                emulate.launch(name.expression, shape, values)
            for buffer in self.buffers:
                buffer.end_launch()

        return SimpleNamespace(launch=launch)

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        to, source = self.pointer(to), self.pointer(source)
        to.memory.data[to.offset : to.offset + size] = source.memory.data[source.offset : source.offset + size]


def enqueue(plugin, inputs: list[np.ndarray]) -> list[np.ndarray]:
    host, shapes = Host(), [each.shape for each in inputs]
    types = [NAMES[each.dtype] for each in inputs]
    out_types = plugin.output_types(types)
    assert all(plugin.accepts(i, types + out_types) for i in range(len(types) + len(out_types)))
    outputs = [
        np.full(shape, 99, DTYPES[name]) for shape, name in zip(plugin.output_shapes(shapes), out_types, strict=True)
    ]
    workspace = np.zeros(plugin.workspace_bytes(shapes), np.int8)
    tensors = [host.tensor(np.array(each, order="C")) for each in inputs], [host.tensor(each) for each in outputs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nodes.driver, "copy", host.copy)
        plugin.enqueue(*tensors, host.tensor(workspace).address, 0, host)
    return outputs


def by_definition(op: str, overload: str, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """What the operator's ONNX function computes."""
    body = ir.serde.serialize_function(ops.function(op, overload, 23))
    body.name, body.overload = "F", ""
    operands = [onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
                for n, v in zip(body.input, inputs, strict=True)]  # fmt: skip
    call = onnx.helper.make_node("F", list(body.input), list(body.output), domain="duq")
    graph = onnx.helper.make_graph([call], "g", operands, [onnx.ValueInfoProto(name=name) for name in body.output])
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("duq", 1)]
    model = onnx.helper.make_model(graph, functions=[body], opset_imports=opsets, ir_version=10)
    return ReferenceEvaluator(model).run(None, dict(zip(body.input, inputs, strict=True)))


M, N, K = 5, 96, 256
RANDOM = np.random.default_rng(0)
HADAMARD = np.array([[1 - 2 * (bin(i & j).count("1") % 2) for j in range(64)] for i in range(64)], np.float32) / 8
OPERANDS = {
    "input_scale": RANDOM.uniform(0.5, 2, K).astype(np.float32),
    "permutation": RANDOM.permutation(K).astype(np.int32),
    "hadamard": HADAMARD,
    "rotation": np.linalg.qr(RANDOM.standard_normal((K // 32, 32, 32)))[0].astype(np.float32),
    "activation_scale": np.float32(0.05).reshape(()),
    "gain": RANDOM.uniform(0.5, 2, K).astype(np.float32),
    "weight_scale": RANDOM.uniform(1e-3, 1e-2, N).astype(np.float32),
    "output_rotation": np.linalg.qr(RANDOM.standard_normal((N // 16, 16, 16)))[0].astype(np.float32),
    "bias": RANDOM.standard_normal(N).astype(np.float32),
    "residual": RANDOM.standard_normal((1, M, N)).astype(np.float32),
}


@pytest.mark.parametrize("source", nodes.SOURCES)
@pytest.mark.parametrize("scale", ["per_token", "per_tensor"])
@pytest.mark.parametrize("stages", ["", "hadamard", "rotation", "scale", "permute", "scale+permute+hadamard"])
def test_prologue(stages, scale, source):
    overload = "+".join(each for each in (stages, scale) if each)
    plugin = RotateQuantize(overload, source)
    x = RANDOM.standard_normal((1, M, 2 * K if source == "GEGLU" else K)).astype(np.float32)
    operands = [OPERANDS[name] for name in plugin.operands[1:]]
    x_q, x_scale = enqueue(plugin, [x, *operands])

    if source == "GEGLU":
        gate, up = np.split(x, 2, axis=-1)
        x = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up
    if source == "RMS_NORM":
        x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + nodes.EPSILON) * operands.pop(0)
    operands = [each.astype(np.int64) if each.dtype == np.int32 else each for each in operands]
    expected_q, expected_scale = by_definition("RotateQuantize", overload, [x.astype(np.float32), *operands])
    assert x_scale.shape == expected_scale.shape
    np.testing.assert_allclose(x_scale, expected_scale, rtol=1e-5)
    different = x_q.astype(int) - expected_q
    assert np.abs(different).max() <= 1 and (different != 0).mean() < 0.01


@pytest.mark.parametrize("scale", ["per token", "per tensor"])
@pytest.mark.parametrize(
    "stages", ["plain", "bias", "output_rotation", "output_rotation+bias", "residual", "bias+residual"]
)
def test_linear(stages, scale):
    plugin = W4A8Linear(stages, Tile(1, 2, 32, 16, 2, True), "float")
    x_q = RANDOM.integers(-128, 128, (1, M, K)).astype(np.int8)
    weight = RANDOM.integers(-8, 8, (N, K)).astype(np.int8)
    x_scale = RANDOM.uniform(1e-3, 1e-2, (1, M, 1) if scale == "per token" else ()).astype(np.float32)
    x_scale = np.asarray(x_scale, np.float32)
    operands = [OPERANDS[name] for name in plugin.operands[3:]]
    (y,) = enqueue(plugin, [x_q, x_scale, pack_bitblas(weight).view(np.int8), *operands])
    addend = operands.pop() if "residual" in stages else np.float32(0)
    overload = ops.overload_name([stage for stage in stages.split("+") if stage not in ("plain", "residual")])
    (expected,) = by_definition("W4A8Linear", overload, [x_q, x_scale, np.ascontiguousarray(weight.T), *operands])
    expected = expected + addend
    if "output_rotation" in stages:
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    else:
        np.testing.assert_array_equal(y, expected)


class _Plugin(OpRun):
    op_domain = "duq"

    def _run(self, *inputs, stages=None, source=None, tile=None, out_type=None, plugin_namespace=None, plugin_version=None):
        assert (plugin_namespace, plugin_version) == (trt.NAMESPACE, trt.VERSION)
        stored = {"stages": stages, "source": source, "tile": tile, "out_type": out_type}
        fields = [SimpleNamespace(name=name, data=value.encode() if isinstance(value, str) else value)
                  for name, value in stored.items() if value is not None]  # fmt: skip
        return tuple(enqueue(trt.from_fields(type(self).__name__, fields), list(inputs)))


PLUGINS = [type(name, (_Plugin,), {}) for name in nodes.NODES]


@pytest.mark.parametrize(("policy", "loop"), [("pi0", "graph"), pytest.param("pi05", "unrolled", marks=pytest.mark.slow)])
def test_the_network_computes_what_the_cpu_engine_does(tiny_plans, policy, loop):
    """In float32, with the same integers: up to the odd activation that a float difference rounds the other way."""
    compiled = tiny_plans(policy, "llm+expert-mlp")
    source, plan = load_checkpoint(compiled.checkpoint), Plan(compiled.plan)
    preprocessor = Preprocessor(source.config)
    observations = [preprocessor.model_inputs(each) for each in synthetic_observations(source.config, cameras=3, count=2)]
    with Progress(disable=True) as progress:
        integers = quantize_checkpoint(source, load_recipe("llm+expert-mlp", environment={}), observations, progress)
    weights = source.weights | integers.float_weights
    graphs = export(source.config, weights, plan.manifest["num_steps"], integers.packs)
    rewrite(graphs, (*PHASES, *TARGETS["tensorrt"].phases))
    table = take_embeddings(graphs.prefix).const_value.numpy().astype(np.float32)
    float32 = FloatType("fp32", ir.DataType.FLOAT, np.float32, "float")
    prefix_network, step_network = (adapt(model, prepare(model), float32, 86, 816).network for _, model in graphs.items())

    (inputs,) = [preprocessor.model_inputs(each) for each in synthetic_observations(source.config, cameras=1, count=1)]
    noise = np.random.default_rng(0).standard_normal((8, 32)).astype(np.float32)
    feeds = {
        "images": inputs.pixels()[inputs.image_mask],
        "embeddings": table[inputs.tokens[inputs.token_mask]],
        "state": inputs.state,
    }
    trace: dict = {}
    expected, _ = CpuExecutor(plan).run(inputs, noise, trace)
    if loop == "unrolled":
        (actions,) = _run(unroll(prefix_network, step_network, graphs.num_steps), {**feeds, "x": noise})
    else:
        names = [each.name for each in graphs.prefix.graph.outputs]
        prefix = dict(zip(names, _run(prefix_network, feeds), strict=True))
        for name in ("key.0", "value.0", "key.1", "value.1"):
            assert _relative(prefix[name], trace[name]) < 0.01, name
        actions, caches = noise, {name: value for name, value in prefix.items() if is_key_value(name)}
        for index in range(plan.manifest["num_steps"]):
            (actions,) = _run(step_network, {"x": actions, "step": np.array(index), **caches})
    assert _relative(actions, expected) < 0.01


def _run(network: Network, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    wanted = {value.name for value in network.graph.inputs}
    evaluator = ReferenceEvaluator(with_weights(network), new_ops=PLUGINS)
    return evaluator.run(None, {name: feed for name, feed in feeds.items() if name in wanted})


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
