"""softmax(scale q k^T) v for heads of 256 by wgmma: attention_wgmma.cu."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

from duq.plugins.gpu import Gpu, gpu_of
from duq.plugins.kernel import Instance, Kernel, Shape
from duq.plugins.kernels.attention import PARAMETERS, reference

ALONE = gpu_of(90).block_shared_bytes // 2 + 1024  # so much shared memory that no second block fits beside

ATTENTION_WGMMA = Kernel(
    "attention_wgmma.cu",
    "attention_wgmma",
    "int HEADS, int ROW_GROUPS, int KEY_GROUPS, int KEYS, int STAGES, int SPLIT, int HELPERS",
    PARAMETERS,
    reference,
)


@dataclass(frozen=True)
class WgmmaAttention:
    """A tactic like Attention for heads of 256; `helpers` warpgroups only copy and merge. `alone`: so much shared memory
    that no two blocks are on one multiprocessor."""

    heads: int
    row_groups: int
    key_groups: int
    keys: int
    stages: int
    split: int = 1
    helpers: int = 0
    alone: bool = False

    dims: ClassVar[int] = 256

    def fits(self, gpu: Gpu) -> bool:
        return gpu.has_wgmma and self.shape(1).shared_bytes <= gpu.block_shared_bytes

    def shape(self, tokens: int, kv_heads: int = 1, images: int = 1) -> Shape:
        rows = 64 * self.row_groups
        grid = (-(-tokens * self.heads // rows) * self.split, kv_heads, images)
        operands = (rows + self.stages * 2 * self.key_groups * self.keys) * self.dims * 2
        partial = self.key_groups * rows * (self.dims + 8) * 4
        threads = 128 * (self.row_groups * self.key_groups + self.helpers)
        return Shape(grid, threads, max(operands, partial, ALONE if self.alone else 0), (self.split, 1, 1))

    def instance(self, tokens: int, kv_heads: int = 1, images: int = 1) -> Instance:
        """For `tokens` queries of each of `images`, and heads * kv_heads query heads."""
        return ATTENTION_WGMMA.instance(
            self.shape(tokens, kv_heads, images),
            {"wgmma_attention.cuh": wgmma_header(self.keys)},
            HEADS=self.heads,
            ROW_GROUPS=self.row_groups,
            KEY_GROUPS=self.key_groups,
            KEYS=self.keys,
            STAGES=self.stages,
            SPLIT=self.split,
            HELPERS=self.helpers,
        )


@functools.cache
def wgmma_header(keys: int) -> str:
    """The two wgmma of attention_wgmma.cu: one assembler operand an accumulator, which no template can spell."""
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


def accumulators(name: str, columns: int) -> tuple[str, str]:
    """Of a wgmma of float32 [64, columns] whose first operands are a lane's elements of the array `name`: as the instruction
    counts them, and as the asm statement binds them."""
    count = columns // 2
    operands = ", ".join(f'"+f"({name}[{index // 4}][{index % 4}])' for index in range(count))
    return ", ".join(f"%{index}" for index in range(count)), operands
