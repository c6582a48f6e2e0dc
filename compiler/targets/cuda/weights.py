"""The forms in which kernels want a policy's weights. Each is made when it is written into the plan, one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
import torch

from duq.compiler.graph.passes.quantize import QuantizedTensor
from duq.compiler.graph.weights import record
from duq.compiler.targets.cuda.launches import Weight
from duq.compiler.targets.values import array_of, shape_of
from duq.plugins.kernels import Generated
from duq.plugins.layout import (
    CHUNK_K,
    interleave_gate_up,
    interleave_rotary,
    pack_bitblas,
    pack_float_fragments,
    pack_fragments,
    pack_head_slabs,
    pack_int4_fragments,
)


class Weights:
    """Collects what the launches of all variants and architectures ask for; equal requests are one weight."""

    def __init__(self) -> None:
        self.sources: dict[str, Callable[[], np.ndarray]] = {}
        self.bytes: dict[str, int] = {}

    def _add(self, name: str, kind: str, size: int, compute: Callable[[], np.ndarray], step_bytes: int = 0) -> Weight:
        """kind: the C++ type that the kernels read it as; size in bytes."""
        self.sources.setdefault(name, compute)
        self.bytes.setdefault(name, size)
        return Weight(name, kind, step_bytes)

    def packed(self, weight: ir.Value, shape: tuple[int, int], bits: int, layout: str, geglu: bool) -> Weight:
        """Quantized weight [N, K] as tensor core fragments (or for BitBLAS) of `shape`, N' and K', which zeros fill up; with
        GeGLU, gate and up interleaved."""
        n, k = shape
        order = "gate-up" if geglu else ""

        def compute() -> np.ndarray:
            values = integers_of(weight)
            values = np.pad(values, ((0, 0), (0, k - values.shape[1])))
            values = _in_order(values, order, n)
            return pack_bitblas(values) if layout == Generated.layout else pack_fragments(values, bits, layout)

        size = _suffix("x".join(map(str, shape)) if shape != shape_of(weight)[::-1] else "")
        name = f"{record(weight).title}.int{bits}.{layout}{_suffix(order)}{size}"
        kind = "signed char" if layout == Generated.layout else "unsigned char"
        return self._add(name, kind, n * k * bits // 8, compute)

    def matrix(self, weight: ir.Value, columns: int | None = None) -> Weight:
        """Float weight [K, N] (or a convolution's [N, ...]) as bf16 [N, columns], zeros beyond K."""
        shape = shape_of(weight)
        convolution = len(shape) == 4
        n, k = (shape[0], int(np.prod(shape[1:]))) if convolution else (shape[1], shape[0])
        columns = columns or k

        def compute() -> np.ndarray:
            values = array_of(weight)
            rows = values.reshape(n, k) if convolution else values.T
            return to_bf16(rows if columns == k else np.pad(rows, ((0, 0), (0, columns - k))))

        return self._add(f"{record(weight).title}.bf16", "Bf16", 2 * n * columns, compute)

    def float_fragments(self, weight: ir.Value, order: str) -> Weight:
        """Float weight [K, N] as bf16 tensor core fragments, its rows [N] in the order of an epilogue."""
        k, n = shape_of(weight)

        def compute() -> np.ndarray:
            return pack_float_fragments(to_bf16(_in_order(array_of(weight).T, order)))

        return self._add(f"{record(weight).title}.bf16.fragments{_suffix(order)}", "uint4", 2 * n * k, compute)

    def head_slabs(self, weight: ir.Value, rows: int) -> Weight:
        """Float weight [K, N] of an output projection as bf16 slabs of a head's channels and `rows` of N."""
        k, n = shape_of(weight)

        def compute() -> np.ndarray:
            return pack_head_slabs(to_bf16(array_of(weight).T), rows)

        return self._add(f"{record(weight).title}.bf16.heads.{rows}", "uint4", 2 * n * k, compute)

    def int4_fragments(self, weight: ir.Value, order: str) -> Weight:
        """INT4 weight [N, K] of a float GEMM as fragments, its rows [N] in the order of an epilogue."""
        k, n = shape_of(weight)

        def compute() -> np.ndarray:
            return pack_int4_fragments(_in_order(integers_of(weight), order))

        size = n * -(-k // CHUNK_K) * CHUNK_K // 2
        return self._add(f"{record(weight).title}.int4.fragments{_suffix(order)}", "uint4", size, compute)

    def shift_product(self, shift: Weight, weight: ir.Value, order: str) -> Weight:
        """shift W for each step, float32 [steps, N]: what an adaptive norm's shift adds to the GEMM behind it."""
        k, n = shape_of(weight)
        shifts, steps = self.sources[shift.name], self.bytes[shift.name] // (4 * k)

        def compute() -> np.ndarray:
            return np.ascontiguousarray(_in_order((shifts() @ np.float32(array_of(weight))).T, order).T)

        name = f"{shift.name}@{record(weight).title}.float32{_suffix(order)}"
        return self._add(name, "float", 4 * steps * n, compute, step_bytes=4 * n)

    def float32(self, *values: ir.Value, order: str = "", padded: int = 0) -> Weight:
        """Scalars, vectors (joined) or a matrix as they are; a vector perhaps in the order of an epilogue, and with zeros
        that make it `padded` long."""
        count = sum(math.prod(shape_of(value)) for value in values)
        name = "+".join(record(value).title for value in values) + ".float32" + _suffix(order)
        name += _suffix(str(padded) if padded > count else "")

        def compute() -> np.ndarray:
            arrays = [np.atleast_1d(np.float32(array_of(value))) for value in values]
            return _in_order(np.concatenate(arrays), order, padded)

        return self._add(name, "float", 4 * max(count, padded), compute)

    def bf16(self, values: Sequence[ir.Value]) -> Weight:
        """Vectors, joined, as bf16."""
        size = 2 * sum(math.prod(shape_of(value)) for value in values)

        def compute() -> np.ndarray:
            return to_bf16(np.concatenate([np.float32(array_of(value)) for value in values]))

        return self._add("+".join(record(value).title for value in values) + ".bf16", "Bf16", size, compute)

    def table(self, table: ir.Value, factor: ir.Value | None = None) -> Weight:
        """A table of the time [steps, ..., C] as float32 [steps, C], times a vector of C if one is given."""
        steps, *_, columns = shape_of(table)
        name = f"{table.name}.float32" if factor is None else f"{record(factor).title}*{table.name}.float32"

        def compute() -> np.ndarray:
            rows = np.float32(array_of(table)).reshape(steps, columns)
            return rows if factor is None else rows * np.float32(array_of(factor))

        return self._add(name, "float", 4 * steps * columns, compute, step_bytes=4 * columns)

    def computed(self, name: str, columns: int, kind: str, compute: Callable[[], np.ndarray]) -> Weight:
        """Whatever `compute` returns: `columns` elements of 4 bytes, of the C++ type `kind`."""
        return self._add(name, kind, 4 * columns, compute)


def integers_of(weight: ir.Value) -> np.ndarray:
    """A quantized weight as int8 [N, K]."""
    assert isinstance(weight.const_value, QuantizedTensor), weight.name
    return weight.const_value.integers()


def to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest bf16 (half to even), uint16; those of bf16 as they are."""
    if values.dtype.name == "bfloat16":
        return values.view(np.uint16)
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(torch.bfloat16).view(torch.uint16).numpy()


def _in_order(values: np.ndarray, order: str, padded: int = 0) -> np.ndarray:
    """Rows of a weight, or a bias or scale of as many elements, as an epilogue wants them (plugins/layout.py); with zeros
    behind them, behind gate and up each, that make them `padded`."""
    parts = np.split(values, 2) if order == "gate-up" else [values]
    missing = max(0, padded - len(values)) // len(parts)
    parts = [
        np.concatenate([part, np.zeros((missing, *part.shape[1:]), part.dtype)]) if missing else part for part in parts
    ]
    if order == "gate-up":
        return interleave_gate_up(*parts)
    return interleave_rotary(parts[0]) if order == "rotary" else parts[0]


def _suffix(order: str) -> str:
    return f".{order}" if order else ""
