"""Bind: ops with their tactics become launches, whose arguments are matrices in buffers and weights in the plan.

Each op is bound by one function (BINDERS), which asks the `Binder` where its operands are and gives it launches: what the
kernels read, in which form, and where they write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from duq.compiler.targets.cuda.bind_linears import linear, matmul
from duq.compiler.targets.cuda.binder import Binder, Quantized
from duq.compiler.targets.cuda.choose import Chosen
from duq.compiler.targets.cuda.launches import Argument, Arguments, Launch, Matrix, Program, Weight
from duq.compiler.targets.cuda.projections import Projection
from duq.compiler.targets.cuda.specialize import Size, Sized
from duq.compiler.targets.cuda.weights import Weights
from duq.compiler.targets.fuse import expect
from duq.compiler.targets.ops import Attention, JoinKeys, JoinRows, Linear, Norm, Op, Patches, Prompt, Quantize, Rotate
from duq.compiler.targets.patterns import source_of
from duq.compiler.targets.values import array_of, shape_of
from duq.plugins import kernels
from duq.plugins.gpu import Gpu
from duq.plugins.tactics import SMALL_M
from duq.runtime.config import ModelConfig


def bind(
    graphs: Mapping[str, tuple[ir.Model, Sized, Chosen]],
    config: ModelConfig,
    size: Size,
    gpu: Gpu,
    weights: Weights,
    pixel: str = "unsigned char",
) -> Program:
    """The launches of the graphs "prefix" and "step" at a size; adds what they read to `weights`.

    Raises GraphError for an op in a form that no kernel is made for.
    """
    binder = Binder(config, size, gpu, weights, pixel)
    launches: dict[str, list[Launch]] = {}
    for name, (model, sized, chosen) in graphs.items():
        binder.start(model, sized, chosen)
        for op in sized.ops:
            BINDERS[type(op)](binder, op)
        launches[name] = binder.launches
        if name == "prefix":
            outputs = _outputs(binder, model)
    state = {"x_next": binder.flow, "history_next": binder.history}
    for value in graphs["step"][0].graph.outputs:
        name = str(value.name)
        expect(binder.values[value] is state[name], name)  # the next step reads it where this one did
    zeroed = [workspace for workspace in binder.workspaces if workspace.bytes]
    if binder.history is not None:
        zeroed.append(binder.history.buffer)
    return Program(size.cameras, size.prompt, launches["prefix"], launches["step"], binder.inputs, zeroed, outputs)


def _outputs(binder: Binder, model: ir.Model) -> dict[str, tuple[Matrix, int]]:
    """What the prefix computes, and the launch after which it is there; caches are complete after the last."""
    found: dict[str, tuple[Matrix, int]] = {}
    for value in model.graph.outputs:
        name = str(value.name)
        if name in binder.caches:
            found[name] = binder.caches[name], len(binder.launches) - 1
        else:
            matrix = binder.values[source_of(value)]
            writes = [index for index, launch in enumerate(binder.launches) if matrix.buffer in launch.writes]
            found[name] = matrix, max(writes)
    return found


def patches(binder: Binder, op: Patches) -> None:
    """A convolution without overlap is a GEMM over the pixels of a patch; the positions are added to it.

    The graph's input is float, byte / 127.5 - 1 of the camera's bytes (ModelInputs.pixels). The device gets the bytes, a
    quarter, and the kernel that makes patches computes the same float32 values before it rounds them to bf16. Images that are
    resized in floating point are uploaded as they are.
    """
    n, _, patch, _ = shape_of(op.weight)
    size, tokens, cameras = binder.config.vision.image_size, binder.config.vision.tokens, binder.size.cameras
    columns = -(-3 * patch * patch // 8) * 8  # whole 16 bytes
    x = binder.new("patches", cameras * tokens, columns, "Bf16")
    instance = kernels.patches(cameras, size, patch, binder.images.type)
    arguments: Arguments = dict(images=binder.images, y=x, size=size, pitch=columns)
    binder.launch(op, "patches", instance, arguments, [binder.images], [x])
    y = binder.new_output(op.epilogue, x.rows, n)

    def offsets() -> np.ndarray:
        return np.asarray(array_of(op.position), np.float32) + np.asarray(array_of(op.bias), np.float32)

    addend = binder.weights.computed(f"{op.position.name}+{op.bias.name}.float32", tokens * n, "float", offsets)
    matmul(binder, op, op.name, x, binder.weights.matrix(op.weight, columns), y, addend=addend, batch=cameras)
    binder.values |= dict.fromkeys(op.writes, y)


def prompt(binder: Binder, op: Prompt) -> None:
    """The host looks the tokens' rows up; here they become float32, scaled."""
    x = binder.embeddings
    y = binder.new_output(op.epilogue, x.rows, x.columns)
    arguments: Arguments = dict(rows=x, y=y, depth=y.columns, y_stride=y.stride, scale=op.scale)
    binder.launch(op, "prompt", kernels.tokens(x.rows, x.columns), arguments, [x], [y])
    binder.values |= dict.fromkeys(op.writes, y)


def join_rows(binder: Binder, op: JoinRows) -> None:
    binder.values[op.out] = binder.joined_rows(op.out, op.name)


def join_keys(binder: Binder, op: JoinKeys) -> None:
    """If the prefix hands them to the steps, both pieces are in the cache already; else attention reads both."""
    if op.cache is not None:
        binder.values[op.out] = binder.caches[op.cache]


# Quantizers


def quantize(binder: Binder, op: Quantize) -> None:
    """Activations to INT8, with the norm in front, in the layout of the GEMMs that read them."""
    x = binder.values[op.x]
    layout = binder.chosen.layouts[op]
    padded, slabs = layout.columns, layout.slab_tokens and -(-x.rows // layout.slab_tokens) * layout.slab_tokens
    x_q = binder.new(f"{op.name}.x_q", slabs or x.rows, padded, "signed char")
    scale = binder.new(f"{op.name}.x_scale", x.rows, 1, "float")
    kind, turn, block, vectors = _transforms(binder, op.norm, op.operands)
    if op.x in binder.unsummed:
        _sum_and_quantize(binder, op, Quantized(x_q, scale), turn, vectors, slabs)
        return
    alone = kind == "PLAIN" and x.type == "Bf16" and turn == 64 and not any(vectors.values()) and padded == x.columns
    if alone and x.rows > SMALL_M and x.columns in kernels.HADAMARD_DEPTHS:
        instance = kernels.hadamard_quantize(x.rows, x.columns)
        arguments: Arguments = dict(tokens=x.rows, depth=x.columns)
    else:
        instance = kernels.rotate_quantize(x.rows, x.columns, x.type, kind, turn, padded)
        arguments = dict(vectors, depth=x.columns, padded_depth=padded, block=block, epsilon=_epsilon(op.norm))
    arguments |= dict(x=x, x_q=x_q, x_scale=scale, row_stride=x.stride, slab_tokens=slabs)
    binder.launch(op, f"{op.name} (quantize)", instance, arguments, [x], [x_q, scale])
    binder.quantized[op.node.outputs[0]] = Quantized(x_q, scale)


def _sum_and_quantize(
    binder: Binder, op: Quantize, to: Quantized, turn: str | int, vectors: dict[str, Argument], slabs: int
) -> None:
    """The residual stream of the parts that attention has left, and its INT8."""
    y, total = binder.values[op.x], binder.unsummed.pop(op.x)
    gain, shift = vectors.pop("gain"), vectors.pop("shift")
    expect(to.x.columns == y.columns and y.is_dense and not any(vectors.values()), op.name)
    instance = kernels.residual_quantize(y.rows, y.columns, total.parts.rows // y.rows, turn)
    arguments: Arguments = dict(
        x=total.residual, parts=total.parts, gate=total.gate, gain=gain, shift=shift, y=y, x_q=to.x,
        x_scale=to.scale, depth=y.columns, slab_tokens=slabs, epsilon=_epsilon(op.norm),
    )  # fmt: skip
    binder.launch(op, f"{op.name} (quantize)", instance, arguments, [total.residual, total.parts], [y, to.x, to.scale])
    binder.quantized[op.node.outputs[0]] = to


def rotate(binder: Binder, op: Rotate) -> None:
    """The same without the quantizer: bf16, for GEMMs of floats."""
    x = binder.values[op.x]
    kind, turn, block, vectors = _transforms(binder, op.norm, op.operands)
    y = binder.new(f"{op.name}.x", x.rows, x.columns, "Bf16")
    instance = kernels.rotate_quantize(x.rows, x.columns, x.type, kind, turn, out=y.type)
    arguments: Arguments = dict(vectors, x=x, x_q=y, depth=x.columns, padded_depth=x.columns, row_stride=x.stride, block=block,
                     slab_tokens=0, epsilon=_epsilon(op.norm))  # fmt: skip
    binder.launch(op, f"{op.name} (rotate)", instance, arguments, [x], [y])
    binder.values[op.out] = y


def _transforms(
    binder: Binder, norm: Norm | None, operands: Mapping[str, ir.Value]
) -> tuple[str, str | int, int, dict[str, Argument]]:
    """What kernels.rotate_quantize is told of a prologue: its source, its rotation, the block of a dense one, the vectors."""
    kind = "PLAIN" if norm is None else "LAYER_NORM" if norm.center else "RMS_NORM"
    gain, shift = (None, None) if norm is None else binder.vectors(norm)
    names = "input_scale", "rotation", "activation_scale"
    found: dict[str, Argument] = {"gain": gain, "shift": shift}
    found |= {name: binder.weights.float32(operands[name]) if name in operands else None for name in names}
    found["permutation"] = _permutation(binder, operands.get("permutation"))
    if "rotation" in operands:
        return kind, "DENSE", shape_of(operands["rotation"])[-1], found
    return kind, shape_of(operands["hadamard"])[0] if "hadamard" in operands else "NONE", 0, found


def _permutation(binder: Binder, value: ir.Value | None) -> Weight | None:
    if value is None:
        return None
    return binder.weights.computed(
        f"{value.name}.int32", shape_of(value)[0], "int", lambda: array_of(value).astype(np.int32)
    )


def _epsilon(norm: Norm | None) -> float:
    return norm.epsilon if norm is not None else 0.0


# Attention


def attention(binder: Binder, op: Attention) -> None:
    q, k, v = (binder.values[each] for each in (op.q, op.k, op.v))
    own_k, own_v = (binder.values[each] for each in op.own) if op.own else (None, None)
    images = binder.size.cameras if op.each_image else 1
    rows, own_rows = q.rows // images, own_k.rows if own_k else 0
    # Of the cache the first *past rows are real; the state token's row is behind them.
    in_cache = any(k.buffer is cache.buffer for cache in binder.caches.values())
    past = binder.past if in_cache else None
    keys = k.rows - binder.prefix_rows if in_cache else k.rows // images
    expect(k.stride == v.stride and (own_k is None or own_v is None or own_k.stride == own_v.stride), op.name)
    arguments: Arguments = dict(
        q=q, k=k, v=v, own_k=own_k, own_v=own_v, past=past, tokens=rows, keys=keys, own_keys=own_rows,
        q_stride=q.stride, kv_stride=k.stride, own_stride=own_k.stride if own_k else 0,
        cache_ready=int(in_cache and binder.caches_complete),  # may be read before the launch ahead has ended
        scale=op.scale,
    )  # fmt: skip
    reads = [each for each in (q, k, v, own_k, own_v, past) if each]
    work = 4.0 * q.rows * (k.rows // images + own_rows) * q.columns
    if op in binder.chosen.projections:
        _project(binder, op, binder.chosen.projections[op], arguments, reads, work)
        return
    out = binder.new(str(op.out.name), q.rows, q.columns, "Bf16")
    tactic = _with_heads(binder.chosen.attention[op], op)
    instance = tactic.instance(rows, op.kv_heads, images)
    shared = _shared_by_blocks(binder, op, tactic, rows, images)
    arguments |= dict(out=out, out_stride=out.stride, **shared)
    binder.launch(op, op.name, instance, arguments, reads, [out, *shared.values()], work)
    binder.values[op.out] = out


def _project(
    binder: Binder, op: Attention, projection: Projection, arguments: Arguments, reads: list[Matrix], work: float
) -> None:
    """The attention and its output projection, what each head adds to that as rows of its own."""
    linear, tactic = projection.linear, projection.tactic
    (k, n), m = shape_of(linear.weight), binder.sized.rows[op.q]
    parts = binder.new(f"{linear.name} (parts)", op.heads * m, n, "float")
    arguments |= dict(out=parts, out_stride=n, weight=binder.weights.head_slabs(linear.weight, n // tactic.split))
    name = f"{op.name}+{linear.name.rpartition('.')[2]}"
    instance = tactic.instance(m, op.heads, n)
    binder.launch(op, name, instance, arguments, reads, [parts], work + 2.0 * m * n * k, 2 * n * k)
    binder.of_heads[linear] = parts


def _shared_by_blocks(binder: Binder, op: Attention, tactic: Any, rows: int, images: int) -> dict[str, Matrix]:
    """Where blocks that share the keys meet, if it is in memory."""
    if not isinstance(tactic, kernels.SplitAttention):
        return {}
    sizes = rows, op.kv_heads, images
    return {
        "partial": binder.partial(tactic.partial_words(*sizes), op.branch),
        "counters": binder.counters(tactic.groups(*sizes), op.branch),
    }


def _with_heads(tactic: Any, op: Attention) -> Any:
    return replace(tactic, heads=op.heads // op.kv_heads)


BINDERS: Mapping[type[Op], Callable[[Binder, Any], None]] = {
    Patches: patches,
    Prompt: prompt,
    JoinRows: join_rows,
    JoinKeys: join_keys,
    Quantize: quantize,
    Rotate: rotate,
    Linear: linear,
    Attention: attention,
}
