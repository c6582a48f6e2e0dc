"""The graphs as TensorRT takes them: plugin nodes, one float type throughout, and the denoising steps in a row.

The network is strongly typed: what the ONNX says is what runs. Activations and weights become `float_type`; scales and
rotations of the quantized linears stay float32, and so does the state x of the flow, to which every step adds a little.
"""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from duq.compiler.errors import GraphError
from duq.compiler.graph.edit import adopt, expect, initializer, insert_before, is_weight, lazy, reader, replace
from duq.compiler.graph.export import Graphs
from duq.compiler.graph.weights import is_embedding, record, weight_of
from duq.plugins import bitblas, ops
from duq.plugins.gpu import gpu_of
from duq.plugins.layout import pack_bitblas
from duq.plugins.nodes import EPSILON, NODES, KernelName, Node, RotateQuantize, Tensor, W4A8Linear
from duq.plugins.trt import attributes

FLOAT_TYPES = {
    "bf16": (ir.DataType.BFLOAT16, ml_dtypes.bfloat16, "Bf16"),
    "fp16": (ir.DataType.FLOAT16, np.float16, "Half"),
}


class Plugin(NamedTuple):
    """A plugin node: what it runs, and the BitBLAS kernel's (N, K, tile) if it runs one."""

    node: Node
    kernels: list[KernelName]
    problem: bitblas.Problem | None


def adapt(graphs: Graphs, float_type: str, sm: int, prefix_tokens: int) -> dict[str, dict[str, Plugin]]:
    """Rewrites both graphs in place; returns for each graph its plugin nodes by name.

    prefix_tokens: of the largest observation, which the kernels of the prefix are chosen for.
    Raises GraphError for a quantized linear that there is no plugin for, KernelError for one that has no kernel.
    """
    plugins = {}
    for name, model in graphs.items():
        common.ShapeInferencePass()(model)
        _check_operators(model)
        expand_attention_of_one_query(model)
        plugins[name] = _to_plugins(model, FLOAT_TYPES[float_type][2], sm, prefix_tokens)
        to_float_type(model, float_type)
        model.functions.clear()
        model.opset_imports[ops.DOMAIN] = ops.VERSION
    return plugins


def take_embeddings(model: ir.Model) -> ir.Value:
    """Makes the rows of the token table an input, `embeddings` [prompt, width], in place of `tokens`; returns the table.

    The executor looks the rows up on the host: a gigabyte less on the device for 200 rows.
    """
    graph = model.graph
    (tokens,) = [value for value in graph.inputs if value.name == "tokens"]
    (gather,) = [node for node in graph if node.op_type == "Gather" and is_embedding(node.inputs[0])]
    table, width = gather.inputs[0], gather.inputs[0].shape[-1]
    embeddings = ir.Value(
        name="embeddings", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([tokens.shape[0], width])
    )
    graph.inputs[list(graph.inputs).index(tokens)] = embeddings
    widened = reader(gather.outputs[0])
    rows = widened.outputs[0] if widened is not None and widened.op_type == "Cast" else gather.outputs[0]
    (one_sequence,) = insert_before(
        gather, "Unsqueeze", [embeddings, initializer(graph, "first_axis", np.array([0], np.int64))]
    )
    one_sequence.shape, one_sequence.type = rows.shape, rows.type
    rows.replace_all_uses_with(one_sequence)
    for use in list(tokens.uses()):
        if use.node.op_type == "Shape":  # of its first axis
            use.node.replace_input_with(use.idx, embeddings)
    common.RemoveUnusedNodesPass()(model)
    expect(not tokens.uses(), "tokens are read for their rows and their number only")
    return table


def _check_operators(model: ir.Model) -> None:
    unknown = sorted({node.op_type for node in model.graph if node.domain == ops.DOMAIN} - set(NODES))
    if unknown:
        raise GraphError(
            f"--target tensorrt has plugins for {', '.join(NODES)}, not for {', '.join(unknown)}: quantize to 4-bit weights "
            "and 8-bit activations, or leave those linears in float"
        )


def expand_attention_of_one_query(model: ir.Model) -> None:
    """softmax(q k^T scale) v of a single token, pi0's state, as products: TensorRT-RTX has no attention kernel for it."""
    for node in list(model.graph):
        if node.op_type != "Attention" or node.inputs[0].shape[-2] != 1 or len(node.inputs) > 3:
            continue
        query, key, value = node.inputs
        scale = node.attributes["scale"].value if "scale" in node.attributes else query.shape[-1] ** -0.5
        (turned,) = insert_before(node, "Transpose", [key], perm=[0, 1, 3, 2])
        factor = initializer(model.graph, f"attention_scale_{query.shape[-1]}", np.array(scale, np.float32))
        (scaled,) = insert_before(node, "Mul", [query, factor])
        (scores,) = insert_before(node, "MatMul", [scaled, turned])
        (weights,) = insert_before(node, "Softmax", [scores], axis=-1)
        (mixed,) = insert_before(node, "MatMul", [weights, value])
        replace(node.outputs[0], mixed)
    common.RemoveUnusedNodesPass()(model)


def to_float_type(model: ir.Model, float_type: str) -> None:
    """float32 -> `float_type`, save for the operands of duq nodes, the observation, and the state of the flow."""
    onnx_type, numpy_type, _ = FLOAT_TYPES[float_type]
    graph = model.graph
    for value in list(graph.initializers.values()):
        readers = {node.domain for node in value.consumers()}
        if value.dtype == ir.DataType.FLOAT and readers - {ops.DOMAIN}:
            cast = lambda array: array.astype(numpy_type)  # noqa: E731
            weight = weight_of(value)
            narrow = f"{value.name}.{float_type}" if weight is None else weight.in_form(float_type)
            replace_initializer(value, lazy(graph, narrow, [value], value.shape.numpy(), cast, onnx_type))
    for node in graph:
        target = node.attributes.get("to")
        if node.op_type == "Cast" and target is not None and target.value == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", int(onnx_type))
        for value in node.outputs:
            value.type = value.shape = None  # TensorRT infers what is between inputs and outputs
    for value in graph.inputs:
        if value.dtype == ir.DataType.FLOAT and (value.name == "embeddings" or is_key_value(value.name)):
            value.type = ir.TensorType(onnx_type)  # a new one: clones of a graph share their types
        elif value.dtype == ir.DataType.FLOAT:
            _cast_input(graph, value, onnx_type)
    for value in graph.outputs:
        value.type = ir.TensorType(ir.DataType.FLOAT if value.name == "x_next" else onnx_type)
        if value.name == "x_next":
            _keep_flow_in_float32(value)


def is_key_value(name: str) -> bool:
    return name.split(".")[0] in ("key", "value")


def replace_initializer(old: ir.Value, new: ir.Value) -> None:
    graph = old.graph
    for use in list(old.uses()):
        if use.node.domain != ops.DOMAIN:
            use.node.replace_input_with(use.idx, new)
    if not old.uses():
        del graph.initializers[old.name]


def _cast_input(graph: ir.Graph, value: ir.Value, onnx_type: ir.DataType) -> None:
    readers = list(value.uses())
    (cast,) = insert_before(graph[0], "Cast", [value], to=int(onnx_type))
    for use in readers:
        use.node.replace_input_with(use.idx, cast)


def _keep_flow_in_float32(x_next: ir.Value) -> None:
    """x_next = x + change: the sum is taken in float32, of the input as it is."""
    add = x_next.producer()
    (cast,) = [operand.producer() for operand in add.inputs if operand.producer().op_type == "Cast"]
    (change,) = [operand for operand in add.inputs if operand.producer() is not cast]
    (wide,) = insert_before(add, "Cast", [change], to=int(ir.DataType.FLOAT))
    for index, operand in enumerate(add.inputs):
        add.replace_input_with(index, wide if operand is change else cast.inputs[0])


def _to_plugins(model: ir.Model, float_type: str, sm: int, prefix_tokens: int) -> dict[str, Plugin]:
    found, graph = {}, model.graph
    for node in list(graph):
        if node.domain != ops.DOMAIN:
            continue
        if node.op_type == "RotateQuantize":
            node, plugin = _prologue(graph, node, float_type, prefix_tokens)
        else:
            node, plugin = _linear(graph, node, float_type, sm, prefix_tokens)
        node.overload = ""
        node.attributes.update({name: _attribute(name, value) for name, value in attributes(plugin.node).items()})
        found[node.name] = plugin
    common.RemoveUnusedNodesPass()(model)
    return found


def _prologue(graph: ir.Graph, node: ir.Node, float_type: str, prefix_tokens: int) -> tuple[ir.Node, Plugin]:
    """The node of a prologue with what computes its input, and its plugin."""
    source, computed_from = _source(node.inputs[0])
    plugin = RotateQuantize(node.overload, source)
    operands = dict(zip(plugin.operands, [*computed_from, *node.inputs[1:]]))
    if "permutation" in operands:
        wide = operands["permutation"]
        narrow = lambda array: array.astype(np.int32)  # noqa: E731
        operands["permutation"] = lazy(
            graph, record(wide).in_form("int32"), [wide], wide.shape.numpy(), narrow, ir.DataType.INT32
        )
    options = {"domain": ops.DOMAIN, "name": node.name}
    outputs = insert_before(node, node.op_type, list(operands.values()), len(node.outputs), **options)
    for old, new in zip(node.outputs, outputs):
        old.replace_all_uses_with(new)
    x, *others = operands.values()
    shapes = [(prefix_tokens, x.shape[-1]), *(tuple(value.shape.numpy()) for value in others)]
    tensors = [Tensor(shape, "float" if index else float_type) for index, shape in enumerate(shapes)]
    return outputs[0].producer(), Plugin(plugin, list(plugin.launches(tensors)), None)


def _source(x: ir.Value) -> tuple[str, list[ir.Value]]:
    """How a prologue's input is computed, as RotateQuantize's `source`, and from what: what nobody else reads is left to it."""
    node = x.producer()
    if reader(x) is None or node is None:
        return "PLAIN", [x]
    if node.op_type == "RMSNormalization" and is_weight(node.inputs[1], rank=1):
        epsilon = node.attributes["epsilon"].value if "epsilon" in node.attributes else 1e-5
        return ("RMS_NORM", list(node.inputs)) if np.isclose(epsilon, EPSILON) else ("PLAIN", [x])
    if node.op_type == "Mul" and all(reader(operand) is node for operand in node.inputs):
        gelu, up = node.inputs[0].producer(), node.inputs[1]
        if gelu.op_type == "Gelu" and gelu.attributes["approximate"].value == "tanh" and reader(gelu.inputs[0]) is gelu:
            split = up.producer()
            if split.op_type == "Split" and list(split.outputs) == [gelu.inputs[0], up]:
                return "GEGLU", [split.inputs[0]]
    return "PLAIN", [x]


def _linear(graph: ir.Graph, node: ir.Node, float_type: str, sm: int, prefix_tokens: int) -> tuple[ir.Node, Plugin]:
    """The node of a linear, with the sum behind it if there is one, and its plugin."""
    weight, tokens = node.inputs[2], node.inputs[0].producer().inputs[0].shape[:-1]
    rows = int(np.prod(tokens)) if all(isinstance(size, int) for size in tokens) else prefix_tokens
    k, n = weight.shape.numpy()
    tile, stages = bitblas.best(rows, n, k, gpu_of(sm)), ops.stages(node.overload)
    inputs = [*node.inputs[:2], _packed(graph, weight), *node.inputs[3:]]
    last, residual = _residual(node)
    if residual is not None:
        stages, inputs = [*stages, "residual"], [*inputs, residual]
    plugin = W4A8Linear(ops.overload_name(stages), tile, float_type)
    options = {"domain": ops.DOMAIN, "name": "+".join(record(weight).linears)}
    (y,) = insert_before(last, node.op_type, inputs, **options)
    replace(last.outputs[0], y)
    operands = [Tensor((rows, k), "int8"), Tensor((rows, 1), "float"), Tensor((n, k // 2), "int8"), Tensor((n,), "float")]
    return y.producer(), Plugin(plugin, list(plugin.launches(operands)), (n, k, tile))


def _residual(node: ir.Node) -> tuple[ir.Node, ir.Value | None]:
    """(The node that adds a tensor of the same shape to a linear's output, that tensor), or (the linear, None)."""
    y = node.outputs[0]
    add = reader(y)
    if add is None or add.op_type != "Add" or y.shape is None:
        return node, None
    (other,) = [operand for operand in add.inputs if operand is not y] or [y]
    same = other is not y and other.shape is not None and list(map(str, other.shape)) == list(map(str, y.shape))
    return (add, other) if same and not other.is_initializer() else (node, None)


def _attribute(name: str, value) -> ir.Attr:
    return ir.AttrInt64s(name, value) if isinstance(value, list) else ir.AttrString(name, value)


def _packed(graph: ir.Graph, weight: ir.Value) -> ir.Value:
    """INT4 [K, N] -> the kernels' int8 [N, K / 2], when it is written."""
    tensor, (k, n) = weight.const_value, weight.shape.numpy()
    packed = record(weight).in_form("bitblas")

    def pack() -> ir.TensorProtocol:
        return ir.Tensor(pack_bitblas(np.ascontiguousarray(tensor.integers())).view(np.int8), name=packed.name)

    lazy_tensor = ir.LazyTensor(pack, dtype=ir.DataType.INT8, shape=ir.Shape((n, k // 2)), name=packed.name)
    return initializer(graph, packed, lazy_tensor)


def unroll(graphs: Graphs) -> ir.Model:
    """Prefix and all denoising steps as one model: images, embeddings, (state,) x -> x_next. `graphs` are used up."""
    model, step = graphs.prefix, graphs.step
    graph, key_values = model.graph, {output.name: output for output in model.graph.outputs}
    shared = {value: adopt(graph, value, "step") for value in step.graph.initializers.values()}
    (x,) = [value for value in step.graph.inputs if value.name == "x"]
    flow = ir.Value(name="x", type=x.type, shape=x.shape)
    graph.inputs.append(flow)
    for index in range(graphs.num_steps):
        number = initializer(graph, f"step_{index}", np.array(index, np.int64))
        inputs = {value: key_values.get(value.name, number) for value in step.graph.inputs} | {x: flow}
        flow = _append(graph, step.graph, shared | inputs, f"step_{index}")
    flow.name = "x_next"
    flow.type, flow.shape = ir.TensorType(ir.DataType.FLOAT), x.shape
    graph.outputs.clear()
    graph.outputs.append(flow)
    common.RemoveUnusedNodesPass()(model)
    model.opset_imports[ops.DOMAIN] = ops.VERSION
    return model


def _append(graph: ir.Graph, step: ir.Graph, values: dict[ir.Value, ir.Value], prefix: str) -> ir.Value:
    """Copies the step's nodes behind the graph's; returns the copy of x_next."""
    values = dict(values)
    for node in step:
        copy = ir.Node(
            node.domain,
            node.op_type,
            [None if operand is None else values[operand] for operand in node.inputs],
            list(node.attributes.values()),
            overload=node.overload,
            num_outputs=len(node.outputs),
            name=f"{prefix}.{node.name}",
        )
        graph.append(copy)
        for old, new in zip(node.outputs, copy.outputs):
            new.name = f"{prefix}.{old.name}"
            values[old] = new
    return values[step.outputs[0]]
