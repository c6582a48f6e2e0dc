"""softmax(scale q k^T) v for few queries of heads of 256 on GPUs without clusters, mma.sync: attention_split.cu."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from duq.plugins.gpu import Gpu
from duq.plugins.kernel import Instance, Kernel, Shape
from duq.plugins.kernels.attention import PARAMETERS, reference
from duq.plugins.kernels.reference import Launched, Pointer

WARPS = 8


def split_reference(launch: Launched, partial: Pointer, counters: Pointer, **arguments: Any) -> None:
    """The attention's; the counters are zero before and after a launch, `partial` holds nothing that lasts."""
    blocks, rows = math.prod(launch.grid), 16 * launch.number("ROWS16")
    assert not counters.read("int", blocks // launch.number("SPLIT")).any(), "the counters are zero ahead of a launch"
    partial.write("float", np.full(blocks * _part_words(rows), np.nan, np.float32))
    reference(launch, **arguments)


def _part_words(rows: int) -> int:
    """What a block leaves of its rows: 256 halves and a float each."""
    return rows * (SplitAttention.dims // 2 + 1)


ATTENTION_SPLIT = Kernel(
    "attention_split.cu",
    "attention_split",
    "int HEADS, int ROWS16, int KEYS, int SPLIT",
    f"{PARAMETERS}, float* partial, int* counters",
    split_reference,
)


@dataclass(frozen=True)
class SplitAttention:
    """A tactic: a block has 16 `rows16` rows and `keys` keys at a time; `split` blocks share the keys and meet in memory."""

    heads: int
    rows16: int
    keys: int
    split: int

    dims: ClassVar[int] = 256

    def fits(self, gpu: Gpu) -> bool:
        return self.shape(1).shared_bytes <= gpu.block_shared_bytes

    def shape(self, tokens: int, kv_heads: int = 1, images: int = 1) -> Shape:
        rows, row_bytes = 16 * self.rows16, 2 * self.dims
        shared_bytes = self.keys * row_bytes + rows * max(row_bytes, 2 * self.keys + 16) + rows * WARPS * 4
        return Shape((self.row_tiles(tokens) * self.split, kv_heads, images), 32 * WARPS, shared_bytes)

    def instance(self, tokens: int, kv_heads: int = 1, images: int = 1) -> Instance:
        """For `tokens` queries of each of `images`, and heads * kv_heads query heads."""
        return ATTENTION_SPLIT.instance(
            self.shape(tokens, kv_heads, images), HEADS=self.heads, ROWS16=self.rows16, KEYS=self.keys, SPLIT=self.split
        )

    def row_tiles(self, tokens: int) -> int:
        """How many groups of `split` blocks a KV head has."""
        return -(-tokens * self.heads // (16 * self.rows16))

    def groups(self, tokens: int, kv_heads: int = 1, images: int = 1) -> int:
        """Counters, int32, zero before and after a launch."""
        return self.row_tiles(tokens) * kv_heads * images

    def partial_words(self, tokens: int, kv_heads: int = 1, images: int = 1) -> int:
        """Words of 4 bytes that the blocks leave for each other."""
        return self.groups(tokens, kv_heads, images) * self.split * _part_words(16 * self.rows16)
