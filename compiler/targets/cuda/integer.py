"""Lowering quantized linears: INT8 activations times INT4 or INT8 weights, summed in INT32.

The GEMMs take whole tiles, and a policy's sizes need not be multiples of theirs (SigLIP's MLP has 4304 channels). Zeros
make up for it (patterns.integer_gemm): the quantizer writes more channels than x has, the weight has rows and columns of
zeros, and y gets columns that nobody reads.
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from duq.compiler.targets.cuda.builder import Builder, Quantized, expect, pointer
from duq.compiler.targets.cuda.norms import offer_norm
from duq.compiler.targets.cuda.patterns import Epilogue, integer_gemm
from duq.compiler.targets.cuda.problems import Gemm, IntegerTactic
from duq.compiler.targets.cuda.program import NO_NORM, Argument, Matrix
from duq.plugins import kernels, ops
from duq.plugins.kernels import Generated

FINISHES = ("NONE", "GELU", "GEGLU")


def linear(builder: Builder, node: ir.Node, name: str, x: Quantized, epilogue: Epilogue) -> Matrix:
    """y = finish((acc * weight_scale * x_scale [@ output_rotation] + bias) * gate) + residual, by one GEMM; by a GEMM and a
    launch that does the rest where its tactic leaves sums (BitBLAS's), and behind an output rotation, which has to wait
    for all sums of its block."""
    operands = dict(zip(ops.inputs_of(node.op_type, node.overload), node.inputs))
    gemm, finish = integer_gemm(node, x.scale.rows), epilogue.activation.upper() or "NONE"
    biases = [operands["bias"]] if "bias" in operands else epilogue.bias
    expect(finish in FINISHES and (finish == "NONE" or epilogue.residual is None), node)
    expect(not (biases and epilogue.gate) and epilogue.bias_table is None, node)
    n, parts = operands["weight"].shape[-1], 2 if finish == "GEGLU" else 1
    if gemm.n == n:
        y = builder.new_output(epilogue, gemm.m, n // parts)
    else:
        y = replace(builder.new(name, gemm.m, gemm.n // parts, gemm.out), columns=n // parts)
    residual = builder.residual(epilogue, y)
    tactic = builder.tactic(name, gemm, x.slab_tokens)
    if "output_rotation" in operands or gemm.is_finished_apart(tactic):
        expect(gemm.n == n or parts == 1, node)
        sums = builder.new(f"{name}.sums", gemm.m, gemm.n, "int")
        _multiply(builder, name, gemm, tactic, x, operands["weight"], sums)
        _dequantize(builder, name, sums, x.scale, operands, biases, epilogue.gate, finish, residual, y)
        return y
    order = "gate-up" if finish == "GEGLU" else ""
    if epilogue.gate is None:
        scale = builder.weights.float32(operands["weight_scale"], order=order, padded=gemm.n)
    else:  # one table of weight_scale * gate
        scale = builder.weights.table(epilogue.gate.producer().inputs[0], operands["weight_scale"])
    bias = builder.weights.float32(*biases, order=order, padded=gemm.n) if biases else None
    _multiply(builder, name, gemm, tactic, x, operands["weight"], y, scale, bias, residual)
    offer_norm(builder, y)
    return y


def _multiply(
    builder: Builder,
    name: str,
    gemm: Gemm,
    tactic: IntegerTactic,
    x: Quantized,
    weight: ir.Value,
    y: Matrix,
    scale: Argument = None,
    bias: Argument = None,
    residual: Matrix | None = None,
) -> None:
    """The GEMM, with what follows it; or into a y of integers, its sums alone."""
    m, n, k = gemm.m, gemm.n, gemm.k
    in_pairs = gemm.finish == "GEGLU" and not gemm.is_finished_apart(tactic)
    packed = builder.weights.packed(weight, (n, k), gemm.bits, tactic.layout, geglu=in_pairs)
    workspace = builder.workspace(gemm, tactic, x.x.buffer.branch)
    arguments = [x.x.pointer, x.scale.pointer, packed, scale, bias, pointer(residual), y.pointer]
    arguments += [pointer(workspace), m, n, k, *NO_NORM]
    if isinstance(tactic, Generated):
        arguments = [x.x.pointer, packed, y.pointer, m]
    reads = [x.x, x.scale, *([residual] if residual else [])]
    writes = [y, *([workspace] if workspace else [])]
    weight_bytes = n * k * gemm.bits // 8
    builder.kernel(name, gemm.launch(tactic), arguments, reads, writes, 2.0 * m * n * k, weight_bytes)


def _dequantize(
    builder: Builder,
    name: str,
    sums: Matrix,
    x_scale: Matrix,
    operands: dict[str, ir.Value],
    biases: list[ir.Value],
    gate: ir.Value | None,
    finish: str,
    residual: Matrix | None,
    y: Matrix,
) -> None:
    """What follows a GEMM that left its sums [M, N]. operands: the linear's weight_scale, and output_rotation if it has one.

    y leaves nothing for a norm (norms.offer_norm): one that reads it is computed by its reader or by a launch of its own.
    """
    weights, rotation = builder.weights, operands.get("output_rotation")
    scale = weights.float32(operands["weight_scale"], padded=sums.columns)
    bias = weights.float32(*biases, padded=sums.columns) if biases else None
    factor = None if gate is None else weights.table(gate.producer().inputs[0])
    matrices = None if rotation is None else weights.float32(rotation)
    columns = sums.columns // (2 if finish == "GEGLU" else 1)
    how = kernels.epilogue(y.rows, columns, y.type, rotation is not None, finish)
    arguments = [sums.pointer, x_scale.pointer, scale, matrices, bias, factor, pointer(residual), y.pointer]
    arguments += [sums.columns, 1, rotation.shape[-1] if rotation is not None else 0]
    builder.kernel(f"{name} (dequantize)", how, arguments, [sums, x_scale, *([residual] if residual else [])], [y])
