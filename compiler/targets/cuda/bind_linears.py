"""Binding linears: each kind to the kernels that compute it, with the norm in front and the epilogue behind where they can.

integer      our INT8 GEMMs; followed by an epilogue's launch where the tactic leaves accumulators (BitBLAS's), and
             behind an output rotation, which has to wait for all accumulators of its block
small M      our float GEMM, one kernel with the norm in front and everything behind it, a rotary embedding included
library      cuBLASLt, with launches of their own for a norm, an INT4 weight, a rotary embedding and GeGLU
narrow       float32 throughout, from the robot's state or actions
flow step    the output projection: x + (norm(h) W + b), the next state of the flow, in place
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from duq.compiler.targets.cuda.binder import Binder, Parts
from duq.compiler.targets.cuda.gemm import FloatGemm, Gemm
from duq.compiler.targets.cuda.launches import BYTES, Argument, Arguments, Matrix, Weight
from duq.compiler.targets.cuda.specialize import float_weight_bits
from duq.compiler.targets.fuse import expect
from duq.compiler.targets.ops import Linear, Multistep, Op, Rotation
from duq.compiler.targets.values import columns_of, shape_of
from duq.plugins import kernels


def linear(binder: Binder, op: Linear) -> None:
    computed = _projected if op in binder.of_heads else _BY_KERNEL[binder.sized.linears[op].kernel]
    y = computed(binder, op)
    epilogue = op.epilogue
    if epilogue.rotation is not None:
        if not _computes_rotation(binder, op):
            _rotary(binder, op, epilogue.rotation, y)
        _place_rotated(binder, epilogue.rotation, y)
    elif epilogue.parts:
        widths = [columns_of(part) for part in epilogue.parts]
        binder.values |= dict(zip(epilogue.results, y.split(widths), strict=True))
    else:
        binder.values |= dict.fromkeys(epilogue.results, y)


def _computes_rotation(binder: Binder, op: Linear) -> bool:
    gemm = binder.sized.linears[op].gemm
    return isinstance(gemm, FloatGemm) and gemm.epilogue == "ROTARY"


# Integers


def _integer(binder: Binder, op: Linear) -> Matrix:
    """y = epilogue((acc * weight_scale * x_scale [@ output_rotation] + bias) * gate) + residual."""
    gemm, epilogue, operands = binder.sized.linears[op].gemm, op.epilogue, op.operands
    assert isinstance(gemm, Gemm)
    after = epilogue.activation.upper() or "NONE"
    expect(after in ("NONE", "GELU", "GEGLU") and (after == "NONE" or epilogue.residual is None), op.name)
    expect(not (epilogue.bias and epilogue.gate) and epilogue.bias_table is None, op.name)
    n, parts = shape_of(op.weight)[-1], 2 if after == "GEGLU" else 1
    if gemm.n == n:
        y = binder.new_output(epilogue, gemm.m, n // parts)
    else:
        y = replace(binder.new(op.name, gemm.m, gemm.n // parts, gemm.out), columns=n // parts)
    tactic = binder.chosen.integer[op]
    if "output_rotation" in operands or gemm.leaves_accumulators(tactic):
        expect(gemm.n == n or parts == 1, op.name)
        acc = binder.new(f"{op.name}.acc", gemm.m, gemm.n, "int")
        _integer_gemm(binder, op, gemm, acc)
        _epilogue(binder, op, acc, after, y)
        return y
    order = "gate-up" if after == "GEGLU" else ""
    if epilogue.gate is None:
        scale = binder.weights.float32(operands["weight_scale"], order=order, padded=gemm.n)
    else:  # one table of weight_scale * gate
        scale = binder.weights.table(epilogue.gate, operands["weight_scale"])
    bias = binder.weights.float32(*epilogue.bias, order=order, padded=gemm.n) if epilogue.bias else None
    residual = _residual(binder, op, y)
    _integer_gemm(binder, op, gemm, y, scale, bias, residual)
    return y


def _integer_gemm(
    binder: Binder,
    op: Linear,
    gemm: Gemm,
    y: Matrix,
    scale: Weight | None = None,
    bias: Weight | None = None,
    residual: Matrix | None = None,
) -> None:
    """The GEMM with its epilogue; or into a y of integers, its accumulators alone."""
    tactic, x = binder.chosen.integer[op], binder.quantized[op.x]
    in_pairs = gemm.epilogue == "GEGLU" and not gemm.leaves_accumulators(tactic)
    weight = binder.weights.packed(op.weight, (gemm.n, gemm.k), gemm.bits, tactic.layout, geglu=in_pairs)
    workspace = binder.workspace(gemm, tactic, op.branch)
    normed = _for_norm(binder, op, y) if gemm.out != "int" and y.type != "int" else {}
    arguments: Arguments = dict(x_q=x.x, weight=weight, y=y, tokens=gemm.m)
    if not isinstance(tactic, kernels.Generated):
        arguments |= dict(x_scale=x.scale, weight_scale=scale, bias=bias, residual=residual, workspace=workspace)
        arguments |= dict(rows=gemm.n, depth=gemm.k, **normed)
    reads = [x.x, x.scale, *([residual] if residual else [])]
    writes = [y, *([workspace] if workspace else []), *_written(normed)]
    weight_bytes = gemm.n * gemm.k * gemm.bits // 8
    work = 2.0 * gemm.m * gemm.n * gemm.k
    binder.launch(op, op.name, gemm.instance(tactic), arguments, reads, writes, work, weight_bytes)


def _epilogue(binder: Binder, op: Linear, acc: Matrix, after: str, y: Matrix) -> None:
    """What follows a GEMM that left its accumulators [M, N]. It prepares no norm."""
    weights, epilogue, x = binder.weights, op.epilogue, binder.quantized[op.x]
    rotation = op.operands.get("output_rotation")
    residual = _residual(binder, op, y)
    columns = acc.columns // (2 if after == "GEGLU" else 1)
    instance = kernels.epilogue(y.rows, columns, y.type, rotation is not None, after)
    arguments: Arguments = dict(
        acc=acc, x_scale=x.scale, weight_scale=weights.float32(op.operands["weight_scale"], padded=acc.columns),
        rotation=None if rotation is None else weights.float32(rotation),
        bias=weights.float32(*epilogue.bias, padded=acc.columns) if epilogue.bias else None,
        gate=None if epilogue.gate is None else weights.table(epilogue.gate), residual=residual, y=y, rows=acc.columns,
        scale_stride=1, block=shape_of(rotation)[-1] if rotation is not None else 0,
    )  # fmt: skip
    reads = [acc, x.scale, *([residual] if residual else [])]
    binder.launch(op, f"{op.name} (epilogue)", instance, arguments, reads, [y])


# Floats


def _small_m(binder: Binder, op: Linear) -> Matrix:
    """One kernel with the norm in front and everything behind it, a rotary embedding included."""
    sized, epilogue, norm = binder.sized.linears[op], op.epilogue, op.norm
    gemm = sized.gemm
    assert isinstance(gemm, FloatGemm)
    if sized.norm_ahead is not None and norm is not None:
        source, squares = binder.prepared[norm.x]
    else:
        source, squares, norm = binder.in_memory(op, op.x, norm), None, None
    rotation = epilogue.rotation if gemm.epilogue == "ROTARY" else None
    order = {"ROTARY": "rotary", "GEGLU": "gate-up"}.get(gemm.epilogue, "")
    m, n, k = gemm.m, gemm.n, gemm.k
    if rotation is not None:
        y = binder.new(op.name, m, n, "Bf16")
    else:
        y = binder.new_output(epilogue, m, n // 2 if gemm.epilogue == "GEGLU" else n)
    residual = _residual(binder, op, y)
    expect(gemm.epilogue in ("NONE", "SILU", "GEGLU", "ROTARY"), op.name)
    expect(residual is None or gemm.epilogue == "NONE", op.name)
    expect(source.is_dense and source.type == "Bf16", op.name)
    factor, bias = _factor_and_bias(binder, op, binder.vectors(norm)[1] if norm else None, order)
    pack = binder.weights.float_fragments if gemm.bits == 16 else binder.weights.int4_fragments
    turned, cached, past = _rotary_arguments(binder, op, rotation, y)
    normed = _for_norm(binder, op, y)
    tactic = binder.chosen.floating[op]
    shared = _shared_by_blocks(binder, op, tactic, gemm)
    arguments: Arguments = dict(
        x=source, squares=squares, weight=pack(op.weight, order), channel_scale=factor, bias=bias, residual=residual, y=y,
        tokens=m, rows=n, depth=k, y_stride=y.stride, epsilon=norm.epsilon if norm else 0.0, **turned, **normed, **shared,
    )  # fmt: skip
    reads = [each for each in (source, squares, residual, past) if each]
    writes = [y, *cached, *_written(normed), *_written(shared)]
    instance = gemm.instance(tactic)
    binder.launch(op, op.name, instance, arguments, reads, writes, 2.0 * m * n * k, n * k * gemm.bits // 8)
    return y


def _projected(binder: Binder, op: Linear) -> Matrix:
    """No launch: attention's has left parts, which the quantizer behind adds to the residual stream, in y."""
    epilogue, parts = op.epilogue, binder.of_heads[op]
    y = binder.new_output(epilogue, binder.sized.linears[op].rows, parts.columns)
    residual = _residual(binder, op, y)
    assert residual is not None
    gate = None if epilogue.gate is None else binder.weights.table(epilogue.gate)
    binder.unsummed |= dict.fromkeys(epilogue.results, Parts(residual, parts, gate))
    return y


def _shared_by_blocks(binder: Binder, op: Linear, tactic: kernels.GemmFloat, gemm: FloatGemm) -> Arguments:
    """Where blocks that share K meet, if it is in memory."""
    if tactic.split == 1 or binder.gpu.has_clusters:
        return {}
    return {
        "partial": binder.partial(tactic.partial_words(gemm.m, gemm.n), op.branch),
        "counters": binder.counters(tactic.groups(gemm.m, gemm.n), op.branch),
    }


def _rotary_arguments(
    binder: Binder, op: Linear, rotation: Rotation | None, y: Matrix
) -> tuple[Arguments, list[Matrix], Matrix | None]:
    """Of the epilogue that turns q and k; the caches that it writes; and where the real tokens' number is read from."""
    if rotation is None:
        return dict(kv_stride=0, first_position=0, to_cache=0), [], None
    first, past = _position(binder, op, rotation)
    cached = _caches(binder, rotation)
    key, value = cached or y.split(rotation.columns)[1:]  # the suffix's own, beside its queries
    cosine, sine = map(binder.weights.float32, rotation.tables)
    turned: Arguments = dict(k=key, v=value, cosine=cosine, sine=sine, past=past)
    turned |= dict(kv_stride=key.stride, first_position=first, to_cache=int(bool(cached)))
    return turned, cached, past


def _factor_and_bias(binder: Binder, op: Linear, shift: Argument, order: str) -> tuple[Weight | None, Weight | None]:
    """What each channel is multiplied by, the scale of an INT4 weight and a gate, and what is then added: one thing at most.

    The shift of the norm in front is added too, a row for each step: with norm(x) = x r gain + shift,
    norm(x) W = (x gain) W r + shift W.
    """
    weights, epilogue, scale = binder.weights, op.epilogue, op.operands.get("weight_scale")
    added = [each for each in (shift, epilogue.bias, epilogue.bias_table) if each]
    expect(len(added) <= 1 and not (epilogue.gate and added) and (shift is None or scale is None), op.name)
    expect(not order or (epilogue.bias_table is None and epilogue.gate is None), op.name)
    factor = None
    if epilogue.gate is not None:
        factor = weights.table(epilogue.gate, scale)
    elif scale is not None:
        factor = weights.float32(scale, order=order)
    if isinstance(shift, Weight):
        return factor, weights.shift_product(shift, op.weight, order)
    if epilogue.bias_table is not None:
        return factor, weights.table(epilogue.bias_table)
    return factor, weights.float32(*epilogue.bias, order=order) if epilogue.bias else None


def _library(binder: Binder, op: Linear) -> Matrix:
    """cuBLASLt, which knows no GeGLU and no INT4."""
    epilogue, n = op.epilogue, shape_of(op.weight)[-1]
    expect(epilogue.bias_table is None and epilogue.activation in ("", "geglu", "gelu"), op.name)
    expect(epilogue.gate is None, op.name)
    x = binder.in_memory(op, op.x, op.norm)
    geglu = epilogue.activation == "geglu"
    y = binder.new(op.name, x.rows, n, "Bf16") if geglu else binder.new_output(epilogue, x.rows, n)
    residual = _residual(binder, op, y)
    bias = None
    if epilogue.bias:
        bias = binder.weights.float32(*epilogue.bias) if y.type == "float" else binder.weights.bf16(epilogue.bias)
    weight = binder.weights.matrix(op.weight) if float_weight_bits(op) == 16 else _dequantized(binder, op)
    matmul(binder, op, op.name, x, weight, y, bias, residual, gelu=epilogue.activation == "gelu")
    if not geglu:
        return y
    gated = binder.new_output(epilogue, x.rows, n // 2)
    arguments: Arguments = dict(x=y, y=gated, width=n // 2)
    binder.launch(op, f"{op.name} (GeGLU)", kernels.geglu(x.rows, n // 2), arguments, [y], [gated])
    return gated


def _dequantized(binder: Binder, op: Linear) -> Matrix:
    """An INT4 weight as bf16 [N, K], until the GEMM has read it."""
    k, n = shape_of(op.weight)
    y = binder.new(f"{op.name}.weight", n, k, "Bf16")
    weight, scale = binder.weights.int4_fragments(op.weight, ""), binder.weights.float32(op.operands["weight_scale"])
    arguments: Arguments = dict(weight=weight, weight_scale=scale, y=y, rows=n, depth=k)
    instance = kernels.dequantize_weight(n, k)
    binder.launch(op, f"{op.name} (dequantize)", instance, arguments, [], [y], weight_bytes=n * k // 2)
    return y


def matmul(
    binder: Binder,
    op: Op,
    name: str,
    x: Matrix,
    weight: Weight | Matrix,
    y: Matrix,
    bias: Weight | None = None,
    addend: Matrix | Weight | None = None,
    gelu: bool = False,
    batch: int = 1,
) -> None:
    """A GEMM by the library (plugins/kernels/library.py); a `batch` of them has the addend of one GEMM in common."""
    n, k = y.columns, x.columns
    reads = [x, *(each for each in (addend, weight) if isinstance(each, Matrix))]
    expect(not isinstance(addend, Matrix) or addend.stride == y.stride, name)
    arguments: Arguments = dict(
        weight=weight, x=x, bias=bias, addend=addend, y=y, algorithm=0, n=n, m=x.rows // batch, k=k, x_stride=x.stride,
        y_stride=y.stride, batch=batch, addend_batch_stride=0, y_type=BYTES[y.type], gelu=int(gelu),
    )  # fmt: skip
    weight_bytes = 0 if isinstance(weight, Matrix) else 2 * n * k
    binder.launch(op, name, kernels.matmul(), arguments, reads, [y], 2.0 * x.rows * n * k, weight_bytes)


def _narrow(binder: Binder, op: Linear) -> Matrix:
    """From few channels, in float32: what goes in from the robot, its state and the actions under way."""
    x, epilogue, (k, n) = binder.values[op.x], op.epilogue, shape_of(op.weight)
    expect(k % 4 == 0 and n % 16 == 0, op.name)
    expect(epilogue.activation in ("", "silu") and epilogue.gate is None and epilogue.residual is None, op.name)
    y = binder.new_output(epilogue, x.rows, n)
    bias = binder.weights.float32(*epilogue.bias) if epilogue.bias else None
    if epilogue.bias_table is not None:
        expect(bias is None, op.name)
        bias = binder.weights.table(epilogue.bias_table)
    normed = _for_norm(binder, op, y)
    instance = kernels.linear_narrow(x.rows, n, epilogue.activation.upper() or "NONE", y.type)
    arguments: Arguments = dict(x=x, weight=binder.weights.float32(op.weight), bias=bias, y=y, depth=k, columns=n, **normed)
    binder.launch(op, op.name, instance, arguments, [x], [y, *_written(normed)], 2.0 * x.rows * n * k, 4 * n * k)
    return y


def _flow_step(binder: Binder, op: Linear) -> Matrix:
    """x + (norm(h) W + b): the last layer's output becomes the next state of the flow, in place, as does the solver's history."""
    epilogue, norm, (k, n) = op.epilogue, op.norm, shape_of(op.weight)
    expect(epilogue.out.is_graph_output() and not epilogue.activation and epilogue.gate is None, op.name)
    expect(bool(epilogue.bias) and n % 16 == 0 and norm is not None, op.name)
    assert norm is not None
    flow, h = binder.flow, binder.values[norm.x]
    gain, shift = binder.vectors(norm)
    weight, bias = binder.weights.float32(op.weight), binder.weights.float32(*epilogue.bias)
    history, coefficients = (None, None) if epilogue.multistep is None else _solver_state(binder, epilogue.multistep)
    state, earlier = ([flow], 0) if history is None else ([flow, history], history.rows // h.rows)
    arguments: Arguments = dict(
        x=h, gain=gain, shift=shift, weight=weight, bias=bias, flow=flow, history=history, coefficients=coefficients,
        depth=k, epsilon=norm.epsilon,
    )  # fmt: skip
    instance, work = kernels.flow_step(h.rows, n, earlier), 2.0 * h.rows * n * k
    binder.launch(op, op.name, instance, arguments, [h, *state], state, work, 4 * n * k)
    return flow


def _solver_state(binder: Binder, multistep: Multistep) -> tuple[Matrix, Weight]:
    """The changes of earlier steps, which become the next step's in place; and this step's row of the coefficients."""
    history = binder.solver_history(shape_of(multistep.history)[0])
    binder.values[multistep.history_next] = history
    return history, binder.weights.table(multistep.coefficients)


_BY_KERNEL: Mapping[str, Callable[[Binder, Linear], Matrix]] = {
    "integer": _integer,
    "small M": _small_m,
    "library": _library,
    "narrow": _narrow,
    "flow step": _flow_step,
}


# Around them


def _residual(binder: Binder, op: Linear, y: Matrix) -> Matrix | None:
    """What is added to a GEMM: the residual stream, which goes on in y."""
    if op.epilogue.residual is None:
        return None
    residual = binder.values[op.epilogue.residual]
    expect(residual.type == y.type == "float" and residual.is_dense, op.name)
    return residual


def _for_norm(binder: Binder, op: Linear, y: Matrix) -> Arguments:
    """What the launch leaves for the norm that reads y: y * gain in bf16, and of every 16 channels the sum of y^2."""
    norm = binder.sized.linears[op].leaves
    if norm is None:
        return {}
    x = binder.new(f"{op.name} (normed)", y.rows, y.columns, "Bf16")
    squares = binder.new(f"{op.name} (squares)", y.rows, y.columns // 16, "float")
    binder.prepared |= dict.fromkeys(op.writes, (x, squares))
    return dict(normed=x, normed_gain=binder.vectors(norm)[0], normed_squares=squares)


def _written(normed: Mapping[str, Matrix | Argument]) -> list[Matrix]:
    return [each for each in normed.values() if isinstance(each, Matrix)]


# Rotary embeddings


def _position(binder: Binder, op: Linear, rotation: Rotation) -> tuple[int, Matrix | None]:
    """The position of the first row; of tokens behind the prefix, counted from the end of its real tokens."""
    positions = binder.integers[rotation.positions].reshape(-1)
    consecutive = bool((np.diff(positions) == 1).all()) and len(positions) == binder.sized.rows[op.x]
    expect(consecutive, op.name)
    first = int(positions[0])
    return (first - binder.prefix_rows, binder.past) if first > 0 else (0, None)


def _caches(binder: Binder, rotation: Rotation) -> list[Matrix]:
    """Where keys and values go, if not beside the queries."""
    return [binder.cache(name) for name in rotation.caches if name is not None]


def _rotary(binder: Binder, op: Linear, rotation: Rotation, y: Matrix) -> None:
    """The rotary embedding as a launch of its own: q and k in place, or k and v into the cache."""
    first, past = _position(binder, op, rotation)
    cached = _caches(binder, rotation)
    key, value = cached or (None, None)
    heads = (sum(rotation.columns) - 2 * rotation.dims) // rotation.dims
    cosine, sine = map(binder.weights.float32, rotation.tables)
    arguments: Arguments = dict(qkv=y, cosine=cosine, sine=sine, k_cache=key, v_cache=value, past=past, first_position=first,
                     stride=y.stride, cache_stride=key.stride if key else 0)  # fmt: skip
    reads, writes = [y, *([past] if past else [])], [y, *cached]
    instance = kernels.rotary(y.rows, heads, rotation.dims)
    binder.launch(op, f"{op.name} (rotary)", instance, arguments, reads, writes)


def _place_rotated(binder: Binder, rotation: Rotation, y: Matrix) -> None:
    """Where q, k and v are: in y, or k and v in the cache, in the prefix's rows or in the one behind them."""
    pieces = y.split(rotation.columns)
    cached = _caches(binder, rotation)
    if cached:
        behind = int(binder.integers[rotation.positions].reshape(-1)[0]) > 0
        start, stop = (binder.prefix_rows, binder.prefix_rows + 1) if behind else (0, binder.prefix_rows)
        pieces[-2:] = [each.slice_rows(start, stop) for each in cached]
    binder.values |= dict(zip(rotation.results, pieces, strict=True))
