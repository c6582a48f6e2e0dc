"""What the integer GEMMs have in common: parameters, the layouts of their operands, the epilogue (common.cuh).

All take the same arguments and compute the same integers, y[M, N] = epilogue(x_q[M, K] w[N, K]^T).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from duq.plugins.kernels.reference import ACTIVATIONS, Launched, Pointer, affine, leave_for_norm, padded
from duq.plugins.layout import unpack_fragments

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


def make_reference(layout: str, check: Callable[[Launched, int, int, Pointer | None], None]) -> Callable[..., None]:
    """The reference of the kernel whose weights are in `layout`; "wgmma" ones take their activations in slabs.

    check: asserts, of a launch, M, N and the workspace, that the grid covers all of y.
    """

    def reference(
        launch: Launched,
        x_q: Pointer,
        x_scale: Pointer | None,
        weight: Pointer,
        weight_scale: Pointer | None,
        bias: Pointer | None,
        residual: Pointer | None,
        y: Pointer,
        workspace: Pointer | None,
        tokens: int,
        rows: int,
        depth: int,
        normed: Pointer | None,
        normed_gain: Pointer | None,
        normed_squares: Pointer | None,
    ) -> None:
        check(launch, tokens, rows, workspace)
        bits, tile_tokens = launch.number("BITS"), 8 * launch.number("TOKENS8")
        w = unpack_fragments(weight.read("unsigned char", rows * depth * bits // 8), (rows, depth), bits, layout)
        if layout == "wgmma":
            x = _read_slabs(x_q, tokens, padded(tokens, tile_tokens), depth)
        else:
            x = x_q.read("signed char", tokens, depth)
        acc = (x.astype(np.float64) @ w.astype(np.float64).T).astype(np.int32)  # exact: below 2^53
        activation, out_type = launch["EPILOGUE"], launch["Out"]
        assert activation == "NONE" or (residual is None and out_type != "int")
        if out_type == "int":
            y.write("int", acc)
            return
        assert x_scale is not None and weight_scale is not None
        v = (acc.astype(np.float32) * weight_scale.read("float", rows)) * x_scale.read("float", tokens)[:, None]
        v = ACTIVATIONS[activation](affine(v, None, bias))
        v = v if residual is None else v + residual.read(out_type, tokens, rows)
        y.write(out_type, v)
        leave_for_norm(v, normed, normed_gain, normed_squares)

    return reference


def _read_slabs(x_q: Pointer, tokens: int, padded_tokens: int, depth: int) -> np.ndarray:
    """INT8 activations [tokens, depth] from slabs of `padded_tokens` (plugins.layout.activation_slabs)."""
    pieces = x_q.read("signed char", depth // 128, padded_tokens, 8, 16)
    token = np.arange(tokens)[:, None]
    return pieces[:, token, np.arange(8) ^ token % 8].transpose(1, 0, 2, 3).reshape(tokens, depth)
