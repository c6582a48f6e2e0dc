"""Constants into weights: linear after linear, scaled outputs, norm gains."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from duq.compiler.graph.edit import initializer, insert_before, is_weight, lazy, reader, replace, simplify, small_constant
from duq.compiler.graph.export import Graphs
from duq.compiler.graph.weights import is_time_table, of_module, record
from duq.plugins import ops


def fold_linear_chains(graphs: Graphs) -> int:
    """(x A + a) B = x (A B) + a B, where nothing else reads what is in between. The product is formed in float64.

    In pi0, action_in_proj [32, width] and the action half of action_time_mlp_in become one [32, width] matrix; a B
    joins the bias added next, and with it the time table.
    """
    matches = 0
    for _, model in graphs.items():
        for second in list(model.graph):
            bias = second.inputs[0].producer() if _is_linear(second) else None
            first = bias.inputs[0].producer() if bias is not None and bias.op_type == "Add" else None
            following = reader(second.outputs[0])
            if first is None or not _is_linear(first) or not is_weight(bias.inputs[1], rank=1):
                continue
            if reader(first.outputs[0]) is not bias or reader(bias.outputs[0]) is not second:
                continue
            (k, _), (_, n) = first.inputs[1].shape.numpy(), second.inputs[1].shape.numpy()
            whole = record(second.inputs[1]).behind(record(first.inputs[1]))
            weight = lazy(model.graph, whole, [first.inputs[1], second.inputs[1]], (k, n), _product)
            of_bias = dataclasses.replace(whole, part="bias", form="")
            offset = lazy(model.graph, of_bias, [bias.inputs[1], second.inputs[1]], (n,), _product)
            (y,) = insert_before(second, "MatMul", [first.inputs[0], weight])
            if following is not None and following.op_type == "Add":
                index = 1 - list(following.inputs).index(second.outputs[0])
                (total,) = insert_before(following, "Add", [following.inputs[index], offset])
                following.replace_input_with(index, total)
            else:
                (y,) = insert_before(second, "Add", [y, offset])
            replace(second.outputs[0], y)
            matches += 1
        simplify(model)
    return matches


def fold_output_scales(graphs: Graphs) -> int:
    """(x W + b) c = x (c W) + c b for a scalar c: the Euler step's dt goes into action_out_proj."""
    matches = 0
    for _, model in graphs.items():
        for node in list(model.graph):
            scale = small_constant(node.inputs[1], limit=1) if node.op_type == "Mul" else None
            bias = node.inputs[0].producer() if scale is not None and scale.size == 1 else None
            linear = bias.inputs[0].producer() if bias is not None and bias.op_type == "Add" else None
            if linear is None or not _is_linear(linear) or reader(bias.outputs[0]) is not node:
                continue
            weight, offset = (
                _scaled(model.graph, value, scale.reshape(())) for value in (linear.inputs[1], bias.inputs[1])
            )
            (product,) = insert_before(node, "MatMul", [linear.inputs[0], weight])
            (y,) = insert_before(node, "Add", [product, offset])
            replace(node.outputs[0], y)
            matches += 1
        simplify(model)
    return matches


def fold_norm_gains(graphs: Graphs) -> int:
    """norm(x, g) W = norm(x, 1) (diag(g) W): a Gemma norm's gain goes into the float linears that read it.

    Quantized linears read the norm through a prologue that may start with a scale of its own (1 / balance). There the
    two vectors become one, in the norm, since a rotation follows and neither can move past it:
    scale * norm(x, g) = norm(x, scale * g); likewise LayerNorm's (g, b), and the tables of an adaptive norm.
    Matches norms that lose their gain or take a scale.
    """
    matches = 0
    for _, model in graphs.items():
        for node in list(model.graph):
            if node.op_type in ("RMSNormalization", "LayerNormalization"):
                matches += _merge_prologue_scale(model.graph, node.outputs[0], _norm_vectors(node))
            if node.op_type == "RMSNormalization":
                matches += _fold_gain_into_readers(model.graph, node)
        for node in list(model.graph):  # adaptive norms: x (1 + scale)[step] + shift[step]
            tables = _adaptive_tables(node)
            if tables:
                matches += _merge_prologue_scale(model.graph, node.outputs[0], tables)
        simplify(model)
    return matches


def _fold_gain_into_readers(graph: ir.Graph, norm: ir.Node) -> bool:
    gain, readers = norm.inputs[1], [use.node for use in norm.outputs[0].uses()]
    if not is_weight(gain, rank=1) or not readers or not all(_is_linear(node) for node in readers):
        return False
    for node in readers:
        weight = node.inputs[1]
        scaled = record(weight).times(record(gain).name)
        node.replace_input_with(1, lazy(graph, scaled, [gain, weight], weight.shape.numpy(), lambda g, w: g[:, None] * w))
    ones = initializer(graph, of_module(f"ones.{gain.shape[0]}", "gain"), np.ones(gain.shape.numpy(), np.float32))
    norm.replace_input_with(1, ones)
    return True


def _norm_vectors(norm: ir.Node) -> list[tuple[ir.Node, int]]:
    return [(norm, index) for index in range(1, len(norm.inputs)) if norm.inputs[index] is not None]


def _adaptive_tables(node: ir.Node) -> list[tuple[ir.Node, int]]:
    """The two table look-ups of `Add(Mul(norm, Gather(table, step)), Gather(table, step))`, as (node, input index)."""
    if node.op_type != "Add" or any(operand is None or operand.producer() is None for operand in node.inputs):
        return []
    scaled, shift = (operand.producer() for operand in node.inputs)
    if scaled.op_type != "Mul" or shift.op_type != "Gather":
        return []
    gathers = [shift, *(operand.producer() for operand in scaled.inputs if operand.producer() is not None)]
    gathers = [gather for gather in gathers if gather.op_type == "Gather" and is_time_table(gather.inputs[0])]
    return [(gather, 0) for gather in gathers] if len(gathers) == 2 else []


def _merge_prologue_scale(graph: ir.Graph, output: ir.Value, vectors: list[tuple[ir.Node, int]]) -> bool:
    """Multiplies the vectors that produce `output` by its readers' common input_scale, and removes it from them."""
    readers = [use.node for use in output.uses()]
    prologues = [n for n in readers if n.domain == ops.DOMAIN and ops.stages(n.overload)[:1] == ["scale"]]
    if not prologues or len(prologues) != len(readers) or len({node.inputs[1] for node in prologues}) != 1:
        return False
    scale = prologues[0].inputs[1]
    for node, index in vectors:
        vector = node.inputs[index]
        scaled = record(vector).times(record(scale).name)
        node.replace_input_with(index, lazy(graph, scaled, [vector, scale], vector.shape.numpy(), np.multiply))
    for node in prologues:
        inputs = [operand for index, operand in enumerate(node.inputs) if index != 1]
        overload = ops.overload_name(ops.stages(node.overload)[1:])
        new = insert_before(node, node.op_type, inputs, len(node.outputs), domain=ops.DOMAIN, overload=overload)
        for old_output, new_output in zip(node.outputs, new):
            replace(old_output, new_output)
    return True


def _is_linear(node: ir.Node | None) -> bool:
    return node is not None and node.op_type == "MatMul" and is_weight(node.inputs[1], rank=2)


def _scaled(graph: ir.Graph, value: ir.Value, factor: np.ndarray) -> ir.Value:
    scaled = record(value).times(f"{factor.item():.9g}")
    return lazy(graph, scaled, [value], value.shape.numpy(), lambda array: array * factor)


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a.astype(np.float64) @ b.astype(np.float64)).astype(np.float32)
