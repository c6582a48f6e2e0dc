"""The tile shapes of the CUDA attention kernels: how each is launched, and which to use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from duq.plugins.driver import Shape
from duq.plugins.errors import KernelError
from duq.plugins.tactics import FEW_TOKENS, MAX_SHARED_BYTES


@dataclass(frozen=True)
class Attention:
    """attention.cu: `heads` query heads of `dims` share a KV head; `split` thread blocks share the keys."""

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
    """attention_wgmma.cu: the same for SM 90 and heads of 256; `helpers` warpgroups only copy and merge. `alone`: so much
    shared memory that no two blocks are on one multiprocessor."""

    heads: int
    row_groups: int
    key_groups: int
    keys: int
    stages: int
    split: int = 1
    helpers: int = 0
    alone: bool = False

    source: ClassVar[str] = "attention_wgmma.cu"
    dims: ClassVar[int] = 256

    def headers(self) -> Mapping[str, str]:
        return {"wgmma_attention.cuh": wgmma_header(self.keys)}

    def expression(self) -> str:
        tile = self.row_groups, self.key_groups, self.keys, self.stages, self.split
        parameters = self.heads, *tile, self.helpers
        return f"attention_wgmma<{', '.join(map(str, parameters))}>"

    def shape(self, tokens: int, kv_heads: int = 1, images: int = 1) -> Shape:
        rows = 64 * self.row_groups
        grid = (-(-tokens * self.heads // rows) * self.split, kv_heads, images)
        operands = (rows + self.stages * 2 * self.key_groups * self.keys) * self.dims * 2
        partial = self.key_groups * rows * (self.dims + 8) * 4
        threads = 128 * (self.row_groups * self.key_groups + self.helpers)
        least = MAX_SHARED_BYTES[90] // 2 + 1024 if self.alone else 0
        return Shape(grid, threads, max(operands, partial, least), (self.split, 1, 1))

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
               "wgmma.mma_async.sync.aligned.m64n{keys}k16.f32.bf16.bf16 {{{scores}}}, "
               "%{n}, %{n + 1}, add, 1, 1, 0, 0;}}"
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


# What was timed for the policy's attentions, the best first (docs/performance.md); those with few rows and no cluster
# are for older GPUs. (row warps, key warps, keys, stages, split) and (row groups, key groups, ..., split, helpers).
MANY_QUERIES = [
    WgmmaAttention(8, 1, 2, 48, 2),
    WgmmaAttention(8, 2, 1, 64, 2, 2),
    WgmmaAttention(8, 1, 1, 64, 3, 1, 1),
    WgmmaAttention(8, 1, 1, 64, 3, 2, 1),
    WgmmaAttention(8, 1, 2, 32, 3),
    Attention(256, 8, 8, 1, 16, 4, 2),
    Attention(256, 8, 4, 2, 16, 4),
    Attention(256, 8, 4, 1, 32, 2),
]
FEW_QUERIES = [
    WgmmaAttention(8, 1, 1, 112, 1, 8, alone=True),  # and with fewer keys, see for_suffix
    WgmmaAttention(8, 1, 1, 80, 1, 8, alone=True),
    WgmmaAttention(8, 1, 1, 48, 1, 8, alone=True),
    WgmmaAttention(8, 1, 1, 64, 1, 16),
    WgmmaAttention(8, 1, 1, 64, 3, 8, 1),
    WgmmaAttention(8, 1, 1, 64, 2, 8),
    Attention(256, 8, 2, 2, 16, 3, 8),
    Attention(256, 8, 1, 4, 16, 2),
    Attention(256, 8, 1, 2, 16, 2),
]
VISION = [
    Attention(72, 1, 8, 1, 64, 2),
    Attention(72, 1, 4, 2, 64, 2),
    Attention(72, 1, 2, 2, 64, 2),
    Attention(72, 1, 4, 1, 64, 3),
    Attention(72, 1, 4, 1, 32, 4),
    Attention(72, 1, 4, 2, 32, 3),
    Attention(72, 1, 4, 1, 64, 3, 2),
]


def best(dims: int, tokens: int, images: int, sm: int, cached: int = 0, own: int = 0) -> Attention | WgmmaAttention:
    """The kernel for `tokens` queries an image: Gemma's heads of 256, or SigLIP's of 72. Any number of keys; few queries
    have one for at most `cached` keys and `own` ones, which then is the fastest.

    Raises KernelError for heads that no kernel is made for.
    """
    if dims == 256 and tokens <= FEW_TOKENS:
        order = [for_suffix(cached, own), *FEW_QUERIES]
    elif dims == 256:
        order = MANY_QUERIES[3:] if tokens <= 400 else MANY_QUERIES
    elif dims == 72:
        order = VISION[3 - min(images, 3) :]
    else:
        raise KernelError(f"no attention kernel for heads of {dims}; there are some for 72 and 256")
    return next(kernel for kernel in order if kernel.fits(sm))


def for_suffix(cached: int, own: int) -> WgmmaAttention:
    """8 blocks share the keys, each with as few tiles as registers permit, which are no larger than its share.

    Small tiles leave room for a second block, and a cluster's blocks would come in twos on half of the multiprocessors.
    """
    share, most = -(-cached // 8) + -(-own // 8), FEW_QUERIES[0].keys
    tiles = -(-share // most) or 1
    return replace(FEW_QUERIES[0], keys=max(-(-share // (16 * tiles)) * 16, 32))
