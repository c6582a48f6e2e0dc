"""Lowering norms and quantizers. A norm is a launch only where nobody else computes it.

Three others do: a quantizer that reads it (rotate_quantize), the output projection (products.py, flow step), and for a
product of few tokens the launch that wrote the norm's input, which leaves x * gain and sums of x^2 (norm_ahead); the
product multiplies its rows by 1 / sqrt(mean(x^2) + epsilon).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from duq.compiler.graph.edit import reader as reader_of
from duq.compiler.graph.edit import small_constant
from duq.compiler.graph.weights import record
from duq.compiler.targets.cuda.builder import Builder, Normed, Quantized, expect
from duq.compiler.targets.cuda.patterns import integer_gemm, is_table_row, other_input, readers_of
from duq.compiler.targets.cuda.program import Argument, Float, ForNorm, Matrix, Weight
from duq.compiler.targets.cuda.weights import Weights
from duq.plugins import ops, pointwise
from duq.plugins.tactics import FEW_TOKENS


def norm(builder: Builder, node: ir.Node) -> None:
    """No launch yet. An adaptive norm's gain and shift are rows of tables of the time."""
    gain, shift = (*node.inputs[1:3], None)[:2]
    ones = small_constant(gain)  # a gain that was folded into the weights
    folded = ones is not None and (ones == 1).all()
    vectors = [None if folded else _float32(builder.weights, gain), _float32(builder.weights, shift)]
    out = node.outputs[0]
    scaled = reader_of(out)
    if scaled is not None and scaled.op_type == "Mul" and is_table_row(other_input(scaled, out)):  # an adaptive norm
        shifted = reader_of(scaled.outputs[0])
        expect(vectors == [None, None] and shifted is not None and shifted.op_type == "Add", node)
        rows = other_input(scaled, out), other_input(shifted, scaled.outputs[0])
        expect(all(map(is_table_row, rows)), node)
        vectors = [builder.weights.table(row.producer().inputs[0]) for row in rows]
        builder.covered |= {scaled, shifted}
        out = shifted.outputs[0]
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    x = builder.value(node.inputs[0])
    builder.values[out] = Normed(x, *vectors, center=node.op_type == "LayerNormalization", epsilon=epsilon)


def in_memory(builder: Builder, value: ir.Value) -> Matrix:
    """The value as bf16 in memory: a norm that its reader cannot compute is written by a launch of its own, once."""
    found = builder.values[value]
    if not isinstance(found, Normed):
        return found
    if found.written is None:
        x = found.x
        y = builder.new(value.name, x.rows, x.columns, "Bf16")
        how = pointwise.normalize(x.rows, x.columns, x.type, "Bf16", found.center)
        arguments = [x.pointer, found.gain, found.shift, y.pointer, x.columns, x.stride, y.stride, Float(found.epsilon)]
        builder.kernel("norm", how, arguments, [x], [y])
        found.written = y
    return found.written


def rotate_quantize(builder: Builder, node: ir.Node) -> None:
    """Activations to INT8, with the norm in front, in the layout of the products that read them."""
    x, kind, gain, shift, epsilon = _source(builder, node)
    readers = readers_of(node.outputs[0])
    name = record(readers[0].inputs[2]).label
    largest = max((integer_gemm(reader, x.rows) for reader in readers), key=lambda gemm: gemm.n)
    slab_tokens = builder.tactic(name, largest).slab_tokens  # the other readers' tactics follow suit
    slabs = slab_tokens and -(-x.rows // slab_tokens) * slab_tokens
    x_q = builder.new(f"{name}.x_q", slabs or x.rows, largest.k, "signed char")
    scale = builder.new(f"{name}.x_scale", x.rows, 1, "float")

    turn, block, vectors = _rotation(builder.weights, node)
    alone = kind == "PLAIN" and x.type == "Bf16" and turn == 64 and not any(vectors) and largest.k == x.columns
    if alone and x.rows > FEW_TOKENS and x.columns in pointwise.HADAMARD_DEPTHS:
        how = pointwise.hadamard_quantize(x.rows, x.columns)
        arguments = [x.pointer, x_q.pointer, scale.pointer, x.rows, x.columns, x.stride, slabs]
    else:
        how = pointwise.rotate_quantize(x.rows, x.columns, x.type, kind, turn, largest.k)
        arguments = [x.pointer, gain, shift, *vectors, x_q.pointer, scale.pointer]
        arguments += [x.columns, largest.k, x.stride, block, slabs, Float(epsilon)]
    builder.kernel(f"{name} (quantize)", how, arguments, [x], [x_q, scale])
    builder.values[node.outputs[0]] = Quantized(x_q, scale, slab_tokens)
    builder.values[node.outputs[1]] = scale


def rotate(builder: Builder, node: ir.Node) -> None:
    """The same without the quantizer: bf16, for products of floats."""
    x, kind, gain, shift, epsilon = _source(builder, node)
    turn, block, vectors = _rotation(builder.weights, node)
    name = record(readers_of(node.outputs[0])[0].inputs[1]).label
    y = builder.new(f"{name}.x", x.rows, x.columns, "Bf16")
    how = pointwise.rotate_quantize(x.rows, x.columns, x.type, kind, turn, out=y.type)
    arguments = [
        x.pointer,
        gain,
        shift,
        *vectors,
        y.pointer,
        None,
        x.columns,
        x.columns,
        x.stride,
        block,
        0,
        Float(epsilon),
    ]
    builder.kernel(f"{name} (rotate)", how, arguments, [x], [y])
    builder.values[node.outputs[0]] = y


def _source(builder: Builder, node: ir.Node) -> tuple[Matrix, str, Argument, Argument, float]:
    """What a quantizer reads, and the norm that it computes in front: which, gain, shift and epsilon."""
    x = builder.value(node.inputs[0])
    if isinstance(x, Normed):
        return x.x, "LAYER_NORM" if x.center else "RMS_NORM", x.gain, x.shift, x.epsilon
    return x, "PLAIN", None, None, 0.0


def _rotation(weights: Weights, node: ir.Node) -> tuple[str | int, int, list[Weight | None]]:
    """A quantizer's rotation as pointwise.rotate_quantize names it, the block size of a dense one, and its operands."""
    operands = dict(zip(ops.inputs_of(node.op_type, node.overload), node.inputs))
    hadamard, rotation = operands.get("hadamard"), operands.get("rotation")
    vectors = [_float32(weights, operands.get("input_scale")), _permutation(weights, operands.get("permutation"))]
    vectors += [_float32(weights, rotation), _float32(weights, operands.get("activation_scale"))]
    if rotation is not None:
        return "DENSE", rotation.shape[-1], vectors
    return "NONE" if hadamard is None else hadamard.shape[0], 0, vectors


def _float32(weights: Weights, value: ir.Value | None) -> Weight | None:
    return None if value is None else weights.float32(value)


def _permutation(weights: Weights, value: ir.Value | None) -> Weight | None:
    if value is None:
        return None

    def indices() -> np.ndarray:
        return value.const_value.numpy().astype(np.int32)

    return weights.computed(f"{value.name}.int32", value.shape[0], indices)


# What a norm asks of the launch that writes its input


def offer_norm(builder: Builder, y: Matrix) -> None:
    """The latest launch, whose last arguments are for it, may leave something for a norm of the y that it writes: sums of
    squares, read 4 at a time."""
    if y.type == "float" and y.stride == y.columns and y.columns % 64 == 0:
        builder.launches[-1].for_norm = ForNorm(y)


def norm_ahead(builder: Builder, normed: Normed) -> ForNorm | None:
    """x * gain and the sums of squares from the launch that writes x; None where it has none to give.

    It writes them once: for several norms of x only if they have the same gain.
    """
    writer = builder.writer(normed.x)
    ahead = writer and writer.for_norm
    if normed.center or ahead is None or ahead.y != normed.x or (ahead.x is not None and ahead.gain != normed.gain):
        return None
    if ahead.x is None:
        rows, columns = normed.x.rows, normed.x.columns
        ahead.gain, ahead.x = normed.gain, builder.new(f"{writer.name} (normed)", rows, columns, "Bf16")
        ahead.squares = builder.new(f"{writer.name} (squares)", rows, columns // 16, "float")
        writer.arguments[-3:] = [ahead.x.pointer, normed.gain, ahead.squares.pointer]
        builder.also_writes(writer, [ahead.x, ahead.squares])
        writer.moved += ahead.x.buffer.bytes + ahead.squares.buffer.bytes
    return ahead
