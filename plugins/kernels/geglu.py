"""gelu(gate) * up of a GEMM's output: geglu.cu."""

from __future__ import annotations

import numpy as np

from duq.plugins.kernel import Instance, Kernel, Shape
from duq.plugins.kernels.reference import Launched, Pointer, gelu


def reference(launch: Launched, x: Pointer, y: Pointer, width: int) -> None:
    m = launch.grid[1]
    assert launch.grid[0] * 8 * launch.threads >= width
    gate, up = np.split(x.read("Bf16", m, 2 * width), 2, axis=-1)
    y.write("Bf16", gelu(gate) * up)


GEGLU = Kernel("geglu.cu", "geglu", "", "const Bf16* x, Bf16* y, int width", reference)


def geglu(tokens: int, width: int) -> Instance:
    """`width` channels of gate and of up, bf16."""
    threads = 256
    return GEGLU.instance(Shape((-(-width // (8 * threads)), tokens, 1), threads))
