"""softmax(scale q k^T) v for heads of 72 and up to 256 keys by wgmma: attention_wgmma_vision.cu."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

from duq.plugins.gpu import Gpu
from duq.plugins.kernel import Instance, Kernel, Shape
from duq.plugins.kernels.attention import PARAMETERS, reference
from duq.plugins.kernels.attention_wgmma import accumulators

ATTENTION_WGMMA_VISION = Kernel(
    "attention_wgmma_vision.cu",
    "attention_wgmma_vision",
    "int HEADS, int ROW_GROUPS, int PARTS",
    PARAMETERS,
    reference,
)


@dataclass(frozen=True)
class VisionAttention:
    """A tactic like Attention for heads of 72 and at most `most_keys` keys, none of them own: a block has 64 `row_groups`
    rows and all keys, in `parts` whose exponentials overlap with the products of others."""

    heads: int
    row_groups: int
    parts: int

    dims: ClassVar[int] = 72
    most_keys: ClassVar[int] = 256

    def fits(self, gpu: Gpu) -> bool:
        return gpu.has_wgmma and self.shape(1).shared_bytes <= gpu.block_shared_bytes

    def shape(self, tokens: int, kv_heads: int = 1, images: int = 1) -> Shape:
        rows, pieces = 64 * self.row_groups, self.dims // 8
        shared_bytes = (2 * pieces + 1) * 16 * (self.most_keys + 1) + rows * self.dims * 2
        return Shape((-(-tokens * self.heads // rows), kv_heads, images), 128 * self.row_groups, shared_bytes)

    def instance(self, tokens: int, kv_heads: int = 1, images: int = 1) -> Instance:
        """For `tokens` queries of each of `images`, and heads * kv_heads query heads."""
        return ATTENTION_WGMMA_VISION.instance(
            self.shape(tokens, kv_heads, images),
            {"wgmma_vision.cuh": wgmma_header(self.most_keys // self.parts)},
            HEADS=self.heads,
            ROW_GROUPS=self.row_groups,
            PARTS=self.parts,
        )


@functools.cache
def wgmma_header(keys: int) -> str:
    """The two wgmma of attention_wgmma_vision.cu, d (+)= a b with a in registers; b is transposed where it is V."""
    return "#pragma once\n" + _wgmma("wgmma_scores", keys, 0) + _wgmma("wgmma_values", VisionAttention.dims + 8, 1)


def _wgmma(name: str, columns: int, transposed: int) -> str:
    registers, operands = accumulators("d", columns)
    n = columns // 2
    return f"""
__device__ inline void {name}(float (&d)[{columns // 8}][4], const unsigned (&a)[4], unsigned long long b, int add) {{
  asm volatile("{{.reg .pred add;\\nsetp.ne.b32 add, %{n + 5}, 0;\\n"
               "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 {{{registers}}}, "
               "{{%{n}, %{n + 1}, %{n + 2}, %{n + 3}}}, %{n + 4}, add, 1, 1, {transposed};}}"
               : {operands}
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}}
"""
