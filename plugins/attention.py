"""The tile shapes of the CUDA attention (plugins/cuda/attention.cu) and how its two kernels are launched."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from plugins.driver import Shape
from plugins.tactics import MAX_SHARED_BYTES


@dataclass(frozen=True)
class Attention:
    """One attention kernel: `heads` query heads of `dims` share a KV head; `split` thread blocks share the keys."""

    dims: int
    heads: int
    row_warps: int
    key_warps: int
    keys: int
    stages: int
    split: int = 1

    source: ClassVar[str] = "attention.cu"

    def headers(self) -> Mapping[str, str]:
        return {}

    def expression(self) -> str:
        parameters = self.dims, self.heads, self.row_warps, self.key_warps, self.keys, self.stages, self.split
        return f"attention<{', '.join(map(str, parameters))}>"

    def shape(self, tokens: int, kv_heads: int = 1, images: int = 1) -> Shape:
        rows = 16 * self.row_warps
        grid = (-(-tokens * self.heads // rows) * self.split, kv_heads, images)
        pitch = -(-self.dims // 16) * 16 + 8
        ring = self.stages * 2 * self.key_warps * self.keys * pitch * 2
        partial = self.key_warps * rows * pitch * 4
        return Shape(grid, 32 * self.row_warps * self.key_warps, max(ring, partial), (self.split, 1, 1))

    def fits(self, sm: int) -> bool:
        return self.shape(1).shared_bytes <= MAX_SHARED_BYTES[sm] and (self.split == 1 or sm >= 90)


@dataclass(frozen=True)
class WgmmaAttention:
    """attention_wgmma.cu: SM 90, heads of 256."""

    heads: int
    row_groups: int
    key_groups: int
    keys: int
    stages: int
    split: int = 1

    source: ClassVar[str] = "attention_wgmma.cu"
    dims: ClassVar[int] = 256

    def headers(self) -> Mapping[str, str]:
        return {"wgmma_attention.cuh": wgmma_header(self.keys)}

    def expression(self) -> str:
        parameters = self.heads, self.row_groups, self.key_groups, self.keys, self.stages, self.split
        return f"attention_wgmma<{', '.join(map(str, parameters))}>"

    def shape(self, tokens: int, kv_heads: int = 1, images: int = 1) -> Shape:
        rows = 64 * self.row_groups
        grid = (-(-tokens * self.heads // rows) * self.split, kv_heads, images)
        operands = (rows + self.stages * 2 * self.key_groups * self.keys) * self.dims * 2
        partial = self.key_groups * rows * (self.dims + 8) * 4
        return Shape(grid, 128 * self.row_groups * self.key_groups, max(operands, partial), (self.split, 1, 1))

    def fits(self, sm: int) -> bool:
        return sm == 90 and self.shape(1).shared_bytes <= MAX_SHARED_BYTES[sm]


def wgmma_header(keys: int) -> str:
    """The two wgmma of attention_wgmma.cu: one assembler operand an accumulator, which no template can spell."""

    def accumulators(name: str, columns: int) -> tuple[str, str]:
        count = columns // 2
        operands = ", ".join(f'"+f"({name}[{index // 4}][{index % 4}])' for index in range(count))
        return ", ".join(f"%{index}" for index in range(count)), operands

    scores, score_operands = accumulators("s", keys)
    values, value_operands = accumulators("o", 256)
    n = keys // 2
    return f"""#pragma once
__device__ inline void wgmma_scores(float (&s)[{keys // 8}][4], unsigned long long q, unsigned long long k, int add) {{
  asm volatile("{{.reg .pred add;\\nsetp.ne.b32 add, %{n + 2}, 0;\\n"
               "wgmma.mma_async.sync.aligned.m64n{keys}k16.f32.bf16.bf16 {{{scores}}}, %{n}, %{n + 1}, add, 1, 1, 0, 0;}}"
               : {score_operands}
               : "l"(q), "l"(k), "r"(add));
}}
__device__ inline void wgmma_values(float (&o)[32][4], const unsigned (&p)[4], unsigned long long v) {{
  asm volatile("{{.reg .pred add;\\nsetp.eq.u32 add, 0, 0;\\n"
               "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {{{values}}}, "
               "{{%128, %129, %130, %131}}, %132, add, 1, 1, 1;}}"
               : {value_operands}
               : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v));
}}
"""


def _candidates(dims: int, heads: int, tiles: list[tuple[int, ...]]) -> list[Attention]:
    return [Attention(dims, heads, *tile) for tile in tiles]


# (row warps, key warps, keys, stages, split) and (row groups, key groups, keys, stages, split)
PREFIX = _candidates(256, 8, [(8, 1, 16, 4, 2), (4, 2, 16, 4), (4, 1, 32, 2)]) + [
    WgmmaAttention(8, *tile)
    for tile in [
        (2, 1, 64, 2, 2), (2, 1, 48, 3, 2), (2, 1, 80, 2, 2), (2, 1, 64, 2, 4), (2, 1, 48, 3, 4), (1, 2, 32, 3),
        (1, 2, 32, 3, 2), (1, 2, 32, 3, 4), (1, 1, 64, 2), (1, 1, 64, 3, 2), (2, 1, 64, 2),
    ]
]  # fmt: skip
SUFFIX = _candidates(256, 8, [(4, 2, 16, 4, 8), (2, 2, 16, 3, 8), (2, 4, 16, 3, 8), (1, 4, 16, 2)]) + [
    WgmmaAttention(8, *tile)
    for tile in [
        (1, 1, 64, 3, 8), (1, 1, 64, 2, 8), (1, 1, 48, 3, 8), (1, 1, 32, 4, 8), (1, 2, 32, 3, 8), (1, 2, 32, 2, 8),
        (1, 2, 32, 3, 4), (1, 1, 64, 3, 4),
    ]
]  # fmt: skip
VISION = _candidates(72, 1, [
    (8, 1, 32, 4), (8, 1, 64, 3), (8, 1, 64, 2), (4, 1, 64, 3), (4, 1, 32, 4), (4, 2, 32, 3), (4, 2, 64, 2),
    (2, 2, 64, 2), (4, 1, 64, 3, 2), (4, 2, 64, 2, 2), (8, 1, 64, 2, 2),
])  # fmt: skip
