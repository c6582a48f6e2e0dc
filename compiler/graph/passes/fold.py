"""Constants into weights: linear after linear, scaled outputs, norm gains."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter.pattern import RewriteRule

from duq.compiler.graph.edit import (
    Op,
    Var,
    apply,
    initializer,
    insert_before,
    is_weight,
    lazy,
    replace,
    simplify,
    small_constant,
)
from duq.compiler.graph.export import Graphs
from duq.compiler.graph.weights import is_time_table, of_module, record
from duq.plugins import ops


def fold_linear_chains(graphs: Graphs) -> int:
    """(x A + a) B + rest = x (A B) + (rest + a B). The products are formed in float64.

    In pi0, action_in_proj [32, width] and the action half of action_time_mlp_in become one [32, width] matrix; a B
    joins what is added next, and with it the time table.
    """
    return apply(RewriteRule(_chain, _one_linear, _are_weights), graphs.prefix, graphs.step)


def _chain(op: Op, x: Var, first: Var, bias: Var, second: Var, rest: Var) -> Var:
    return op.MatMul(op.MatMul(x, first) + bias, second) + rest


def _one_linear(op: Op, x: ir.Value, first: ir.Value, bias: ir.Value, second: ir.Value, rest: ir.Value) -> ir.Value:
    (k, _), (_, n) = first.shape.numpy(), second.shape.numpy()
    whole = record(second).behind(record(first))
    weight = lazy(first.graph, whole, [first, second], (k, n), _product)
    offset = lazy(first.graph, dataclasses.replace(whole, part="bias", form=""), [bias, second], (n,), _product)
    return op.Add(op.MatMul(x, weight), op.Add(rest, offset))


def _are_weights(context: object, first: ir.Value, bias: ir.Value, second: ir.Value, **_: ir.Value) -> bool:
    return is_weight(first, rank=2) and is_weight(bias, rank=1) and is_weight(second, rank=2)


def fold_output_scales(graphs: Graphs) -> int:
    """(x W + b) c = x (c W) + c b for a scalar c: the Euler step's dt goes into action_out_proj."""
    return apply(RewriteRule(_scaled_linear, _with_scaled_weights, _is_scaled_linear), graphs.prefix, graphs.step)


def _scaled_linear(op: Op, x: Var, weight: Var, bias: Var, factor: Var) -> Var:
    return (op.MatMul(x, weight) + bias) * factor


def _with_scaled_weights(op: Op, x: ir.Value, weight: ir.Value, bias: ir.Value, factor: ir.Value) -> ir.Value:
    return op.Add(op.MatMul(x, _scaled(weight, factor)), _scaled(bias, factor))


def _is_scaled_linear(context: object, weight: ir.Value, bias: ir.Value, factor: ir.Value, **_: ir.Value) -> bool:
    return is_weight(weight, rank=2) and is_weight(bias, rank=1) and small_constant(factor, limit=1) is not None


def _scaled(value: ir.Value, factor: ir.Value) -> ir.Value:
    number = factor.const_value.numpy().reshape(())
    scaled = record(value).times(f"{number.item():.9g}")
    return lazy(value.graph, scaled, [value], value.shape.numpy(), lambda array: array * number)


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
        for old_output, new_output in zip(node.outputs, new, strict=True):
            replace(old_output, new_output)
    return True


def _is_linear(node: ir.Node | None) -> bool:
    return node is not None and node.op_type == "MatMul" and is_weight(node.inputs[1], rank=2)


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a.astype(np.float64) @ b.astype(np.float64)).astype(np.float32)
