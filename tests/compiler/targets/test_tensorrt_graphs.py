"""The tensorrt target's graphs: which nodes become part of a plugin, and weights that nothing loads before they are written."""

from __future__ import annotations

import ctypes

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from duq.compiler.errors import GraphError
from duq.compiler.graph.passes.quantize import QuantizedTensor
from duq.compiler.graph.weights import Weight, by_content, mark, of_module
from duq.compiler.targets.fuse import fuse
from duq.compiler.targets.tensorrt.builder import _MappedWeights
from duq.compiler.targets.tensorrt.engines import adapt
from duq.compiler.targets.tensorrt.network import Network, is_external, unroll
from duq.compiler.targets.tensorrt.options import FLOAT_TYPES
from duq.compiler.targets.tensorrt.precision import to_float_type
from duq.compiler.targets.tensorrt.prepare import FUSIONS, prepare
from tests.support.networks import with_weights

FLOAT = ir.TensorType(ir.DataType.FLOAT)
K, N = 256, 128
BF16, FP16 = FLOAT_TYPES["bf16"], FLOAT_TYPES["fp16"]


def value(name: str, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, type=FLOAT, shape=ir.Shape(shape))


def weight(name: str, array: np.ndarray | ir.TensorProtocol) -> ir.Value:
    tensor = ir.tensor(array, name=name) if isinstance(array, np.ndarray) else array
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape), const_value=tensor)


def marked(value: ir.Value, record: Weight) -> ir.Value:
    mark(value, record)
    return value


def model_of(inputs: list[ir.Value], outputs: list[ir.Value], nodes: list[ir.Node], weights: list[ir.Value]) -> ir.Model:
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=weights, opset_imports={"": 23, "duq": 1}, name="small")
    return ir.Model(graph, ir_version=10)


class Linear:
    """x -> quantizer -> linear -> y, with what tests put around them; `run` gives the operators of the adapted network."""

    def __init__(self, tokens: int | str = 4):
        self.x = value("x", 1, tokens, K)
        self.nodes: list[ir.Node] = []
        integers = np.random.default_rng(0).integers(-8, 8, (N, K)).astype(np.int8)
        quantized = QuantizedTensor("llm.w.weight_q", lambda: integers, (N, K), 4)
        self.weights = [
            marked(weight("llm.w.weight_q", quantized), of_module("llm.w", "weight", "q")),
            weight("llm.w.weight_scale", np.ones(N, np.float32)),
            weight("llm.gain", np.ones(K, np.float32)),
        ]

    def add(self, op: str, *inputs: ir.Value, count: int = 1, **options) -> list[ir.Value]:
        found = {key: options.pop(key) for key in ("domain", "overload") if key in options}
        node = ir.node(op, list(inputs), attributes=options, num_outputs=count, **found)
        for output in node.outputs:
            output.name = f"v{len(self.nodes)}.{output.index()}"
        self.nodes.append(node)
        return list(node.outputs)

    def linear(self, x: ir.Value) -> ir.Value:
        x_q, x_scale = self.add("RotateQuantize", x, count=2, domain="duq", overload="per_token")
        x_q.type, x_scale.type = ir.TensorType(ir.DataType.INT8), FLOAT
        (y,) = self.add("W4A8Linear", x_q, x_scale, *self.weights[:2], domain="duq", overload="plain")
        y.type, y.shape = FLOAT, ir.Shape([1, self.x.shape[1], N])
        return y

    def run(self, inputs: list[ir.Value], *outputs: ir.Value) -> tuple[list[str], list[dict]]:
        """The network's operators in order, and the attributes of its plugins."""
        for index, output in enumerate(outputs):
            output.name, output.type = f"key.{index}", FLOAT
        model = model_of(inputs, list(outputs), self.nodes, self.weights)
        network, plugins = adapt(model, prepare(model), BF16, 86, 816)
        assert len(plugins) == sum(node.domain == "duq" for node in network.graph.nodes)
        onnx_ops = [node.op for node in network.graph.nodes if node.op != "Cast"]
        return onnx_ops, [node.attrs for node in network.graph.nodes if node.domain == "duq"]


def test_a_norm_and_a_residual_become_part_of_plugins():
    """The quantizer takes the norm's input and gain, the linear takes the sum; the plugins have the nodes' places."""
    each = Linear()
    (normed,) = each.add("RMSNormalization", each.x, each.weights[2], axis=-1, epsilon=1e-6)
    other = value("other", 1, 4, N)
    (total,) = each.add("Add", other, each.linear(normed))
    operators, (quantizer, linear) = each.run([each.x, other], total)
    assert operators == ["RotateQuantize", "W4A8Linear"]
    assert quantizer["source"] == "RMS_NORM" and linear["stages"] == "residual" and linear["out_type"] == "Bf16"


@pytest.mark.parametrize("why", ["another epsilon", "two readers", "an output of the graph", "a view in between"])
def test_norms_that_stay(why):
    each = Linear()
    epsilon = 1e-5 if why == "another epsilon" else 1e-6
    (normed,) = each.add("RMSNormalization", each.x, each.weights[2], axis=-1, epsilon=epsilon)
    normed.shape, normed.type = each.x.shape, FLOAT
    outputs = [*each.add("Relu", normed)] if why == "two readers" else [normed] if why.startswith("an output") else []
    if why == "a view in between":
        each.weights.append(weight("shape", np.array([1, 4, K], np.int64)))
        (normed,) = each.add("Reshape", normed, each.weights[-1])
    operators, (quantizer, _) = each.run([each.x], each.linear(normed), *outputs)
    assert "RMSNormalization" in operators and quantizer["source"] == "PLAIN"


@pytest.mark.parametrize("shape", [(1, 1, N), (1, "tokens", N), (N,)])
def test_sums_that_stay(shape):
    """Only a tensor of the same shape is a residual: of any other, rows would have to be repeated."""
    each, other = Linear(), value("other", *shape)
    (total,) = each.add("Add", each.linear(each.x), other)
    operators, (_, linear) = each.run([each.x, other], total)
    assert operators == ["RotateQuantize", "W4A8Linear", "Add"] and linear["stages"] == "plain"


def test_a_linear_that_is_added_to_itself_stays():
    each = Linear()
    y = each.linear(each.x)
    (total,) = each.add("Add", y, y)
    operators, _ = each.run([each.x], total)
    assert operators[-1] == "Add"


def masked_attention() -> ir.Model:
    q, mask = value("q", 1, 1, 4, 8), value("mask", 4, 4)
    node = ir.node("Attention", [q, q, q, mask])
    node.outputs[0].name = "y"
    return model_of([q, mask], list(node.outputs), [node], [])


def three_joined() -> ir.Model:
    """A linear whose rows are joined with two others' at once."""
    x, w = value("x", 1, 4, 128), weight("llm.w.weight_kn", np.ones((128, 8), np.float32))
    mark(w, of_module("llm.w", "weight", "kn"))
    linear = ir.node("MatMul", [x, w])
    linear.outputs[0].shape, linear.outputs[0].type = ir.Shape((1, 4, 8)), FLOAT
    joined = ir.node("Concat", [linear.outputs[0]] * 3, attributes={"axis": 1})
    return model_of([x], list(joined.outputs), [linear, joined], [w])


def half_an_adaptive_norm() -> ir.Model:
    """A scale by the time's table, but no shift."""
    x, step = value("x", 1, 4, K), ir.Value(name="step", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
    gain, table = weight("ones.256", np.ones(K, np.float32)), weight("time_table", np.ones((4, K), np.float32))
    mark(table, by_content("time_table", np.ones(1)))
    norm, row = ir.node("RMSNormalization", [x, gain]), ir.node("Gather", [table, step])
    scaled = ir.node("Mul", [norm.outputs[0], row.outputs[0]])
    return model_of([x, step], list(scaled.outputs), [norm, row, scaled], [gain, table])


@pytest.mark.parametrize("make", [masked_attention, three_joined, half_an_adaptive_norm])
def test_forms_without_kernels_are_tensorrts(make):
    """`cuda` refuses them, since it covers every node; here they stay nodes of the network."""
    with pytest.raises(GraphError, match="--target cuda"):
        fuse(make())
    assert not [op for op in fuse(make(), FUSIONS) if type(op).__name__ != "Linear"]


class Unread(ir.LazyTensor):
    """A constant that must not be computed."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: ir.DataType = ir.DataType.FLOAT):
        super().__init__(lambda: pytest.fail(f"{name} was read"), dtype=dtype, shape=ir.Shape(shape), name=name)


def test_weights_of_any_size_are_never_in_the_model():
    """Two weights of 4 GB: read by nothing but what writes them, and 200 bytes each in the ONNX file."""
    x = value("images", 1, 65536)
    weights = [weight(f"llm.{name}", Unread(f"llm.{name}", shape)) for name, shape in
               {"a": (65536, 16384), "b": (16384, 65536)}.items()]  # fmt: skip
    first = ir.node("MatMul", [x, weights[0]])
    second = ir.node("MatMul", [first.outputs[0], weights[1]])
    second.outputs[0].name, second.outputs[0].type = "key.0", FLOAT
    model = model_of([x], list(second.outputs), [first, second], weights)
    network = Network.of(model)
    to_float_type(network, BF16)
    proto = network.proto()
    assert proto.ByteSize() < 2000
    stubs = {each.name: each for each in proto.graph.initializer}
    assert all(is_external(each) and each.data_type == onnx.TensorProto.BFLOAT16 for each in stubs.values())
    assert [list(each.dims) for each in stubs.values()] == [[65536, 16384], [16384, 65536]]
    assert network.tensors["llm.a_bf16"].nbytes == 2 << 30
    assert model.graph.initializers["llm.a"].const_value.nbytes == 4 << 30  # the model stays as it is


def test_only_weights_that_the_network_reads_are_written(tmp_path):
    """As the float type, one after the other, where TensorRT reads them; the file has no name by then."""
    x, arrays = value("images", 1, 64), {"llm.a": np.arange(4096.0), "llm.b": -np.arange(4096.0)}
    weights = [weight(name, array.reshape(64, 64).astype(np.float32)) for name, array in arrays.items()]
    weights.append(weight("llm.unread", Unread("llm.unread", (64, 64))))
    first = ir.node("MatMul", [x, weights[0]])
    second = ir.node("MatMul", [first.outputs[0], weights[1]])
    second.outputs[0].name, second.outputs[0].type = "key.0", FLOAT
    network = Network.of(model_of([x], list(second.outputs), [first, second], weights))
    to_float_type(network, BF16)
    names = [each.name for each in network.proto().graph.initializer if is_external(each)]
    assert names == ["llm.a_bf16", "llm.b_bf16"]
    with _MappedWeights(network, names, tmp_path) as places:
        assert not list(tmp_path.iterdir())
        for name, array in zip(names, arrays.values(), strict=True):
            address, size = places[name]
            assert ctypes.string_at(address, size) == array.astype(BF16.numpy).tobytes()


def test_constants_of_one_name_stay_apart_when_unrolled():
    """`factor` is 2 in the prefix and 3 in the step, also once both are of the float type; a weight is stored once."""

    def shared_weight() -> ir.Value:
        return marked(weight("llm.w.weight", np.full((32, 32), 0.5, np.float32)), of_module("llm.w", "weight"))

    images, factor = value("images", 32, 32), weight("factor", np.array(2, np.float32))
    scaled = ir.node("Mul", [images, factor])
    key = ir.node("Mul", [scaled.outputs[0], weight_a := shared_weight()])
    key.outputs[0].name, key.outputs[0].type = "key.0", FLOAT
    prefix = Network.of(model_of([images], list(key.outputs), [scaled, key], [factor, weight_a]))

    x, past, factor = value("x", 32, 32), value("key.0", 32, 32), weight("factor", np.array(3, np.float32))
    change = ir.node("Mul", [past, factor])
    smaller = ir.node("Mul", [change.outputs[0], weight_b := shared_weight()])
    total = ir.node("Add", [x, smaller.outputs[0]])
    total.outputs[0].name, total.outputs[0].type = "x_next", FLOAT
    step = Network.of(model_of([x, past], list(total.outputs), [change, smaller, total], [factor, weight_b]))

    for network in (prefix, step):
        to_float_type(network, FP16)
    policy = unroll(prefix, step, 2)
    assert sorted(each.name for each in policy.proto().graph.initializer if is_external(each)) == ["llm.w.weight_fp16"]
    pixels, noise = (np.random.default_rng(0).uniform(-1, 1, (2, 32, 32))).astype(np.float32)
    (found,) = ReferenceEvaluator(with_weights(policy)).run(None, {"images": pixels, "x": noise})
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, noise + 2 * pixels * 2 * 0.5 * 3 * 0.5, atol=5e-3)
