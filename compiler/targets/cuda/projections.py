"""Where the suffix's attention, its output projection and the sum with the residual stream are two launches instead of three.

The attention's launch multiplies what each head has found by the head's part of the projection's weight, and the quantizer
behind adds the heads' parts to the residual stream (attention_wgmma.cu, residual_quantize.cu). The projection has no launch.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from duq.compiler.targets.cuda.specialize import Sized
from duq.compiler.targets.ops import Attention, Linear, Op, Quantize
from duq.compiler.targets.values import shape_of
from duq.plugins.gpu import Gpu
from duq.plugins.kernels.attention_wgmma import DIMS, ProjectedAttention
from duq.plugins.tactics import SMALL_M, projected_attention


@dataclass(frozen=True)
class Projection:
    """An attention's output projection, and the quantizer of the residual stream behind it."""

    linear: Linear
    quantize: Quantize
    tactic: ProjectedAttention


def projections(sized: Sized, gpu: Gpu) -> dict[Attention, Projection]:
    """Those that are computed with their attention, by it."""
    found = {op: _projection(op, sized, gpu) for op in sized.ops if isinstance(op, Attention)}
    return {op: projection for op, projection in found.items() if projection is not None}


def _projection(op: Attention, sized: Sized, gpu: Gpu) -> Projection | None:
    """Not of pi0's state token, which runs beside the prefix: for one row, a cluster a head would take multiprocessors from it."""
    rows = sized.rows[op.q]
    if op.own is None or op.branch or op.each_image or op.kv_heads > 1 or op.dims != DIMS or rows > SMALL_M:
        return None
    readers = _readers(op.out, sized)
    linear = readers[0] if len(readers) == 1 else None
    if not isinstance(linear, Linear) or not _is_sum_of_heads(linear, sized):
        return None
    first = next(iter(_readers(linear.epilogue.results[0], sized)), None)
    if not isinstance(first, Quantize) or not _can_sum(first):
        return None
    width = shape_of(linear.weight)[1]
    tactic = projected_attention(op.heads, width, sized.rows[op.k], sized.rows[op.own[0]], gpu)
    return None if tactic is None else Projection(linear, first, tactic)


def _readers(value: ir.Value, sized: Sized) -> list[Op]:
    """In the order of their launches."""
    return [each for each in sized.ops if value in each.reads]


def _is_sum_of_heads(op: Linear, sized: Sized) -> bool:
    """Whether it is residual + x W (* gate), of floats, with nothing left for a norm."""
    e, linear = op.epilogue, sized.linears[op]
    more = (
        e.bias,
        e.bias_table,
        e.activation,
        e.parts,
        e.rotation,
        e.joined,
        e.multistep,
        op.operands,
        op.norm,
        linear.leaves,
    )
    in_stream = e.residual is not None and e.type == "float" and not e.out.is_graph_output()
    return linear.kernel == "small M" and in_stream and not any(more)


def _can_sum(op: Quantize) -> bool:
    """Whether it is RMSNorm, a Hadamard or nothing, and INT8 of a scale for each token, of rows without padding."""
    norm, columns = op.norm, shape_of(op.readers[0].weight)[0]
    return (
        norm is not None
        and not norm.center
        and not op.geglu
        and op.operands.keys() <= {"x", "hadamard"}
        and columns % 64 == 0
    )
