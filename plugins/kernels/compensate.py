"""Rounding with error compensation, which quantizes weights and is no part of a plan: compensate.cu."""

from __future__ import annotations

import numpy as np

from duq.plugins.kernel import Instance, Kernel, Shape
from duq.plugins.kernels.reference import Launched, Pointer

COLUMNS = 32  # at a time: their sums are in a thread's registers


def reference(
    launch: Launched,
    columns: Pointer,
    scale: Pointer,
    feedback: Pointer,
    carried: Pointer,
    quantized: Pointer,
    rows: int,
    count: int,
    stride: int,
    bits: int,
) -> None:
    assert count <= launch.number("COLUMNS") and launch.threads == 128 and launch.grid[0] * 128 >= rows
    w, sums = columns.read("float", count, rows), carried.read("float", count, rows)
    step, factor = scale.read("float", rows), feedback.read("float", count, count, stride=stride)
    high = (1 << (bits - 1)) - 1
    integers = np.empty_like(w)
    for k in range(count):
        integers[k] = np.clip(np.rint((w[k] + sums[k]) / step), -high - 1, high)
        sums[k] = w[k] - integers[k] * step
        sums[k + 1 :] += factor[k, k + 1 :, None] * sums[k]
    carried.write("float", sums)
    quantized.write("signed char", integers)


COMPENSATE = Kernel(
    "compensate.cu",
    "compensate",
    "int COLUMNS",
    "const float* columns, const float* scale, const float* feedback, float* carried, signed char* quantized, int rows, "
    "int count, int stride, int bits",
    reference,
    waits=False,
)


def compensate(rows: int) -> Instance:
    """Up to COLUMNS columns of a weight with so many rows."""
    return COMPENSATE.instance(Shape((-(-rows // 128), 1, 1), 128), COLUMNS=COLUMNS)
