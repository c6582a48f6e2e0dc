"""What the integer GEMMs have in common: parameters, the layouts of their operands, the epilogue (common.cuh).

All take the same arguments and compute the same integers, y[M, N] = epilogue(x_q[M, K] w[N, K]^T).
"""

from __future__ import annotations

import numpy as np

from duq.plugins.kernels.reference import ACTIVATIONS, Launched, Pointer, affine, leave_for_norm

PARAMETERS = """const signed char* x_q, const float* x_scale?, const unsigned char* weight, const float* weight_scale?,
    const float* bias?, const Out* residual?, Out* y, int* workspace?, int tokens, int rows, int depth, Bf16* normed?,
    const float* normed_gain?, float* normed_squares?"""
"""M, N, K are tokens, rows, depth. The scales may be null where Out is int: then y is the accumulators.

workspace: for blocks that share K on a GPU without clusters. normed...: what is left for a norm of y (common.cuh, ForNorm).
"""


def staged_bytes(tokens: int, rows: int) -> int:
    """Shared memory through which accumulators become rows of y (common.cuh, pitch)."""
    return tokens * (rows + 4) * 4


def warp_staging_bytes(rows16: int) -> int:
    """The same for one warp (common.cuh, staging_words)."""
    return staged_bytes(8 * max(1, 4 // rows16), 16 * rows16)


def read_slabs(x_q: Pointer, tokens: int, padded: int, depth: int) -> np.ndarray:
    """INT8 activations [tokens, depth] from slabs of `padded` tokens (plugins.layout.activation_slabs)."""
    pieces = x_q.read("signed char", depth // 128, padded, 8, 16)
    token = np.arange(tokens)[:, None]
    return pieces[:, token, np.arange(8) ^ token % 8].transpose(1, 0, 2, 3).reshape(tokens, depth)


def multiply(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x [M, K] weight[N, K]^T of integers, int32."""
    return (x.astype(np.float64) @ weight.astype(np.float64).T).astype(np.int32)  # exact: below 2^53


def finish(
    launch: Launched,
    acc: np.ndarray,
    x_scale: Pointer | None,
    weight_scale: Pointer | None,
    bias: Pointer | None,
    residual: Pointer | None,
    y: Pointer,
    normed: Pointer | None,
    normed_gain: Pointer | None,
    normed_squares: Pointer | None,
) -> None:
    """The epilogue: accumulators, int32 [M, N], to y and to what a norm asks for."""
    activation, out_type, (m, n) = launch["EPILOGUE"], launch["Out"], acc.shape
    assert activation == "NONE" or (residual is None and out_type != "int")
    if out_type == "int":
        y.write("int", acc)
        return
    assert x_scale is not None and weight_scale is not None
    v = (acc.astype(np.float32) * weight_scale.read("float", n)) * x_scale.read("float", m)[:, None]
    v = affine(v, None, bias)
    v = ACTIVATIONS[activation](v)
    v = v if residual is None else v + residual.read(out_type, m, n)
    y.write(out_type, v)
    leave_for_norm(v, normed, normed_gain, normed_squares)
