"""The sum of the residual stream and of parts of what is added to it, and its INT8 behind a norm: residual_quantize.cu."""

from __future__ import annotations

import numpy as np

from duq.plugins.kernel import Instance, Kernel, Shape
from duq.plugins.kernels.reference import Launched, Pointer, affine, rms_norm
from duq.plugins.kernels.rotate_quantize import rotated, write_quantized
from duq.plugins.kernels.row import row_in_registers


def reference(
    launch: Launched,
    x: Pointer,
    parts: Pointer,
    gate: Pointer | None,
    gain: Pointer | None,
    shift: Pointer | None,
    y: Pointer,
    x_q: Pointer,
    x_scale: Pointer,
    depth: int,
    slab_tokens: int,
    epsilon: float,
) -> None:
    m = launch.grid[0]
    assert 8 * launch.threads >= depth
    added = np.zeros((m, depth), np.float32)
    for part in parts.read("float", launch.number("PARTS"), m, depth):
        added += part
    v = x.read("float", m, depth) + affine(added, gate)
    y.write("float", v)
    v = rotated(affine(rms_norm(v, epsilon), gain, shift), launch["BLOCK"])
    write_quantized(v, x_q, x_scale, slab_tokens)


RESIDUAL_QUANTIZE = Kernel(
    "residual_quantize.cu",
    "residual_quantize",
    "int PARTS, int BLOCK",
    """const float* x, const float* parts, const float* gate?, const float* gain?, const float* shift?, float* y,
    signed char* x_q, float* x_scale, int depth, int slab_tokens, float epsilon""",
    reference,
)
MOST_DEPTH = 4096  # channels, 8 a thread


def residual_quantize(tokens: int, depth: int, parts: int, rotation: str | int) -> Instance:
    """`rotation` is NONE or the block size of a Hadamard; depth at most MOST_DEPTH."""
    vectors, threads = row_in_registers(depth)
    assert vectors == 1
    return RESIDUAL_QUANTIZE.instance(Shape((tokens, 1, 1), threads), PARTS=parts, BLOCK=rotation)
