"""The tile shapes of the CUDA GEMMs: which kernel, with which template parameters, for which (M, N, K, bits, SM).

All GEMM kernels take the same arguments and compute the same integers; a tactic is one of them with its parameters.
`candidates` lists what is worth timing for a problem, `best` chooses: from the table of what was timed where it has the
problem or a similar one, else the first candidate.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from duq.plugins.driver import Shape
from duq.plugins.errors import KernelError

MULTIPROCESSORS = 132  # of an H100 or H200; more thread blocks than run at once, or fewer, are slower but right
MAX_SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
FLOAT_CHUNK = 64  # of K, that a warp of gemm_float.cu takes at a time
EPILOGUE_CHANNELS = 256  # of K, that take about as long as the epilogue of a tile
FEW_TOKENS = 64  # up to here a GEMM is bound by its weights and by latency
TABLE = Path(__file__).parent / "tactics_sm90.json"


def _staged_bytes(tokens: int, rows: int) -> int:
    """Shared memory through which sums become rows of y (common.cuh, pitch)."""
    return tokens * (rows + 4) * 4


def _warp_staging_bytes(rows16: int) -> int:
    return _staged_bytes(8 * max(1, 4 // rows16), 16 * rows16)  # common.cuh, staging_words


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

    @property
    def tile_tokens(self) -> int:
        return 8 * self.tokens8

    @property
    def tile_rows(self) -> int:
        return 16 * self.rows16

    def expression(self, bits: int, out: str, finish: str = "NONE") -> str:
        parameters = f"{self.rows16}, {self.tokens8}, {self.warps}, {self.stages}"
        return f"gemm_small<{bits}, {parameters}, {finish}, {out}>"

    def headers(self) -> Mapping[str, str]:
        return {}

    def shape(self, m: int, n: int, bits: int) -> Shape:
        grid = (n // self.tile_rows, self.split, -(-m // self.tile_tokens))
        shared_bytes = self.warps * _staged_bytes(self.tile_tokens, self.tile_rows)
        return Shape(grid, 32 * self.warps, shared_bytes, (1, self.split, 1))

    def divides(self, n: int, k: int) -> bool:
        return n % self.tile_rows == 0 and k % 64 == 0 and k // 64 >= self.split * self.warps


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
    split: ClassVar[int] = 1

    @property
    def tile_tokens(self) -> int:
        return 8 * self.tokens8 * self.warps_m

    @property
    def tile_rows(self) -> int:
        return 16 * self.rows16 * self.warps_n

    def expression(self, bits: int, out: str, finish: str = "NONE") -> str:
        parameters = f"{self.rows16}, {self.tokens8}, {self.warps_n}, {self.warps_m}, {self.stages}"
        return f"gemm_large<{bits}, {parameters}, {finish}, {out}>"

    def headers(self) -> Mapping[str, str]:
        return {}

    def shape(self, m: int, n: int, bits: int) -> Shape:
        warps = self.warps_n * self.warps_m
        ring = self.stages * (self.tile_tokens * 128 + self.tile_rows * 16 * bits)
        shared_bytes = max(ring, warps * _warp_staging_bytes(self.rows16))
        return Shape((-(-m // self.tile_tokens), n // self.tile_rows, 1), 32 * warps, shared_bytes)

    def divides(self, n: int, k: int) -> bool:
        return n % self.tile_rows == 0 and k % 128 == 0


class _ByWgmma:
    """What the kernels with wgmma have in common: how their operands lie."""

    layout: ClassVar[str] = "wgmma"

    @property
    def tile_tokens(self) -> int:
        return 8 * self.tokens8

    @property
    def slab_tokens(self) -> int:
        """The activations come in slabs, padded to a multiple of this (plugins.layout.activation_slabs)."""
        return self.tile_tokens

    def headers(self) -> Mapping[str, str]:
        return {"wgmma.cuh": wgmma_header(self.tokens8)}


@dataclass(frozen=True)
class Wgmma(_ByWgmma):
    """gemm_wgmma.cu: SM 90; persistent thread blocks, or `split` of them for each tile."""

    groups: int
    tokens8: int
    stages: int
    split: int = 1

    source: ClassVar[str] = "gemm_wgmma.cu"

    @property
    def tile_rows(self) -> int:
        return 64 * self.groups

    def expression(self, bits: int, out: str, finish: str = "NONE") -> str:
        parameters = f"{self.groups}, {self.tokens8}, {self.stages}, {self.split}"
        return f"gemm_wgmma<{bits}, {parameters}, {finish}, {out}>"

    def shape(self, m: int, n: int, bits: int) -> Shape:
        tiles = -(-m // self.tile_tokens) * (n // self.tile_rows)
        blocks = min(tiles, MULTIPROCESSORS) if self.split == 1 else tiles * self.split
        threads = 160 if self.groups == 1 else 128 * self.groups + 128
        ring, warps = self.stages * (self.tile_tokens * 128 + 64 * self.groups * 16 * bits), 4 * self.groups
        if self.split == 1:
            return Shape((blocks, 1, 1), threads, ring + warps * _warp_staging_bytes(1))
        groups = -(-self.tokens8 // self.split)  # of 8 tokens, that a block finishes
        sums = warps * (groups * self.split * 512 + _staged_bytes(8 * groups, 16))
        return Shape((blocks, 1, 1), threads, max(ring, sums), (self.split, 1, 1))

    def divides(self, n: int, k: int) -> bool:
        return n % self.tile_rows == 0 and k % 128 == 0 and k // 128 >= self.split


@dataclass(frozen=True)
class WgmmaFew(_ByWgmma):
    """gemm_wgmma_few.cu: SM 90, few tokens; `groups` warpgroups of a thread block and `split` blocks share K."""

    tokens8: int
    stages: int
    groups: int
    split: int = 1

    source: ClassVar[str] = "gemm_wgmma_few.cu"
    tile_rows: ClassVar[int] = 64

    def expression(self, bits: int, out: str, finish: str = "NONE") -> str:
        parameters = f"{self.tokens8}, {self.stages}, {self.groups}, {self.split}"
        return f"gemm_wgmma_few<{bits}, {parameters}, {finish}, {out}>"

    def shape(self, m: int, n: int, bits: int) -> Shape:
        grid = (n // 64 * self.split, -(-m // self.tile_tokens), 1)
        holders, warps = self.groups * self.split, 4 * self.groups
        finished = -(-self.tokens8 // holders)  # groups of 8 tokens, of a warpgroup
        sums = warps * ((holders > 1) * finished * holders * 512 + _staged_bytes(8 * finished, 16))
        ring = self.stages * (self.tile_tokens * 128 + 64 * 16 * bits)
        return Shape(grid, 128 * self.groups + 32, ring + sums, (self.split, 1, 1))

    def divides(self, n: int, k: int) -> bool:
        return n % 64 == 0 and k % 128 == 0 and k // 128 >= self.split


Tactic = Small | Large | Wgmma | WgmmaFew


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


_SMALL_TILES = [(2, 8, 2), (2, 8, 1), (1, 8, 2), (1, 8, 4), (1, 4, 4), (2, 4, 2), (2, 4, 4), (4, 4, 2), (4, 8, 1)]
_SMALL: list[Tactic] = [
    Small(rows16, tokens8, warps, stages, split)
    for rows16, warps, stages in _SMALL_TILES
    for tokens8 in (7, 8)
    for split in (1, 2, 4, 8)
]
_SMALL_WGMMA: list[Tactic] = [
    WgmmaFew(8, stages, groups, split) for stages in (4, 6, 8) for groups in (1, 2) for split in (1, 2, 4, 8)
]
_ANY_SIZE: list[Tactic] = [Small(1, 8, warps, 2) for warps in (4, 2, 1)]  # N in multiples of 16, K of 64
_WGMMA_TILES = [(26, 5), (26, 4), (24, 5), (20, 6), (20, 4), (18, 6), (16, 7), (14, 7), (12, 8)]
_WGMMA: list[Tactic] = [
    *(Wgmma(2, tokens8, stages) for tokens8, stages in _WGMMA_TILES),
    *(Wgmma(1, tokens8, stages) for tokens8, stages in [(26, 6), (24, 7), (20, 8), (20, 7), (16, 10)]),
    *(Wgmma(groups, tokens8, 5, split) for groups in (1, 2) for tokens8 in (20, 24, 26) for split in (2, 4)),
]
_LARGE_TILES = [(4, 8, 4, 2), (2, 13, 4, 2), (4, 8, 2, 2), (2, 10, 4, 2), (2, 13, 2, 2), (2, 8, 4, 2)]
_LARGE: list[Tactic] = [Large(*tile, stages) for tile in _LARGE_TILES for stages in (4, 3)]


def fits(tactic: Tactic, m: int, n: int, k: int, bits: int, sm: int) -> bool:
    """Whether the tactic computes this problem on this SM at all."""
    if isinstance(tactic, _ByWgmma) and sm != 90:
        return False
    return tactic.divides(n, k) and tactic.shape(m, n, bits).shared_bytes <= MAX_SHARED_BYTES[sm]


def candidates(m: int, n: int, k: int, bits: int, sm: int, slab_tokens: int | None = None) -> list[Tactic]:
    """The tactics worth timing for y[m, n] = x[m, k] w[n, k]^T on an SM, perhaps only those that read such slabs.

    Of few tokens, those that suit the GPU's size; for a small policy, which none does, all, those with the most blocks
    first. Of many tokens, those first whose busiest multiprocessor has the least to do. Sizes that the usual tiles do not
    divide have tiles of their own: slow for many tokens, but there.
    """

    def usable(tactics: list[Tactic]) -> list[Tactic]:
        return [t for t in tactics if fits(t, m, n, k, bits, sm) and slab_tokens in (None, t.slab_tokens)]

    fitting = usable(_SMALL + _SMALL_WGMMA if m <= FEW_TOKENS else _WGMMA + _LARGE) or usable(_ANY_SIZE)
    padded = {tactic: -(-m // tactic.tile_tokens) * tactic.tile_tokens for tactic in fitting}
    least = min(padded.values(), default=0)
    fitting = [tactic for tactic in fitting if padded[tactic] <= 1.15 * least]
    spread_well = [tactic for tactic in fitting if _spread_well(tactic, m, n, bits)]
    if m > FEW_TOKENS:
        return sorted(spread_well or fitting, key=lambda tactic: _most_work(tactic, m, n, k))
    return spread_well or sorted(fitting, key=lambda tactic: -math.prod(tactic.shape(m, n, bits).grid))


def _spread_well(tactic: Tactic, m: int, n: int, bits: int) -> bool:
    """Splitting K is for problems with few tiles; and few tokens want about as many blocks as multiprocessors."""
    x, y, z = tactic.shape(m, n, bits).grid
    if isinstance(tactic, Small):
        return 64 <= x * y * z <= 2.2 * MULTIPROCESSORS
    return tactic.split == 1 or x * y * z <= 1.25 * MULTIPROCESSORS


def _most_work(tactic: Tactic, m: int, n: int, k: int) -> float:
    """Products that the busiest multiprocessor has to compute, its tiles in full; mma.sync multiplies half as fast as wgmma.
    Of the timed sizes (TABLE) of many tokens, the least of it is the fastest in three of four."""
    tiles = -(-m // tactic.tile_tokens) * (n // tactic.tile_rows)
    turns = -(-tiles * tactic.split // MULTIPROCESSORS)
    each = tactic.tile_tokens * tactic.tile_rows * (k / tactic.split + EPILOGUE_CHANNELS)
    return turns * each * (1 if tactic.layout == "wgmma" else 2)


def best(m: int, n: int, k: int, bits: int, sm: int, slab_tokens: int | None = None) -> Tactic:
    """The tactic to use where nothing is timed: that of the nearest M in the table, else the first candidate.

    slab_tokens: of the slabs that the activations lie in, 0 for rows, where another product has settled it.
    Raises KernelError when no tactic fits.
    """
    fitting = candidates(m, n, k, bits, sm, slab_tokens)
    if not fitting:
        shared = f" for activations in slabs of {slab_tokens} tokens" if slab_tokens else ""
        raise KernelError(f"no GEMM kernel for M, N, K = {m}, {n}, {k} at {bits} bits on SM {sm}{shared}")
    timed = [(abs(m - at), tactic) for at, tactic in _timed().get((n, k, bits), []) if tactic in fitting]
    return min(timed, key=lambda entry: entry[0])[1] if timed else fitting[0]


@functools.cache
def _timed() -> dict[tuple[int, int, int], list[tuple[int, Tactic]]]:
    """(N, K, bits) -> [(M, the fastest tactic)], as benchmarks/gemm_integer.py --table wrote it on an H100."""
    table: dict[tuple[int, int, int], list[tuple[int, Tactic]]] = {}
    for row in json.loads(TABLE.read_text()):
        tactic = {kind.__name__: kind for kind in (Small, Large, Wgmma, WgmmaFew)}[row["kernel"]](*row["parameters"])
        table.setdefault((row["n"], row["k"], row["bits"]), []).append((row["m"], tactic))
    return table


@dataclass(frozen=True)
class Float:
    """gemm_float.cu: a bf16 or INT4 weight, float activations and few tokens; `split` thread blocks share K."""

    rows16: int
    tokens8: int
    warps: int
    stages: int
    split: int = 1

    source: ClassVar[str] = "gemm_float.cu"

    @property
    def tile_tokens(self) -> int:
        return 8 * self.tokens8

    def expression(self, out_type: str, norm: bool = False, finish: str = "NONE", bits: int = 16) -> str:
        """The instance for the C++ type "float" or "Bf16", `finish` NONE, SILU, GEGLU or ROTARY, weights of `bits`."""
        parameters = f"{self.rows16}, {self.tokens8}, {self.warps}, {self.stages}, {self.split}"
        return f"gemm_float<{parameters}, {str(norm).lower()}, {finish}, {out_type}, {bits}>"

    def headers(self) -> Mapping[str, str]:
        return {}

    def shape(self, m: int, n: int) -> Shape:
        grid = (n // (16 * self.rows16), self.split, -(-m // self.tile_tokens))
        ring, sums = self.stages * self.tile_tokens * FLOAT_CHUNK * 2, _staged_bytes(self.tile_tokens, 16 * self.rows16)
        received = self.split * -(-self.tile_tokens // self.split) if self.split > 1 else 0
        shared_bytes = self.warps * max(ring, sums) + _staged_bytes(received, 16 * self.rows16)
        return Shape(grid, 32 * self.warps, shared_bytes, (1, self.split, 1))

    def divides(self, n: int, k: int) -> bool:
        return n % (16 * self.rows16) == 0 and k % 16 == 0


_FLOAT_TILES = [(4, 4, 1), (2, 4, 1), (2, 8, 1), (2, 8, 2), (1, 8, 1), (1, 8, 2), (1, 4, 1)]  # rows16, warps, stages
_FLOAT_SPLITS = (1, 2, 3, 4, 8)


def float_candidates(m: int, n: int, k: int, sm: int) -> list[Float]:
    """The tactics worth timing for a bf16 weight [n, k] and m <= FEW_TOKENS tokens, the likeliest first.

    Every block reads all tokens, so as many rows a block as can be while there are blocks for the multiprocessors;
    splitting K over a cluster makes them more.
    """
    fitting = [
        tactic
        for rows16, warps, stages in _FLOAT_TILES
        for split in (_FLOAT_SPLITS if sm == 90 else (1,))
        if (tactic := Float(rows16, -(-m // 8), warps, stages, split)).divides(n, k)
        and tactic.shape(m, n).shared_bytes <= MAX_SHARED_BYTES[sm]
    ]
    busy = [t for t in fitting if t.split * t.warps * FLOAT_CHUNK <= k]
    spread = [t for t in busy if 64 <= n // (16 * t.rows16) * t.split <= 2.2 * MULTIPROCESSORS]
    return spread or fitting


# (N, K) -> rows16, warps, stages, split: the fastest on an H100 for 50 tokens, overlapped with the kernels around it
# (benchmarks/gemm_float.py).
_FLOAT_TIMED = {
    (2560, 1024): (2, 8, 2, 1),
    (1024, 2048): (1, 8, 2, 2),
    (1024, 1024): (1, 8, 1, 2),
    (8192, 1024): (4, 4, 1, 2),
    (1024, 4096): (2, 4, 1, 8),
}


def best_float(m: int, n: int, k: int, sm: int) -> Float:
    """The tactic for a bf16 weight [n, k] and m <= FEW_TOKENS tokens. Raises KernelError when none fits.

    What was timed; else the most rows a block, and of its splits the smallest with a block for every multiprocessor.
    """
    candidates = float_candidates(m, n, k, sm) if m <= FEW_TOKENS else []
    if not candidates:
        raise KernelError(f"no float GEMM kernel for M, N, K = {m}, {n}, {k} on SM {sm}")
    timed = [t for t in candidates if (t.rows16, t.warps, t.stages, t.split) == _FLOAT_TIMED.get((n, k))]
    if timed:
        return timed[0]
    blocks = {t: n // (16 * t.rows16) * t.split for t in candidates if t.rows16 == candidates[0].rows16}
    return next((t for t in blocks if blocks[t] > MULTIPROCESSORS), max(blocks, key=blocks.get))
