"""The tile shapes of the CUDA attention (plugins/cuda/attention.cu) and how its two kernels are launched."""
from __future__ import annotations

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


def _candidates(dims: int, heads: int, tiles: list[tuple[int, ...]]) -> list[Attention]:
    return [Attention(dims, heads, *tile) for tile in tiles]


# (row warps, key warps, keys, stages, split)
PREFIX = _candidates(256, 8, [
    (8, 1, 32, 3, 2), (8, 1, 32, 3, 3), (8, 1, 32, 3, 4), (8, 1, 32, 3, 6), (8, 1, 32, 4, 2), (8, 1, 16, 4, 2),
    (8, 1, 32, 3), (4, 2, 32, 3), (4, 2, 32, 2, 2), (4, 2, 16, 4), (4, 1, 32, 3), (4, 1, 32, 2),
])  # fmt: skip
SUFFIX = _candidates(256, 8, [
    (2, 4, 16, 3, 8), (2, 4, 16, 2, 8), (2, 4, 32, 2, 8), (4, 2, 32, 3, 8), (4, 2, 32, 2, 8), (4, 2, 16, 4, 8),
    (1, 4, 16, 3, 4), (1, 8, 16, 2, 4), (2, 2, 16, 3, 8), (2, 4, 16, 3, 4), (1, 4, 16, 2), (1, 2, 16, 2),
])  # fmt: skip
VISION = _candidates(72, 1, [
    (8, 1, 32, 4), (8, 1, 64, 3), (4, 1, 64, 3), (4, 1, 32, 4), (4, 2, 32, 3), (4, 2, 64, 2), (2, 2, 64, 2),
    (2, 1, 64, 3), (4, 1, 64, 3, 2), (8, 1, 64, 2), (4, 2, 64, 3), (2, 4, 64, 2),
])  # fmt: skip
