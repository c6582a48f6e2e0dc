"""Linears that read the same input become one: q, k and v; gate and up. One large product instead of two or three."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import onnx_ir as ir

from duq.compiler.graph.edit import initializer, insert_before, is_weight, lazy, replace, simplify
from duq.compiler.graph.export import Graphs
from duq.compiler.graph.passes.quantize import QuantizedTensor
from duq.compiler.graph.weights import merged, record
from duq.plugins import ops


def merge_float_linears(graphs: Graphs) -> int:
    """[x W1, x W2] = x [W1, W2] for float products. Matches groups."""
    matches = 0
    for _, model in graphs.items():
        groups = defaultdict(list)
        for node in model.graph:
            if node.op_type == "MatMul" and is_weight(node.inputs[1], rank=2):
                groups[node.inputs[0]].append(node)
        matches += _merge_each(model, groups)
    return matches


def merge_quantized_linears(graphs: Graphs) -> int:
    """The same for quantized linears of one variant: a prologue and one integer product for the group.

    For GPUs. On CPUs the product gains nothing and splitting its large output costs (docs/performance.md). Matches groups.
    """
    matches = 0
    for _, model in graphs.items():
        groups = defaultdict(list)
        for node in model.graph:
            if node.op_type in ops.QUANTIZED_LINEARS:
                groups[node.inputs[0], node.op_identifier(), _output_block(node)].append(node)
        matches += _merge_each(model, groups)
    return matches


def _output_block(node: ir.Node) -> int:
    """The block size of a quantized linear's output rotation; 0 if it has none."""
    operands = dict(zip(ops.inputs_of(node.op_type, node.overload), node.inputs, strict=True))
    return int(operands["output_rotation"].shape.numpy()[-1]) if "output_rotation" in operands else 0


def _merge_each(model: ir.Model, groups: Mapping[Any, list[ir.Node]]) -> int:
    several = [nodes for nodes in groups.values() if len(nodes) > 1]
    for nodes in several:
        _merge(model.graph, nodes)
    simplify(model)
    return len(several)


def _merge(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    """Replaces the nodes by one of the concatenated weights, scales and biases, and a Split of its output."""
    shared = ops.weight_index(nodes[0].op_type)  # x_q and x_scale, or x, come before it
    columns = [node.inputs[shared].shape[-1] for node in nodes]
    operands = [_concatenate(graph, [node.inputs[i] for node in nodes]) for i in range(shared, len(nodes[0].inputs))]
    inputs = [*nodes[0].inputs[:shared], *operands]
    first = nodes[0]
    (y,) = insert_before(first, first.op_type, inputs, domain=first.domain, overload=first.overload)
    sizes = initializer(graph, "split_" + "_".join(map(str, columns)), np.array(columns, np.int64))
    for node, part in zip(nodes, insert_before(nodes[0], "Split", [y, sizes], len(nodes), axis=-1), strict=True):
        replace(node.outputs[0], part)


def _concatenate(graph: ir.Graph, values: list[ir.Value]) -> ir.Value:
    whole = merged([record(value) for value in values])
    axis = 0 if len(values[0].shape) == 3 else -1  # of an output rotation the blocks, of all else the channels
    shape = list(values[0].shape.numpy())
    shape[axis] = sum(value.shape.numpy()[axis] for value in values)
    dtype = values[0].dtype
    if dtype.is_floating_point():
        return lazy(graph, whole, values, shape, lambda *arrays: np.concatenate(arrays, axis=axis))
    tensors = [cast(QuantizedTensor, value.const_value) for value in values]
    bits = 4 if dtype == ir.DataType.INT4 else 8

    def integers() -> np.ndarray:
        return np.concatenate([tensor.integers() for tensor in tensors])

    return initializer(graph, whole, QuantizedTensor(whole.name, integers, (shape[1], shape[0]), bits))
