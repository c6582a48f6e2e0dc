"""softmax(scale q k^T) v for many queries of heads of 256 on GPUs without wgmma, mma.sync: attention_tile.cu."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from duq.plugins.gpu import Gpu
from duq.plugins.kernel import Instance, Kernel, Shape
from duq.plugins.kernels.attention import PARAMETERS, reference

ROWS, KEYS, WARPS = 64, 64, 8

ATTENTION_TILE = Kernel("attention_tile.cu", "attention_tile", "int HEADS", PARAMETERS, reference)


@dataclass(frozen=True)
class TileAttention:
    """A tactic: the warps of a block share the scores of 64 rows and 64 keys."""

    heads: int

    dims: ClassVar[int] = 256

    def fits(self, gpu: Gpu) -> bool:
        return self.shape(1).shared_bytes <= gpu.block_shared_bytes

    def shape(self, tokens: int, kv_heads: int = 1, images: int = 1) -> Shape:
        shared_bytes = 2 * KEYS * 2 * self.dims + ROWS * (2 * KEYS + 16) + 3 * ROWS * 4
        return Shape((-(-tokens * self.heads // ROWS), kv_heads, images), 32 * WARPS, shared_bytes)

    def instance(self, tokens: int, kv_heads: int = 1, images: int = 1) -> Instance:
        """For `tokens` queries of each of `images`, and heads * kv_heads query heads."""
        return ATTENTION_TILE.instance(self.shape(tokens, kv_heads, images), HEADS=self.heads)
