"""The tile shapes of the CUDA GEMMs, and which of them suit a problem: which kernel for which (M, N, K, bits, SM).

All GEMM kernels take the same arguments and compute the same integers; a tactic is one of them with its template
parameters. The best is found by timing (tools/bench_kernels.py); `candidates` lists what is worth timing.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from plugins.driver import Shape
from plugins.errors import KernelError

MULTIPROCESSORS = 132  # of an H100 or H200; more thread blocks than run at once, or fewer, are slower but right
MAX_SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}


def _pitch(rows: int) -> int:
    return rows + 4  # common.cuh, pitch


def _staging_bytes(rows16: int) -> int:
    return max(1, 4 // rows16) * 8 * _pitch(16 * rows16) * 4  # common.cuh, staging_words


@dataclass(frozen=True)
class Small:
    """gemm_small.cu: few tokens; `split` thread blocks share K."""

    rows16: int
    tokens8: int
    warps: int
    stages: int
    split: int = 1

    source: ClassVar[str] = "gemm_small.cu"
    layout: ClassVar[str] = "direct"
    slab_tokens: ClassVar[int] = 0

    def expression(self, bits: int, out: str, geglu: bool = False) -> str:
        return f"gemm_small<{bits}, {self.rows16}, {self.tokens8}, {self.warps}, {self.stages}, {str(geglu).lower()}, {out}>"

    def headers(self) -> Mapping[str, str]:
        return {}

    def shape(self, m: int, n: int, bits: int) -> Shape:
        grid = (n // (16 * self.rows16), self.split, -(-m // (8 * self.tokens8)))
        shared = self.warps * 8 * self.tokens8 * _pitch(16 * self.rows16) * 4
        return Shape(grid, 32 * self.warps, shared, (1, self.split, 1))

    def fits(self, m: int, n: int, k: int, bits: int, sm: int) -> bool:
        return (
            n % (16 * self.rows16) == 0
            and k % 64 == 0
            and k // 64 >= self.split * self.warps
            and self.shape(m, n, bits).shared_bytes <= MAX_SHARED_BYTES[sm]
        )


@dataclass(frozen=True)
class Large:
    """gemm_large.cu: many tokens, mma.sync."""

    rows16: int
    tokens8: int
    warps_n: int
    warps_m: int
    stages: int

    source: ClassVar[str] = "gemm_large.cu"
    layout: ClassVar[str] = "direct"
    slab_tokens: ClassVar[int] = 0

    def expression(self, bits: int, out: str, geglu: bool = False) -> str:
        return (
            f"gemm_large<{bits}, {self.rows16}, {self.tokens8}, {self.warps_n}, {self.warps_m}, {self.stages}, {str(geglu).lower()}, {out}>"
        )

    def headers(self) -> Mapping[str, str]:
        return {}

    def shape(self, m: int, n: int, bits: int) -> Shape:
        tokens, rows = 8 * self.tokens8 * self.warps_m, 16 * self.rows16 * self.warps_n
        ring = self.stages * (tokens * 128 + rows * 16 * bits)
        staging = self.warps_n * self.warps_m * _staging_bytes(self.rows16)
        return Shape((-(-m // tokens), n // rows, 1), 32 * self.warps_n * self.warps_m, max(ring, staging))

    def fits(self, m: int, n: int, k: int, bits: int, sm: int) -> bool:
        rows = 16 * self.rows16 * self.warps_n
        return n % rows == 0 and k % 128 == 0 and self.shape(m, n, bits).shared_bytes <= MAX_SHARED_BYTES[sm]


@dataclass(frozen=True)
class Wgmma:
    """gemm_wgmma.cu: SM 90; persistent thread blocks, or `split` of them for each tile."""

    groups: int
    tokens8: int
    stages: int
    split: int = 1

    source: ClassVar[str] = "gemm_wgmma.cu"
    layout: ClassVar[str] = "wgmma"

    @property
    def slab_tokens(self) -> int:
        """The tokens of a tile: the activations' slabs are padded to a multiple of it."""
        return 8 * self.tokens8

    def expression(self, bits: int, out: str, geglu: bool = False) -> str:
        shape = f"{self.groups}, {self.tokens8}, {self.stages}, {self.split}"
        return f"gemm_wgmma<{bits}, {shape}, {str(geglu).lower()}, {out}>"

    def headers(self) -> Mapping[str, str]:
        return {"wgmma.cuh": wgmma_header(self.tokens8)}

    def shape(self, m: int, n: int, bits: int) -> Shape:
        tiles = -(-m // self.slab_tokens) * (n // (64 * self.groups))
        blocks = min(tiles, MULTIPROCESSORS) if self.split == 1 else tiles * self.split
        threads = 160 if self.groups == 1 else 128 * self.groups + 128
        return Shape((blocks, 1, 1), threads, self.shared_bytes(bits), (self.split, 1, 1))

    def shared_bytes(self, bits: int) -> int:
        ring = self.stages * (self.slab_tokens * 128 + 64 * self.groups * 16 * bits)
        if self.split == 1:
            return ring + 4 * self.groups * _staging_bytes(1)
        return max(ring, 4 * self.groups * self.slab_tokens * _pitch(16) * 4)

    def fits(self, m: int, n: int, k: int, bits: int, sm: int) -> bool:
        return (
            sm == 90
            and n % (64 * self.groups) == 0
            and k % 128 == 0
            and k // 128 >= self.split
            and self.shared_bytes(bits) <= MAX_SHARED_BYTES[sm]
        )


Tactic = Small | Large | Wgmma


def wgmma_header(tokens8: int) -> str:
    """The wgmma of 64 rows x 8 `tokens8` tokens: one assembler operand an accumulator, which no template can spell."""
    count = 4 * tokens8
    accumulators = ", ".join(f"%{index}" for index in range(count))
    operands = ", ".join(f'"+r"(d[{index // 4}][{index % 4}])' for index in range(count))
    a = ", ".join(f"%{count + index}" for index in range(4))
    return f"""#pragma once
__device__ inline void wgmma(int (&d)[{tokens8}][4], const unsigned (&a)[4], unsigned long long b) {{
  asm volatile("{{.reg .pred add;\\nsetp.eq.u32 add, 0, 0;\\n"
               "wgmma.mma_async.sync.aligned.m64n{8 * tokens8}k32.s32.s8.s8 {{{accumulators}}}, {{{a}}}, %{count + 4}, add;}}"
               : {operands}
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}}
"""


_SMALL = [
    Small(rows16, tokens8, warps, stages, split)
    for rows16, warps, stages in [(1, 4, 4), (1, 8, 2), (1, 8, 4), (2, 4, 2), (2, 4, 4), (2, 8, 1), (2, 8, 2), (4, 4, 2), (4, 8, 1)]
    for tokens8 in (7, 8)
    for split in (1, 2, 4, 8)
]
_LARGE = [
    Large(rows16, tokens8, warps_n, warps_m, stages)
    for rows16, tokens8, warps_n, warps_m in [(4, 8, 4, 2), (2, 13, 4, 2), (4, 8, 2, 2), (2, 10, 4, 2), (2, 13, 2, 2), (2, 8, 4, 2)]
    for stages in (3, 4)
]
_WGMMA = [
    Wgmma(groups, tokens8, stages)
    for groups, tokens8, stages in [(2, 26, 5), (2, 24, 5), (2, 20, 6), (2, 18, 6), (2, 16, 7), (2, 14, 7), (2, 12, 8)]
    + [(1, 26, 6), (1, 24, 7), (1, 20, 8), (1, 20, 7), (1, 16, 10), (2, 26, 4), (2, 20, 4)]
] + [Wgmma(groups, tokens8, 5, split) for groups in (1, 2) for tokens8 in (20, 24, 26) for split in (2, 4)]
_SMALL_WGMMA = [Wgmma(1, 8, stages, split) for stages in (4, 8) for split in (1, 2, 4, 8)]


def candidates(m: int, n: int, k: int, bits: int, sm: int) -> list[Tactic]:
    """The tactics worth timing for y[m, n] = x[m, k] w[n, k]^T on an SM, without those whose tiles mostly overhang."""
    chosen: list[Tactic] = _SMALL if m <= 64 else [*_LARGE, *_WGMMA]
    fitting = [tactic for tactic in chosen if tactic.fits(m, n, k, bits, sm)]
    if m <= 64:
        few = [t for t in fitting if t.tokens8 == (7 if m <= 56 else 8) and 64 <= t.shape(m, n, bits).grid[0] * t.split <= 288]
        return few + [t for t in _SMALL_WGMMA if t.fits(m, n, k, bits, sm)]
    waste = {tactic: -(-m // _block_tokens(tactic)) * _block_tokens(tactic) / m for tactic in fitting}
    least = min(waste.values(), default=1)
    return [t for t in fitting if waste[t] <= 1.12 * least and (t.source != Wgmma.source or t.split == 1 or t.shape(m, n, bits).grid[0] <= 160)]


def _block_tokens(tactic: Large | Wgmma) -> int:
    return 8 * tactic.tokens8 * (tactic.warps_m if isinstance(tactic, Large) else 1)


def best(m: int, n: int, k: int, bits: int, sm: int) -> Tactic:
    """The tactic to use where none was timed. Raises KernelError when no tactic fits."""
    fitting = candidates(m, n, k, bits, sm)
    if not fitting:
        raise KernelError(f"no GEMM kernel for M, N, K = {m}, {n}, {k} at {bits} bits on SM {sm}")
    return fitting[0]
