"""Rotary embeddings as tables: a position is a small integer, and its cosines and sines never change."""
from __future__ import annotations

import numpy as np
import onnx_ir as ir

from compiler.graph.edit import initializer, insert_before, replace, simplify
from compiler.graph.export import Graphs
from runtime.config import IMAGE_SLOTS


def tabulate_rotary_embeddings(graphs: Graphs) -> Graphs:
    """cos(position * frequency) = table[position], with one row for each position that a policy can have.

    Angles are formed in float32, as the model forms them; their cosine and sine are the nearest float32.
    """
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
            table = initializer(model.graph, f"rotary.{node.op_type.lower()}", table)
            (index,) = insert_before(node, "Squeeze", [position, initializer(model.graph, "last_axis", np.array([-1]))])
            (rows,) = insert_before(node, "Gather", [table, index])
            replace(node.outputs[0], rows)
        simplify(model)
    return graphs


def _rotary_operands(node: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """Position int64 [..., 1] and frequency [head_dim / 2] of Cos or Sin(Cast(position) * frequency)."""
    product = node.inputs[0].producer() if node.op_type in ("Cos", "Sin") else None
    if product is None or product.op_type != "Mul" or product.inputs[1].const_value is None:
        return None, None
    cast = product.inputs[0].producer()
    if cast is None or cast.op_type != "Cast" or cast.inputs[0].dtype != ir.DataType.INT64:
        return None, None
    return cast.inputs[0], product.inputs[1]
