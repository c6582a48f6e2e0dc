"""Rotary embeddings as tables: a position is a small integer, and its cosines and sines never change."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter.pattern import RewriteRule

from duq.compiler.graph.edit import Op, Var, apply, initializer, insert_before, replace, simplify, small_constant
from duq.compiler.graph.export import Graphs
from duq.compiler.graph.weights import of_module
from duq.runtime.config import IMAGE_SLOTS


def tabulate_rotary_embeddings(graphs: Graphs) -> int:
    """cos(position * frequency) = table[position], with one row for each position that a policy can have.

    Angles are formed in float32, as the model forms them; their cosine and sine are the nearest float32.
    Matches the cosines and the sines that a graph computes once for all its layers.
    """
    matches = 0
    config = graphs.config
    positions = len(IMAGE_SLOTS) * config.vision.tokens + config.max_prompt_tokens + 1 + config.action_horizon
    for _, model in graphs.items():
        for node in list(model.graph):
            position, frequency = _rotary_operands(node)
            if position is None:
                continue
            angles = np.arange(positions, dtype=np.float32)[:, None] * frequency.const_value.numpy()
            function = np.cos if node.op_type == "Cos" else np.sin
            table = function(angles.astype(np.float64)).astype(np.float32)
            table = initializer(model.graph, of_module(node.op_type.lower(), "rotary"), table)
            (index,) = insert_before(node, "Squeeze", [position, initializer(model.graph, "last_axis", np.array([-1]))])
            (rows,) = insert_before(node, "Gather", [table, index])
            replace(node.outputs[0], rows)
            matches += 1
        simplify(model)
    return matches


def _rotary_operands(node: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """Position int64 [..., 1] and frequency [head_dim / 2] of Cos or Sin(Cast(position) * frequency)."""
    product = node.inputs[0].producer() if node.op_type in ("Cos", "Sin") else None
    if product is None or product.op_type != "Mul" or product.inputs[1].const_value is None:
        return None, None
    cast = product.inputs[0].producer()
    if cast is None or cast.op_type != "Cast" or cast.inputs[0].dtype != ir.DataType.INT64:
        return None, None
    return cast.inputs[0], product.inputs[1]


def fuse_rotary_embeddings(graphs: Graphs) -> int:
    """[a cos - b sin, b cos + a sin] of the two halves a, b of each head becomes ONNX's RotaryEmbedding.

    For GPUs, which have a kernel for it. Positions are one vector for all heads; the tables are those of
    `tabulate_rotary_embeddings`. Matches each embedding of queries or keys.
    """
    rule = RewriteRule(_turned_halves, _rotary_embedding, _are_halves, remove_nodes=False)  # all layers read one look-up
    return apply(rule, graphs.prefix, graphs.step)


def _turned_halves(
    op: Op, x: Var, start: Var, middle: Var, end: Var, axis: Var, cosines: Var, sines: Var, positions: Var
) -> Var:
    a, b = (op.Slice(x, *bounds, axis, _allow_other_inputs=True) for bounds in ((start, middle), (middle, end)))
    cosine, sine = op.Gather(cosines, positions), op.Gather(sines, positions)
    return op.Concat(a * cosine - b * sine, b * cosine + a * sine, axis=-1)


def _rotary_embedding(
    op: Op, x: ir.Value, cosines: ir.Value, sines: ir.Value, positions: ir.Value, **_: ir.Value
) -> ir.Value:
    ids = op.Reshape(positions, op.Constant(value_ints=[1, -1]))
    return op.RotaryEmbedding(x, cosines, sines, ids, interleaved=0)


def _are_halves(
    context: object, x: ir.Value, start: ir.Value, middle: ir.Value, end: ir.Value, axis: ir.Value, **_: ir.Value
) -> bool:
    """Of x [batch, heads, tokens, dims]: the first and the last half of its last axis."""
    bounds = [small_constant(value, limit=1) for value in (start, middle, end, axis)]
    if any(value is None for value in bounds) or x.shape is None:
        return False
    first, half, last, along = (int(value.item()) for value in bounds if value is not None)
    dims = x.shape[-1]
    return isinstance(dims, int) and (first, half, along) == (0, dims // 2, 3) and last >= dims
