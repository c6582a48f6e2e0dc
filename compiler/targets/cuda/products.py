"""Lowering linears: each with what is behind it (patterns.Epilogue), and with the norm in front where its kernel can."""

from __future__ import annotations

import onnx_ir as ir

from duq.compiler.errors import GraphError
from duq.compiler.graph.weights import record
from duq.compiler.targets.cuda import integer
from duq.compiler.targets.cuda.attention import Rotation, bind_rotation, rotary, rotation_of
from duq.compiler.targets.cuda.builder import Builder, Normed, Quantized, bytes_of, expect, pointer
from duq.compiler.targets.cuda.norms import in_memory, norm_ahead, offer_norm
from duq.compiler.targets.cuda.patterns import Epilogue, epilogue_of, is_rotated
from duq.compiler.targets.cuda.problems import FloatGemm
from duq.compiler.targets.cuda.program import BYTES, LIBRARY, MATMUL, NO_NORM, Argument, Float, Launch, Matrix, Weight
from duq.plugins import ops, pointwise
from duq.plugins.tactics import FEW_TOKENS

NARROW = 64  # products over so few channels, a robot's actions and state, are computed in float32


def linear(builder: Builder, node: ir.Node) -> None:
    """By what it multiplies:

    - INT8 activations: our integer GEMMs (integer.py);
    - the last norm by the output projection: a kernel that takes the whole step of the flow (_flow_step);
    - float32 of a few channels, the robot's actions and state: float32 throughout (_narrow);
    - up to 64 tokens, bound by the weight's bytes and by latency: our float GEMM, with all that is around the product;
    - more: cuBLASLt, with launches of their own for a norm, a rotary embedding and GeGLU.

    The last two also with an INT4 weight, which our GEMM reads as it is, and a launch in front of cuBLASLt's makes bf16.
    """
    epilogue = epilogue_of(node)
    weight = node.inputs[ops.weight_index(node.op_type)]
    name, x = record(weight).label, builder.value(node.inputs[0])
    scale = _weight_scale(node, name, epilogue)
    rotation = None  # computed by the product's own launch
    if isinstance(x, Quantized):
        y = integer.linear(builder, node, name, x, epilogue)
    elif isinstance(x, Normed) and weight.shape[-1] <= NARROW and builder.value(epilogue.residual) is builder.flow:
        y = _flow_step(builder, name, x, weight, epilogue)
    elif isinstance(x, Matrix) and x.type == "float" and x.columns <= NARROW:
        y = _narrow(builder, name, x, weight, epilogue)
    elif _rows(x) <= FEW_TOKENS and epilogue.activation != "gelu":
        if is_rotated(epilogue) and len(epilogue.parts) == 3:
            rotation = rotation_of(builder, name, epilogue.parts, _rows(x))
        y = _few_tokens(builder, name, node.inputs[0], weight, scale, epilogue, rotation)
    else:
        y = _library(builder, name, in_memory(builder, node.inputs[0]), weight, scale, epilogue)

    builder.covered |= set(epilogue.nodes)
    if rotation is not None:
        bind_rotation(builder, rotation, y)
    elif is_rotated(epilogue):
        rotary(builder, name, epilogue.parts, y)
    elif epilogue.parts:
        builder.values |= dict(zip(epilogue.parts, y.split([part.shape[-1] for part in epilogue.parts])))
    else:
        builder.values[epilogue.out] = y


def _rows(x: Matrix | Normed) -> int:
    return x.x.rows if isinstance(x, Normed) else x.rows


def _weight_scale(node: ir.Node, name: str, epilogue: Epilogue) -> ir.Value | None:
    """Of an INT4 weight with float activations, whose bias becomes the epilogue's; None for other products."""
    if node.op_type == "MatMul" or ops.weight_index(node.op_type) == 2:
        return None
    operands = dict(zip(ops.inputs_of(node.op_type, node.overload), node.inputs))
    if node.op_type != "W4A16Linear" or "output_rotation" in operands:
        rotated = " with an output rotation" if "output_rotation" in operands else ""
        raise GraphError(f"{name}: --target cuda has no kernel for {node.op_type}{rotated}; quantize its activations too")
    epilogue.bias = [operands["bias"]] if "bias" in operands else epilogue.bias
    return operands["weight_scale"]


def _few_tokens(
    builder: Builder,
    name: str,
    value: ir.Value,
    weight: ir.Value,
    scale: ir.Value | None,
    epilogue: Epilogue,
    rotation: Rotation | None,
) -> Matrix:
    """A float product of few tokens: one kernel with the norm in front and everything behind it, a rotary embedding
    included."""
    x = builder.value(value)
    norm = norm_ahead(builder, x) if isinstance(x, Normed) else None
    source = norm.x if norm else in_memory(builder, value)
    (k, n), m = weight.shape.numpy(), source.rows
    finish = "ROTARY" if rotation else epilogue.activation.upper() or "NONE"
    order = {"ROTARY": "rotary", "GEGLU": "gate-up"}.get(finish, "")
    y = builder.new(name, m, n, "Bf16") if rotation else builder.new_output(epilogue, m, n // 2 if finish == "GEGLU" else n)
    residual = builder.residual(epilogue, y)
    expect(finish in ("NONE", "SILU", "GEGLU", "ROTARY") and (residual is None or finish == "NONE"), name)
    expect(source.stride == source.columns and source.type == "Bf16", name)
    factor, bias = _factor_and_bias(builder, name, epilogue, weight, scale, x.shift if norm else None, order)
    pack = builder.weights.float_fragments if scale is None else builder.weights.int4_fragments
    gemm = FloatGemm(m, n, k, 16 if scale is None else 4, y.type, norm is not None, finish)
    how = gemm.launch(builder.tactic(name, gemm))
    squares, past = norm and norm.squares, rotation and rotation.past
    cached = [rotation.key, rotation.value] if rotation and rotation.key else []
    if rotation and not cached:  # the suffix's own, beside its queries
        key, value = y.split(rotation.columns)[1:]
    else:
        key, value = cached or (None, None)
    arguments = [source.pointer, pointer(squares), pack(weight, order), factor, bias, pointer(residual), y.pointer]
    arguments += [pointer(key), pointer(value), *(rotation.tables if rotation else (None, None)), pointer(past)]
    arguments += [m, n, k, y.stride, key.stride if key else 0, rotation.first if rotation else 0, int(bool(cached))]
    arguments += [Float(x.epsilon if norm else 0.0), *NO_NORM]
    reads = [each for each in (source, squares, residual, past) if each]
    builder.kernel(name, how, arguments, reads, [y, *cached], 2.0 * m * n * k, n * k * gemm.bits // 8)
    if finish == "NONE":
        offer_norm(builder, y)
    return y


def _factor_and_bias(
    builder: Builder,
    name: str,
    epilogue: Epilogue,
    weight: ir.Value,
    scale: ir.Value | None,
    shift: Argument,
    order: str,
) -> tuple[Weight | None, Weight | None]:
    """What a product of few tokens is multiplied by, channel by channel, the scale of an INT4 weight and a gate, and what is
    then added: one thing at most.

    The shift of the norm in front is added too, a row for each step: with norm(x) = x r gain + shift,
    norm(x) W = (x gain) W r + shift W.
    """
    added = [each for each in (shift, epilogue.bias, epilogue.bias_table) if each]
    expect(len(added) <= 1 and not (epilogue.gate and added) and (shift is None or scale is None), name)
    expect(not order or (epilogue.bias_table is None and epilogue.gate is None), name)
    factor = None
    if epilogue.gate is not None:
        factor = builder.weights.table(epilogue.gate.producer().inputs[0], scale)
    elif scale is not None:
        factor = builder.weights.float32(scale, order=order)
    if shift is not None:
        return factor, builder.weights.shift_product(shift, weight, order)
    if epilogue.bias_table is not None:
        return factor, builder.weights.table(epilogue.bias_table.producer().inputs[0])
    return factor, builder.weights.float32(*epilogue.bias, order=order) if epilogue.bias else None


def _library(
    builder: Builder, name: str, x: Matrix, weight: ir.Value, scale: ir.Value | None, epilogue: Epilogue
) -> Matrix:
    """A float product of many tokens: cuBLASLt's, which knows no GeGLU."""
    n = weight.shape[-1]
    expect(epilogue.bias_table is None and epilogue.activation in ("", "geglu", "gelu"), name)
    expect(epilogue.gate is None, name)
    geglu = epilogue.activation == "geglu"
    y = builder.new(name, x.rows, n, "Bf16") if geglu else builder.new_output(epilogue, x.rows, n)
    residual = builder.residual(epilogue, y)
    bias = None
    if epilogue.bias:
        bias = builder.weights.float32(*epilogue.bias) if y.type == "float" else builder.weights.bf16(epilogue.bias)
    operand = builder.weights.matrix(weight) if scale is None else _expanded(builder, name, weight, scale)
    matmul(builder, name, x, operand, y, bias, residual, gelu=epilogue.activation == "gelu")
    if not geglu:
        return y
    gated = builder.new_output(epilogue, x.rows, n // 2)
    arguments = [y.pointer, gated.pointer, n // 2]
    builder.kernel(f"{name} (GeGLU)", pointwise.geglu(x.rows, n // 2), arguments, [y], [gated])
    return gated


def _expanded(builder: Builder, name: str, weight: ir.Value, scale: ir.Value) -> Matrix:
    """An INT4 weight as bf16 [N, K], until the product is computed."""
    k, n = weight.shape.numpy()
    y = builder.new(f"{name}.weight", n, k, "Bf16")
    arguments = [builder.weights.int4_fragments(weight, ""), builder.weights.float32(scale), y.pointer, n, k]
    builder.kernel(f"{name} (expand)", pointwise.expand(n, k), arguments, [], [y], weight_bytes=n * k // 2)
    return y


def matmul(
    builder: Builder,
    name: str,
    x: Matrix,
    weight: Weight | Matrix,
    y: Matrix,
    bias: Weight | None = None,
    addend: Matrix | Weight | None = None,
    gelu: bool = False,
    batch: int = 1,
) -> None:
    """A product by the library (program.MATMUL); a `batch` of them has the addend of one product in common."""
    n, k = y.columns, x.columns
    reads = [x]
    if isinstance(addend, Matrix):
        expect(addend.stride == y.stride, name)
        reads, addend = [x, addend], addend.pointer
    moved = bytes_of([*reads, y]) + 2 * n * k
    if isinstance(weight, Matrix):
        reads, weight = [*reads, weight], weight.pointer
    values = dict(
        weight=weight, x=x.pointer, bias=bias, addend=addend, y=y.pointer, algorithm=0, n=n, m=x.rows // batch, k=k,
        x_stride=x.stride, y_stride=y.stride, batch=batch, addend_batch_stride=0, y_type=BYTES[y.type], gelu=int(gelu),
    )  # fmt: skip
    arguments = [values[key] for key in MATMUL]
    builder.add(Launch(name, LIBRARY, "", arguments, work=2.0 * x.rows * n * k, moved=moved), reads, [y])


def _narrow(builder: Builder, name: str, x: Matrix, weight: ir.Value, epilogue: Epilogue) -> Matrix:
    """Of few channels, in float32: what goes in from the robot, its state and the actions under way."""
    k, n = weight.shape.numpy()
    expect(k % 4 == 0 and n % 16 == 0, name)
    expect(epilogue.activation in ("", "silu") and epilogue.gate is None and epilogue.residual is None, name)
    y = builder.new_output(epilogue, x.rows, n)
    bias = builder.weights.float32(*epilogue.bias) if epilogue.bias else None
    if epilogue.bias_table is not None:
        expect(bias is None, name)
        bias = builder.weights.table(epilogue.bias_table.producer().inputs[0])
    how = pointwise.linear_narrow(x.rows, n, epilogue.activation.upper() or "NONE", y.type)
    arguments = [x.pointer, builder.weights.float32(weight), bias, y.pointer, k, n, *NO_NORM]
    builder.kernel(name, how, arguments, [x], [y], 2.0 * x.rows * n * k, 4 * n * k)
    offer_norm(builder, y)
    return y


def _flow_step(builder: Builder, name: str, x: Normed, weight: ir.Value, epilogue: Epilogue) -> Matrix:
    """x + (norm(h) W + b): the last layer's output becomes the next state of the flow, in place."""
    k, n = weight.shape.numpy()
    expect(epilogue.out.is_graph_output() and not epilogue.activation and epilogue.gate is None, name)
    expect(bool(epilogue.bias) and n % 16 == 0, name)
    flow, h = builder.flow, x.x
    bias = builder.weights.float32(*epilogue.bias)
    arguments = [h.pointer, x.gain, x.shift, builder.weights.float32(weight), bias, flow.pointer, k, Float(x.epsilon)]
    builder.kernel(name, pointwise.flow_step(h.rows, n), arguments, [h, flow], [flow], 2.0 * h.rows * n * k, 4 * n * k)
    return flow
