"""The rotary embedding of a qkv GEMM's output: rotary.cu."""

from __future__ import annotations

from duq.plugins.kernel import Instance, Kernel, Shape
from duq.plugins.kernels.reference import Launched, Pointer, position_of, rotate_positions


def reference(
    launch: Launched,
    qkv: Pointer,
    cosine: Pointer,
    sine: Pointer,
    k_cache: Pointer | None,
    v_cache: Pointer | None,
    past: Pointer | None,
    first_position: int,
    stride: int,
    cache_stride: int,
) -> None:
    heads, dims, m = launch.number("HEADS"), launch.number("DIMS"), launch.grid[0]
    assert launch.threads == (heads + 2) * dims // 16
    position = position_of(first_position, past)
    for head in range(heads + 2):
        v = qkv.read("Bf16", m, dims, stride=stride, at=head * dims)
        v = rotate_positions(v[:, None], cosine, sine, position)[:, 0] if head <= heads else v
        cache = [k_cache, v_cache][head - heads] if head >= heads else None
        if cache is not None:
            cache.write("Bf16", v, cache_stride, at=position * cache_stride)
        elif head <= heads:
            qkv.write("Bf16", v, stride, at=head * dims)


ROTARY = Kernel(
    "rotary.cu",
    "rotary",
    "int HEADS, int DIMS",
    """Bf16* qkv, const float* cosine, const float* sine, Bf16* k_cache?, Bf16* v_cache?, const int* past?,
    int first_position, int stride, int cache_stride""",
    reference,
)


def rotary(tokens: int, heads: int, dims: int) -> Instance:
    """Queries of `heads` heads, keys and values of one, `dims` channels each."""
    return ROTARY.instance(Shape((tokens, 1, 1), (heads + 2) * dims // 16), HEADS=heads, DIMS=dims)
