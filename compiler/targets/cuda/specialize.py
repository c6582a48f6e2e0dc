"""Specialize: the ops at one size of the observation. How many rows each has, and which kind of kernel computes it.

A linear with at most 64 rows (small M) is bound by its weight's bytes and by latency, so one kernel computes it with all that
is around it. Larger float linears are cuBLASLt's, with launches of their own for a norm, a rotary embedding and GeGLU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from duq.compiler.errors import GraphError
from duq.compiler.targets.cuda.gemm import AnyGemm, FloatGemm, Gemm
from duq.compiler.targets.ops import Attention, JoinKeys, JoinRows, Linear, Norm, Op, Patches, Prompt, Quantize, Rotate
from duq.compiler.targets.values import shape_of
from duq.plugins import ops as duq_ops
from duq.plugins.tactics import SMALL_M
from duq.runtime.config import ModelConfig

NORM_COLUMNS = 64  # what a norm's sums of squares are read for, at a time


@dataclass(frozen=True)
class Size:
    """Of an observation: camera images, and tokens of the prompt, padding included."""

    cameras: int
    prompt: int

    def prefix_rows(self, config: ModelConfig) -> int:
        return self.cameras * config.vision.tokens + self.prompt

    def cache_rows(self, config: ModelConfig) -> int:
        """The prefix's, and in pi0 the state token's behind them."""
        return self.prefix_rows(config) + (not config.pi05)

    def __str__(self) -> str:
        return f"{self.cameras} cameras, {self.prompt} prompt tokens"


@dataclass
class SizedLinear:
    """A linear at one size.

    kernel: "integer", "small M", "library", "narrow" or "flow step". gemm: what a tactic is chosen for, if there are several.
    norm_ahead: the linear whose launch prepares this one's norm; without one, a norm in front of a "small M" or "library"
    linear is a launch of its own. leaves: the norm that this linear's launch prepares for those that read its output.
    """

    rows: int
    kernel: str
    gemm: AnyGemm | None = None
    norm_ahead: Linear | None = None
    leaves: Norm | None = None


@dataclass
class Sized:
    """The ops of a graph at one size. rows: of every value that they read or write."""

    ops: Sequence[Op]
    size: Size
    rows: dict[ir.Value, int]
    linears: dict[Linear, SizedLinear] = field(default_factory=dict)


def specialize(ops: Sequence[Op], model: ir.Model, size: Size, config: ModelConfig) -> Sized:
    """Raises GraphError for a linear that no kernel computes at this size."""
    rows = {value: _input_rows(value.name, size, config) for value in model.graph.inputs}
    sized = Sized(ops, size, rows)
    writers: dict[ir.Value, Linear] = {}
    for op in ops:
        sized.rows |= dict.fromkeys(op.writes, _rows_of(op, sized.rows, size, config))
        if isinstance(op, Linear):
            sized.linears[op] = _linear(op, sized, writers)
            writers |= dict.fromkeys(op.writes, op)
    return sized


def _input_rows(name: str | None, size: Size, config: ModelConfig) -> int:
    return {"state": 1, "x": config.action_horizon}.get(name or "", size.cache_rows(config))


def _rows_of(op: Op, rows: Mapping[ir.Value, int], size: Size, config: ModelConfig) -> int:
    match op:
        case Patches():
            return size.cameras * config.vision.tokens
        case Prompt():
            return size.prompt
        case JoinRows():
            return sum(rows[part] for part in op.parts)
        case JoinKeys():
            return size.cache_rows(config) if op.cache else rows[op.past] + rows[op.own]
        case Quantize() | Rotate() | Linear():
            return rows[op.x]
        case Attention():
            return rows[op.q]
    raise GraphError(f"{op.name}: {type(op).__name__} is an op without a number of rows")


def _linear(op: Linear, sized: Sized, writers: Mapping[ir.Value, Linear]) -> SizedLinear:
    rows, epilogue = sized.rows[op.x], op.epilogue
    if op.kind == "integer":
        return SizedLinear(rows, "integer", integer_gemm(op, rows))
    if op.kind != "float":
        return SizedLinear(rows, op.kind)
    bits = float_weight_bits(op)
    if rows > SMALL_M or epilogue.activation == "gelu":
        return SizedLinear(rows, "library")
    ahead = _norm_ahead(op, sized, writers)
    n, k = shape_of(op.weight)[1], shape_of(op.weight)[0]
    out, after = epilogue.type, epilogue.activation.upper() or "NONE"
    if epilogue.rotation is not None and len(epilogue.parts) == 3:
        out, after = "Bf16", "ROTARY"
    return SizedLinear(rows, "small M", FloatGemm(rows, n, k, bits, out, ahead is not None, after), ahead)


def float_weight_bits(op: Linear) -> int:
    """16, or 4 for an INT4 weight with float activations. Raises GraphError for a quantized linear without a kernel."""
    if not op.operands:
        return 16
    if op.node.op_type != "W4A16Linear" or "output_rotation" in op.operands:
        rotated = " with an output rotation" if "output_rotation" in op.operands else ""
        raise GraphError(
            f"{op.name}: --target cuda has no kernel for {op.node.op_type}{rotated}; quantize its activations too"
        )
    return 4


def integer_gemm(op: Linear, rows: int) -> Gemm:
    """The GEMM of a quantized linear for so many tokens: in front of an output rotation its accumulators alone.

    GEMMs take whole tiles, and a policy's sizes need not be multiples of theirs (SigLIP's MLP has 4304 channels). Zeros make up
    for it: the quantizer writes more channels than x has, the weight has rows and columns of zeros, and y gets columns that
    nobody reads. K is padded always; N where it is worth it (with small M any 16 will do) and the readers of y take rows of any
    stride.
    """
    epilogue, (k, n) = op.epilogue, shape_of(op.weight)
    bits, large = duq_ops.QUANTIZED_LINEARS[op.node.op_type][0], rows > SMALL_M
    k = padded(k, 128 if large else 64)
    if "output_rotation" in op.operands:
        return Gemm(rows, n, k, bits, "int", "NONE")
    if large and n % 64 and epilogue.any_stride:
        parts = 2 if epilogue.activation == "geglu" else 1
        n = parts * padded(n // parts, 128)
    after = "ROTARY" if epilogue.rotation is not None else epilogue.activation.upper() or "NONE"
    return Gemm(rows, n, k, bits, epilogue.type, after)


def padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _norm_ahead(op: Linear, sized: Sized, writers: Mapping[ir.Value, Linear]) -> Linear | None:
    """The linear that writes the norm's input, if its launch can leave x * gain and the sums of x^2, and notes it there.

    It leaves them once: for several norms of x only if they have the same gain.
    """
    norm = op.norm
    writer = writers.get(norm.x) if norm is not None else None
    if norm is None or writer is None or norm.center or not _can_leave(writer, sized.linears[writer]):
        return None
    leaves = sized.linears[writer].leaves
    if leaves is not None and leaves.gain is not norm.gain:
        return None
    sized.linears[writer].leaves = leaves or norm
    return writer


def _can_leave(op: Linear, linear: SizedLinear) -> bool:
    """Whether the launch computes whole rows of the residual stream in an epilogue that sums squares."""
    epilogue, columns = op.epilogue, shape_of(op.weight)[-1]
    if epilogue.parts or epilogue.type != "float" or columns % NORM_COLUMNS:
        return False
    if linear.kernel == "integer":
        assert isinstance(linear.gemm, Gemm)
        return linear.gemm.n == columns and linear.gemm.out != "int" and linear.rows <= SMALL_M
    return linear.kernel == "narrow" or (linear.kernel == "small M" and not epilogue.activation)
