"""INT32 accumulators of a quantized linear to its y: epilogue.cu."""

from __future__ import annotations

import numpy as np

from duq.plugins.kernel import Instance, Kernel, Shape
from duq.plugins.kernels.reference import Launched, Pointer, affine, gelu, rotate_blocks

CHUNK = 1024  # columns of a thread block


def reference(
    launch: Launched,
    acc: Pointer,
    x_scale: Pointer,
    weight_scale: Pointer,
    rotation: Pointer | None,
    bias: Pointer | None,
    gate: Pointer | None,
    residual: Pointer | None,
    y: Pointer,
    rows: int,
    scale_stride: int,
    block: int,
) -> None:
    activation, m = launch["EPILOGUE"], launch.grid[1]
    columns = rows // 2 if activation == "GEGLU" else rows
    assert launch.grid[0] * CHUNK >= columns and columns % 4 == 0
    assert (launch["ROTATE"] == "true") == (rotation is not None)
    scale = x_scale.read("float", m if scale_stride else 1)[:, None]
    v = (acc.read("int", m, rows).astype(np.float32) * weight_scale.read("float", rows)) * scale
    if rotation is not None:
        assert columns % block == 0
        v = rotate_blocks(v, rotation, block)
    v = affine(affine(v, None, bias), gate)
    if activation == "GEGLU":
        v = gelu(v[:, :columns]) * v[:, columns:]
    elif activation == "GELU":
        v = gelu(v)
    y.write(launch["Out"], v if residual is None else v + residual.read(launch["Out"], m, columns))


EPILOGUE = Kernel(
    "epilogue.cu",
    "epilogue",
    "class Out, bool ROTATE, int EPILOGUE",
    """const int* acc, const float* x_scale, const float* weight_scale, const float* rotation?, const float* bias?,
    const float* gate?, const Out* residual?, Out* y, int rows, int scale_stride, int block""",
    reference,
)


def epilogue(tokens: int, columns: int, out_type: str, rotate: bool, activation: str = "NONE") -> Instance:
    """Accumulators to `columns` (a multiple of 4) of y, by a launch behind a GEMM that left them (`out` "int").

    rotate: with a dense rotation behind the scales. activation: NONE, GELU or GEGLU (of twice as many accumulators).
    """
    shape = Shape((-(-columns // CHUNK), tokens, 1), CHUNK // 4)
    return EPILOGUE.instance(shape, Out=out_type, ROTATE=rotate, EPILOGUE=activation)
