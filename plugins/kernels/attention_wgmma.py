"""softmax(scale q k^T) v for heads of 256 by wgmma, and perhaps the output projection behind it: attention_wgmma.cu."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from duq.plugins.gpu import Gpu, gpu_of
from duq.plugins.kernel import Instance, Kernel, Shape
from duq.plugins.kernels.attention import PARAMETERS, reference
from duq.plugins.kernels.reference import Launched, Memory, Pointer, from_bf16
from duq.plugins.layout import unpack_head_slabs

ALONE = gpu_of(90).block_shared_bytes // 2 + 1024  # so much shared memory that no second block fits beside
DIMS = 256  # channels of a head


def wgmma_reference(launch: Launched, weight: Pointer | None, **arguments: Any) -> None:
    """The attention's; or with the output projection behind it, what each head adds to the projection."""
    if not launch.number("OUTPUTS"):
        reference(launch, **arguments)
        return
    assert weight is not None and launch.number("HEADS") == 1
    tokens, width, outputs = arguments["tokens"], arguments["out_stride"], launch.number("OUTPUTS")
    blocks, heads, images = launch.grid
    assert (blocks, images, width) == (-(-tokens // 64) * launch.split, 1, launch.split * outputs)
    result = Pointer(Memory(np.full(2 * tokens * heads * DIMS, 0xFF, np.uint8)))
    attention = replace(
        launch, template={**launch.template, "HEADS": str(heads)}, grid=(-(-tokens * heads // 64) * launch.split, 1, 1)
    )
    reference(attention, **{**arguments, "out": result, "out_stride": heads * DIMS})
    packed = weight.read("unsigned char", 2 * width * heads * DIMS)
    of_heads = from_bf16(unpack_head_slabs(packed, (width, heads * DIMS), outputs)).reshape(width, heads, DIMS)
    parts = np.einsum("mhk,nhk->hmn", result.read("Bf16", tokens, heads, DIMS), of_heads, optimize=True)
    arguments["out"].write("float", parts)


ATTENTION_WGMMA = Kernel(
    "attention_wgmma.cu",
    "attention_wgmma",
    "int HEADS, int ROW_GROUPS, int KEY_GROUPS, int KEYS, int STAGES, int SPLIT, int HELPERS, int OUTPUTS, class Out",
    f"{PARAMETERS.replace('Bf16* out', 'Out* out')}, const uint4* weight?",
    wgmma_reference,
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

    dims: ClassVar[int] = DIMS

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
        return _instance(self, self.shape(tokens, kv_heads, images), "Bf16", 0)


@dataclass(frozen=True)
class ProjectedAttention:
    """A tactic for the suffix's attention and the output projection behind it in one launch: a cluster of `split` thread blocks
    has 64 rows of one head, shares its keys, and has width / split channels of the projection each."""

    keys: int
    split: int = 8

    MOST_OUTPUTS: ClassVar[int] = 128  # of a block, whose weight is 64 KB

    @property
    def attention(self) -> WgmmaAttention:
        return WgmmaAttention(1, 1, 1, self.keys, 1, self.split, alone=True)

    def divides(self, width: int) -> bool:
        """Whether a cluster's blocks have whole columns of wgmma, and room for their weights."""
        return width % (8 * self.split) == 0 and width <= self.split * self.MOST_OUTPUTS

    def fits(self, gpu: Gpu, width: int) -> bool:
        return gpu.has_wgmma and self.divides(width) and self.shape(1, 1, width).shared_bytes <= gpu.block_shared_bytes

    def shape(self, tokens: int, heads: int, width: int) -> Shape:
        attention = self.attention.shape(tokens, heads)
        rows = (
            64 + max(2 * self.keys, 2 * 64) + width // self.split
        )  # q; k and v, then what is sent and what comes; the weight
        return replace(attention, shared_bytes=max(attention.shared_bytes, 2 * DIMS * rows))

    def instance(self, tokens: int, heads: int, width: int) -> Instance:
        """For `tokens` queries of `heads` heads, which share keys and values, and a projection to `width` channels."""
        return _instance(self.attention, self.shape(tokens, heads, width), "float", width // self.split)


def _instance(tactic: WgmmaAttention, shape: Shape, out: str, outputs: int) -> Instance:
    return ATTENTION_WGMMA.instance(
        shape,
        {"wgmma_attention.cuh": wgmma_header(tactic.keys, outputs)},
        HEADS=tactic.heads,
        ROW_GROUPS=tactic.row_groups,
        KEY_GROUPS=tactic.key_groups,
        KEYS=tactic.keys,
        STAGES=tactic.stages,
        SPLIT=tactic.split,
        HELPERS=tactic.helpers,
        OUTPUTS=outputs,
        Out=out,
    )


@functools.cache
def wgmma_header(keys: int, outputs: int = 0) -> str:
    """The wgmma of attention_wgmma.cu: one assembler operand an accumulator, which no template can spell."""

    def accumulators(name: str, columns: int) -> tuple[str, str]:
        count = columns // 2
        operands = ", ".join(f'"+f"({name}[{index // 4}][{index % 4}])' for index in range(count))
        return ", ".join(f"%{index}" for index in range(count)), operands

    def of_columns(columns: int) -> str:
        scores, operands = accumulators("s", columns)
        n = columns // 2
        return f"""\
__device__ inline void wgmma_scores(float (&s)[{columns // 8}][4], unsigned long long q, unsigned long long k, int add) {{
  asm volatile("{{.reg .pred add;\\nsetp.ne.b32 add, %{n + 2}, 0;\\n"
               "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 {{{scores}}}, "
               "%{n}, %{n + 1}, add, 1, 1, 0, 0;}}"
               : {operands}
               : "l"(q), "l"(k), "r"(add));
}}
"""

    values, value_operands = accumulators("o", DIMS)
    each = "".join(of_columns(columns) for columns in sorted({keys, outputs} - {0}))
    return f"""#pragma once
{each}\
__device__ inline void wgmma_values(float (&o)[32][4], const unsigned (&p)[4], unsigned long long v) {{
  asm volatile("{{.reg .pred add;\\nsetp.eq.u32 add, 0, 0;\\n"
               "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {{{values}}}, "
               "{{%128, %129, %130, %131}}, %132, add, 1, 1, 1;}}"
               : {value_operands}
               : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v));
}}
"""
