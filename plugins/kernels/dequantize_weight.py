"""An INT4 weight to bf16: dequantize_weight.cu."""

from __future__ import annotations

from duq.plugins.kernel import Instance, Kernel, Shape
from duq.plugins.kernels.reference import Launched, Pointer, padded
from duq.plugins.layout import unpack_int4_fragments


def reference(launch: Launched, weight: Pointer, weight_scale: Pointer, y: Pointer, rows: int, depth: int) -> None:
    assert launch.grid[0] * 8 >= rows // 16 * -(-depth // 64) and launch.threads == 256
    w = unpack_int4_fragments(weight.read("unsigned char", rows * padded(depth, 64) // 2), (rows, depth))
    y.write("Bf16", w * weight_scale.read("float", rows)[:, None])


DEQUANTIZE_WEIGHT = Kernel(
    "dequantize_weight.cu",
    "dequantize_weight",
    "",
    "const uint4* weight, const float* weight_scale, Bf16* y, int rows, int depth",
    reference,
)


def dequantize_weight(rows: int, depth: int) -> Instance:
    """An INT4 weight [rows, depth], multiples of 16, to bf16: for a library that multiplies floats."""
    tiles = rows // 16 * -(-depth // 64)  # a warp's
    return DEQUANTIZE_WEIGHT.instance(Shape((-(-tiles // 8), 1, 1), 256))
