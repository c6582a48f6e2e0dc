"""Integer GEMM for large M by wgmma: gemm_wgmma.cu, and what both kernels with wgmma have in common (gemm_wgmma.cuh)."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from duq.plugins.kernel import Instance, Kernel, Shape
from duq.plugins.kernels.gemm import PARAMETERS, make_reference, staged_bytes, warp_staging_bytes
from duq.plugins.kernels.reference import Launched, Memory, Pointer, write_heads

LAYOUT = "wgmma"  # of the weight


def _check(launch: Launched, tokens: int, rows: int, workspace: Pointer | None) -> None:
    tile_rows, tile_tokens, split = 64 * launch.number("GROUPS"), 8 * launch.number("TOKENS8"), launch.number("SPLIT")
    assert rows % tile_rows == 0 and launch.split == split
    if split > 1:  # without a split, blocks are persistent
        assert launch.grid[0] == rows // tile_rows * -(-tokens // tile_tokens) * split


_without_rotary = make_reference(LAYOUT, _check)


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
    k: Pointer | None,
    v: Pointer | None,
    cosine: Pointer | None,
    sine: Pointer | None,
    past: Pointer | None,
    kv_stride: int,
    first_position: int,
    to_cache: int,
) -> None:
    operands = x_q, x_scale, weight, weight_scale, bias, residual
    others = workspace, tokens, rows, depth, normed, normed_gain, normed_squares
    if launch["EPILOGUE"] != "ROTARY":
        _without_rotary(launch, *operands, y, *others)
        return
    assert launch.number("SPLIT") == 1 and launch["Out"] == "Bf16" and residual is None
    qkv = Pointer(Memory(np.zeros(2 * tokens * rows, np.uint8)))
    _without_rotary(replace(launch, template={**launch.template, "EPILOGUE": "NONE"}), *operands, qkv, *others)
    heads = qkv.read("Bf16", tokens, rows)  # rounded, as in front of a rotary.cu
    write_heads(heads, "Bf16", y, k, v, cosine, sine, past, rows, kv_stride, first_position, to_cache)


GEMM_WGMMA = Kernel(
    "gemm_wgmma.cu",
    "gemm_wgmma",
    "int BITS, int GROUPS, int TOKENS8, int STAGES, int SPLIT, int EPILOGUE, class Out",
    f"""{PARAMETERS}, Out* k?, Out* v?, const float* cosine?, const float* sine?, const int* past?, int kv_stride,
    int first_position, int to_cache""",
    reference,
)


@dataclass(frozen=True)
class Wgmma:
    """A tactic: persistent thread blocks of `groups` warpgroups, or `split` blocks, a cluster, for each tile."""

    groups: int
    tokens8: int
    stages: int
    split: int = 1

    layout: ClassVar[str] = LAYOUT
    needs_wgmma: ClassVar[bool] = True

    @property
    def tile_tokens(self) -> int:
        return 8 * self.tokens8

    @property
    def tile_rows(self) -> int:
        return 64 * self.groups

    @property
    def slab_tokens(self) -> int:
        """The activations come in slabs, padded to a multiple of this (plugins.layout.activation_slabs)."""
        return self.tile_tokens

    @property
    def has_rotary(self) -> bool:
        """Whether there is an epilogue ROTARY, for y in bf16."""
        return self.split == 1

    def divides(self, n: int, k: int) -> bool:
        return n % self.tile_rows == 0 and k % 128 == 0 and k // 128 >= self.split

    def shape(self, m: int, n: int, bits: int) -> Shape:
        tiles = -(-m // self.tile_tokens) * (n // self.tile_rows)
        threads = 160 if self.groups == 1 else 128 * self.groups + 128
        ring, warps = self.stages * (self.tile_tokens * 128 + 64 * self.groups * 16 * bits), 4 * self.groups
        if self.split == 1:
            return Shape((tiles, 1, 1), threads, ring + warps * warp_staging_bytes(1), a_multiprocessor=1)
        groups = -(-self.tokens8 // self.split)  # of 8 tokens, that a block finishes
        accumulators = warps * (groups * self.split * 512 + staged_bytes(8 * groups, 16))
        return Shape((tiles * self.split, 1, 1), threads, max(ring, accumulators), (self.split, 1, 1))

    def instance(self, m: int, n: int, bits: int, out: str, epilogue: str = "NONE") -> Instance:
        """For y [m, n] of the C++ type `out`, a weight of `bits`; epilogue: NONE, GELU, GEGLU or, if there is one, ROTARY."""
        return GEMM_WGMMA.instance(
            self.shape(m, n, bits),
            {"wgmma.cuh": wgmma_header(self.tokens8)},
            BITS=bits,
            GROUPS=self.groups,
            TOKENS8=self.tokens8,
            STAGES=self.stages,
            SPLIT=self.split,
            EPILOGUE=epilogue,
            Out=out,
        )


@functools.cache
def wgmma_header(tokens8: int) -> str:
    """The wgmma of 64 rows x 8 `tokens8` tokens: one assembler operand an accumulator, which no template can spell."""
    count = 4 * tokens8
    accumulators = ", ".join(f"%{index}" for index in range(count))
    operands = ", ".join(f'"+r"(d[{index // 4}][{index % 4}])' for index in range(count))
    a = ", ".join(f"%{count + index}" for index in range(4))
    return f"""#pragma once
__device__ inline void wgmma(int (&d)[{tokens8}][4], const unsigned (&a)[4], unsigned long long b) {{
  asm volatile("{{.reg .pred add;\\nsetp.eq.u32 add, 0, 0;\\n"
               "wgmma.mma_async.sync.aligned.m64n{8 * tokens8}k32.s32.s8.s8 "
               "{{{accumulators}}}, {{{a}}}, %{count + 4}, add;}}"
               : {operands}
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}}
"""
