"""Lowering what brings an observation into the residual stream: camera images, the prompt, and both in one matrix."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from duq.compiler.graph.edit import is_weight, small_constant
from duq.compiler.graph.edit import reader as reader_of
from duq.compiler.graph.weights import record
from duq.compiler.targets.cuda.builder import Builder, expect
from duq.compiler.targets.cuda.patterns import Epilogue, other_input, past_views, readers_of, views_between
from duq.compiler.targets.cuda.products import matmul
from duq.compiler.targets.cuda.program import Float
from duq.plugins import pointwise


def patch_embedding(builder: Builder, node: ir.Node) -> None:
    """A convolution without overlap is a product over the pixels of a patch; the positions are added to it.

    The graph's input is float, byte / 127.5 - 1 of the camera's bytes (ModelInputs.pixels). Here the bytes are uploaded, a
    quarter, and the kernel that makes patches computes the same float32 values before it rounds them to bf16. Images that
    are resized in floating point are uploaded as they are.
    """
    weight, bias = node.inputs[1:3]
    added = readers_of(past_views(node.outputs[0]))[0]
    position = added.inputs[1]
    expect(added.op_type == "Add" and is_weight(position, rank=2), node)
    n, _, patch, _ = weight.shape.numpy()
    size, tokens = builder.config.vision.image_size, builder.config.vision.tokens
    columns = -(-3 * patch * patch // 8) * 8  # whole 16 bytes
    x = builder.new("patches", builder.cameras * tokens, columns, "Bf16")
    arguments = [builder.images.pointer, x.pointer, size, columns]
    launch = pointwise.patches(builder.cameras, size, patch, builder.images.type)
    builder.kernel("patches", launch, arguments, [builder.images], [x])
    y = builder.new_output(Epilogue(added.outputs[0]), x.rows, n)

    def offsets() -> np.ndarray:
        return np.float32(position.const_value.numpy()) + np.float32(bias.const_value.numpy())

    addend = builder.weights.computed(f"{position.name}+{bias.name}.float32", tokens * n, offsets)
    name = record(weight).label
    matmul(builder, name, x, builder.weights.matrix(weight, columns), y, addend=addend, batch=builder.cameras)
    builder.covered |= {added, *views_between(node.outputs[0], past_views(node.outputs[0]))}
    builder.values[added.outputs[0]] = y


def prompt(builder: Builder, node: ir.Node) -> None:
    """The host looks up the tokens' rows (it alone keeps the table, a gigabyte); here they become float32, scaled."""
    value, factor = node.outputs[0], 1.0
    builder.embedding_table = node.inputs[0]
    while (reader := reader_of(value)) is not None and reader.op_type in ("Cast", "Mul"):
        if reader.op_type == "Mul":
            factor *= float(small_constant(other_input(reader, value), limit=1).item())
        builder.covered.add(reader)
        value = reader.outputs[0]
    x = builder.embeddings
    y = builder.new_output(Epilogue(value), x.rows, x.columns)
    arguments = [x.pointer, y.pointer, y.columns, y.stride, Float(factor)]
    builder.kernel("prompt", pointwise.tokens(x.rows, x.columns), arguments, [x], [y])
    builder.values[value] = y


def join_rows(builder: Builder, node: ir.Node) -> None:
    """Image tokens, then the prompt's: those who computed them have written them one behind the other already."""
    builder.values[node.outputs[0]] = builder.joined_rows(node)
