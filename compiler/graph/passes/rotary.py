"""Rotary embeddings as tables: a position is a small integer, and its cosines and sines never change."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from duq.compiler.graph.edit import initializer, insert_before, replace, simplify
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
    matches = 0
    for _, model in graphs.items():
        for node in list(model.graph):
            match = _rotation(node)
            if match is None:
                continue
            x, cosine, sine, positions = match
            shape = initializer(model.graph, "one_sequence", np.array([1, -1], np.int64))
            (ids,) = insert_before(node, "Reshape", [positions, shape])
            ids.type = positions.type
            (turned,) = insert_before(node, "RotaryEmbedding", [x, cosine, sine, ids], interleaved=0)
            replace(node.outputs[0], turned)
            matches += 1
        simplify(model)
    return matches


def _rotation(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value] | None:
    """x [batch, heads, tokens, dims], both tables and the positions of Concat(a cos - b sin, b cos + a sin)."""
    parts = [operand.producer() for operand in node.inputs] if node.op_type == "Concat" else []
    if [part.op_type for part in parts if part] != ["Sub", "Add"]:
        return None
    products = [operand.producer() for part in parts for operand in part.inputs]
    if not all(product is not None and product.op_type == "Mul" for product in products):
        return None
    (a, cosine), (b, sine), *second = (product.inputs for product in products)
    halves, tables = [a.producer(), b.producer()], [cosine.producer(), sine.producer()]
    if [tuple(operands) for operands in second] != [(b, cosine), (a, sine)]:
        return None
    if [half.op_type for half in halves] != ["Slice", "Slice"] or [table.op_type for table in tables] != [
        "Gather",
        "Gather",
    ]:
        return None
    x, dims = halves[0].inputs[0], halves[0].inputs[0].shape[-1]
    bounds = [[int(limit.const_value.numpy().item()) for limit in half.inputs[1:4]] for half in halves]
    whole = bounds[0] == [0, dims // 2, 3] and bounds[1][0] == dims // 2 and bounds[1][1] >= dims and bounds[1][2] == 3
    if not whole or halves[1].inputs[0] is not x or tables[0].inputs[1] is not tables[1].inputs[1]:
        return None
    return x, tables[0].inputs[0], tables[1].inputs[0], tables[0].inputs[1]
