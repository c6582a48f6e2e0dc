"""softmax(scale q k^T) v for heads of 72 and 256, mma.sync: attention.cu, and what all attention kernels share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from duq.plugins.gpu import Gpu
from duq.plugins.kernel import Instance, Kernel, Shape
from duq.plugins.kernels.reference import Launched, Pointer, softmax

PARAMETERS = """const Bf16* q, const Bf16* k, const Bf16* v, const Bf16* own_k?, const Bf16* own_v?, Bf16* out,
    const int* past?, int tokens, int keys, int own_keys, int q_stride, int kv_stride, int own_stride, int out_stride,
    int cache_ready, float scale"""


def reference(
    launch: Launched,
    q: Pointer,
    k: Pointer,
    v: Pointer,
    own_k: Pointer | None,
    own_v: Pointer | None,
    out: Pointer,
    past: Pointer | None,
    tokens: int,
    keys: int,
    own_keys: int,
    q_stride: int,
    kv_stride: int,
    own_stride: int,
    out_stride: int,
    cache_ready: int,
    scale: float,
) -> None:
    """Of all attention kernels; of attention_split but for the memory that its blocks meet in."""
    dims, heads, rows = _tile(launch)
    blocks, kv_heads, images = launch.grid
    assert blocks == -(-tokens * heads // rows) * _split(launch)
    keys += int(past.read("int", 1).item()) if past is not None else 0
    if launch.kernel == "attention_wgmma_vision":
        assert keys <= 256 and not own_keys, "all keys at once, from one place"
    for image in range(images):
        for group in range(kv_heads):
            at = image * keys * kv_stride + group * dims
            key, value = (each.read("Bf16", keys, dims, stride=kv_stride, at=at) for each in (k, v))
            if own_keys:
                assert own_k is not None and own_v is not None
                own = [each.read("Bf16", own_keys, dims, stride=own_stride) for each in (own_k, own_v)]
                key, value = (np.concatenate(pair) for pair in zip((key, value), own, strict=True))
            for head in range(group * heads, (group + 1) * heads):
                query = q.read("Bf16", tokens, dims, stride=q_stride, at=image * tokens * q_stride + head * dims)
                result = softmax(query @ key.T * np.float32(scale)) @ value
                out.write("Bf16", result, out_stride, at=image * tokens * out_stride + head * dims)


def _tile(launch: Launched) -> tuple[int, int, int]:
    """(channels a head, query heads a KV head, rows a thread block)."""
    if launch.kernel == "attention_wgmma":
        return 256, launch.number("HEADS"), 64 * launch.number("ROW_GROUPS")
    if launch.kernel == "attention_tile":
        return 256, launch.number("HEADS"), 64
    if launch.kernel == "attention_split":
        return 256, launch.number("HEADS"), 16 * launch.number("ROWS16")
    if launch.kernel == "attention_wgmma_vision":
        return 72, launch.number("HEADS"), 64 * launch.number("ROW_GROUPS")
    return launch.number("DIMS"), launch.number("HEADS"), 16 * launch.number("ROW_WARPS")


def _split(launch: Launched) -> int:
    return launch.number("SPLIT") if launch.kernel == "attention_split" else launch.split


ATTENTION = Kernel(
    "attention.cu",
    "attention",
    "int DIMS, int HEADS, int ROW_WARPS, int KEY_WARPS, int KEYS, int STAGES, int SPLIT",
    PARAMETERS,
    reference,
)


def pitch_of(dims: int) -> int:
    """Elements between rows of a tile (PITCH in attention.cu)."""
    return -(-dims // 16) * 16 + 8


@dataclass(frozen=True)
class Attention:
    """A tactic: `heads` query heads of `dims` share a KV head; `split` thread blocks, a cluster, share the keys."""

    dims: int
    heads: int
    row_warps: int
    key_warps: int
    keys: int
    stages: int
    split: int = 1

    def fits(self, gpu: Gpu) -> bool:
        return self.shape(1).shared_bytes <= gpu.block_shared_bytes and (self.split == 1 or gpu.has_clusters)

    def shape(self, tokens: int, kv_heads: int = 1, images: int = 1) -> Shape:
        rows = 16 * self.row_warps
        grid = (-(-tokens * self.heads // rows) * self.split, kv_heads, images)
        pitch = pitch_of(self.dims)
        ring = self.stages * 2 * self.key_warps * self.keys * pitch * 2
        partial = self.key_warps * rows * pitch * 4
        return Shape(grid, 32 * self.row_warps * self.key_warps, max(ring, partial), (self.split, 1, 1))

    def instance(self, tokens: int, kv_heads: int = 1, images: int = 1) -> Instance:
        """For `tokens` queries of each of `images`, and heads * kv_heads query heads."""
        return ATTENTION.instance(
            self.shape(tokens, kv_heads, images),
            DIMS=self.dims,
            HEADS=self.heads,
            ROW_WARPS=self.row_warps,
            KEY_WARPS=self.key_warps,
            KEYS=self.keys,
            STAGES=self.stages,
            SPLIT=self.split,
        )
