"""Float GEMM for small M, a bf16 or INT4 weight, with the norm in front and the epilogue behind: gemm_float.cu."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from duq.plugins.kernel import Instance, Kernel, Shape
from duq.plugins.kernels.gemm import staged_bytes
from duq.plugins.kernels.reference import (
    ACTIVATIONS,
    Launched,
    Pointer,
    affine,
    from_bf16,
    leave_for_norm,
    padded,
    write_heads,
)
from duq.plugins.layout import unpack_float_fragments, unpack_int4_fragments

FLOAT_CHUNK = 64  # of K, that a warp takes at a time


def reference(
    launch: Launched,
    x: Pointer,
    squares: Pointer | None,
    weight: Pointer,
    channel_scale: Pointer | None,
    bias: Pointer | None,
    residual: Pointer | None,
    y: Pointer,
    k: Pointer | None,
    v: Pointer | None,
    cosine: Pointer | None,
    sine: Pointer | None,
    past: Pointer | None,
    tokens: int,
    rows: int,
    depth: int,
    y_stride: int,
    kv_stride: int,
    first_position: int,
    to_cache: int,
    epsilon: float,
    normed: Pointer | None,
    normed_gain: Pointer | None,
    normed_squares: Pointer | None,
    partial: Pointer | None,
    counters: Pointer | None,
) -> None:
    tile_rows, tile_tokens, split = 16 * launch.number("ROWS16"), 8 * launch.number("TOKENS8"), launch.number("SPLIT")
    assert launch.grid == (rows // tile_rows, split, -(-tokens // tile_tokens))
    if split != launch.split:  # the blocks are no cluster: they meet in memory
        assert partial is not None and counters is not None
        groups = launch.grid[0] * launch.grid[2]
        assert not counters.read("int", groups).any(), "the counters are zero ahead of a launch"
        partial.write("float", np.full(groups * split * tile_tokens * tile_rows, np.nan, np.float32))
    acc = x.read("Bf16", tokens, depth) @ _weight(weight, rows, depth, launch.number("BITS")).T
    if launch["NORM"] == "true":
        assert squares is not None
        mean = squares.read("float", tokens, depth // 16).sum(-1, keepdims=True) / np.float32(depth)
        acc = acc / np.sqrt(mean + np.float32(epsilon))
    acc = affine(acc, channel_scale, bias)
    epilogue, out_type = launch["EPILOGUE"], launch["Out"]
    if epilogue == "ROTARY":
        strides = y_stride, kv_stride
        write_heads(acc, out_type, y, k, v, cosine, sine, past, *strides, first_position, to_cache)
        return
    if epilogue == "NONE" and residual is not None:
        acc = acc + residual.read("float", tokens, rows, stride=y_stride)
    values = ACTIVATIONS[epilogue](acc)
    y.write(out_type, values, y_stride)
    if (epilogue, out_type) == ("NONE", "float"):
        leave_for_norm(values, normed, normed_gain, normed_squares)


def _weight(weight: Pointer, rows: int, depth: int, bits: int) -> np.ndarray:
    if bits == 4:
        packed = weight.read("unsigned char", rows * padded(depth, FLOAT_CHUNK) // 2)
        return unpack_int4_fragments(packed, (rows, depth)).astype(np.float32)
    return from_bf16(unpack_float_fragments(weight.read("unsigned char", 2 * rows * depth), (rows, depth)))


GEMM_FLOAT = Kernel(
    "gemm_float.cu",
    "gemm_float",
    """int ROWS16, int TOKENS8, int WARPS, int STAGES, int SPLIT, bool NORM, int EPILOGUE, class Out, int BITS""",
    """const Bf16* x, const float* squares?, const uint4* weight, const float* channel_scale?, const float* bias?,
    const float* residual?, Out* y, Out* k?, Out* v?, const float* cosine?, const float* sine?, const int* past?,
    int tokens, int rows, int depth, int y_stride, int kv_stride, int first_position, int to_cache, float epsilon,
    Bf16* normed?, const float* normed_gain?, float* normed_squares?, float* partial?, int* counters?""",
    reference,
)


@dataclass(frozen=True)
class GemmFloat:
    """A tactic: `warps` of a thread block, and `split` blocks, share K. The blocks are a cluster, or meet in memory."""

    rows16: int
    tokens8: int
    warps: int
    stages: int
    split: int = 1

    @property
    def tile_tokens(self) -> int:
        return 8 * self.tokens8

    @property
    def tile_rows(self) -> int:
        return 16 * self.rows16

    def divides(self, n: int, k: int) -> bool:
        return n % self.tile_rows == 0 and k % 16 == 0

    def shape(self, m: int, n: int) -> Shape:
        grid = (n // self.tile_rows, self.split, -(-m // self.tile_tokens))
        ring, staged = self.stages * self.tile_tokens * FLOAT_CHUNK * 2, staged_bytes(self.tile_tokens, self.tile_rows)
        received = self.split * -(-self.tile_tokens // self.split) if self.split > 1 else 0
        shared_bytes = self.warps * max(ring, staged) + staged_bytes(received, self.tile_rows)
        return Shape(grid, 32 * self.warps, shared_bytes, (1, self.split, 1))

    def groups(self, m: int, n: int) -> int:
        """Counters of blocks that meet in memory, int32, zero before and after a launch."""
        return math.prod(self.shape(m, n).grid) // self.split

    def partial_words(self, m: int, n: int) -> int:
        """Float32 numbers that such blocks leave for each other."""
        return math.prod(self.shape(m, n).grid) * self.tile_tokens * self.tile_rows

    def instance(self, m: int, n: int, out: str, norm: bool, epilogue: str, bits: int = 16) -> Instance:
        """For y [m, n] of the C++ type `out` ("float" or "Bf16") and weights of `bits`, with the norm in front or without;
        epilogue: NONE, SILU, GEGLU or ROTARY."""
        return GEMM_FLOAT.instance(
            self.shape(m, n),
            ROWS16=self.rows16,
            TOKENS8=self.tokens8,
            WARPS=self.warps,
            STAGES=self.stages,
            SPLIT=self.split,
            NORM=norm,
            EPILOGUE=epilogue,
            Out=out,
            BITS=bits,
        )
