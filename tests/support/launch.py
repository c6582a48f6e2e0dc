"""Runs the kernels on torch tensors: what the tests and the benchmark of the kernels share."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch

from duq.plugins import driver, pointwise
from duq.plugins.attention import Attention, WgmmaAttention
from duq.plugins.nvrtc import compile_cubin
from duq.plugins.layout import activation_slabs, pack_float_fragments, pack_fragments
from duq.plugins.tactics import Float, Tactic

TYPES = {torch.bfloat16: "Bf16", torch.float16: "Half", torch.float32: "float", torch.int32: "int"}


class ForNorm(NamedTuple):
    """What a launch leaves for a norm of its y [M, N]: y * gain bf16 [M, N], sums of squares float32 [M, N / 16]."""

    x: torch.Tensor | None = None
    gain: torch.Tensor | None = None
    squares: torch.Tensor | None = None


@functools.cache
def compute_capability() -> int:
    torch.cuda.init()
    return driver.open_device()


@functools.cache
def kernel(source: str, expression: str, headers: tuple = (), options: tuple = ()) -> driver.Kernel:
    if os.environ.get("DUQ_RACECHECK"):
        options = (*options, "-DFOR_RACECHECK")  # plugins/cuda/gemm_wgmma.cuh
    cubin = compile_cubin(source, compute_capability(), [expression], dict(headers), options)
    return driver.load(cubin)[expression]


def arguments(values: Iterable) -> list:
    """Tensors (None: null) and numbers as the scalars that a launch takes."""
    scalars = []
    for value in values:
        if value is None or isinstance(value, torch.Tensor):
            scalars.append(ctypes.c_void_p(0 if value is None else value.data_ptr()))
        else:
            scalars.append(ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int(value))
    return scalars


def run(launch: pointwise.Launch, values: Iterable, overlap: bool = False) -> None:
    """One launch of a pointwise kernel on its arguments."""
    function = kernel(launch.source, launch.expression)
    function.launch(launch.shape, arguments(values), torch.cuda.current_stream().cuda_stream, overlap)


def pack_weight(weight: torch.Tensor, tactic: Tactic, bits: int) -> torch.Tensor:
    return torch.from_numpy(pack_fragments(weight.cpu().numpy(), bits, tactic.layout)).cuda()


def arrange_activations(x_q: torch.Tensor, tactic: Tactic) -> torch.Tensor:
    if not tactic.slab_tokens:
        return x_q
    return torch.from_numpy(activation_slabs(np.ascontiguousarray(x_q.cpu().numpy()), tactic.slab_tokens)).cuda()


def gemm(
    tactic: Tactic,
    bits: int,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    y: torch.Tensor,
    workspace: torch.Tensor | None = None,
    *,
    n: int,
    k: int,
    finish: str = "NONE",
    for_norm: ForNorm = ForNorm(),
    options: tuple[str, ...] = (),
    overlap: bool = False,
) -> None:
    """One launch on arranged operands; M is the number of scales."""
    m = x_scale.numel()
    shape = tactic.shape(m, n, bits)
    if "-DNO_CLUSTER" in options:
        shape = dataclasses.replace(shape, cluster=(1, 1, 1))
    expression = tactic.expression(bits, TYPES[y.dtype], finish)
    function = kernel(tactic.source, expression, tuple(tactic.headers().items()), options)
    values = (x, x_scale, weight, weight_scale, bias, residual, y, workspace, m, n, k, *for_norm)
    function.launch(shape, arguments(values), torch.cuda.current_stream().cuda_stream, overlap)


def rotate_quantize(
    x: torch.Tensor,
    x_q: torch.Tensor,
    x_scale: torch.Tensor | None,
    *,
    source: str = "PLAIN",
    hadamard: int = 0,
    gain: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None,
    permutation: torch.Tensor | None = None,
    rotation: torch.Tensor | None = None,
    activation_scale: torch.Tensor | None = None,
    padded: int = 0,
    slab_tokens: int = 0,
    epsilon: float = 1e-6,
    overlap: bool = False,
) -> None:
    """One launch on x [M, K] (GEGLU: [M, 2 K]); `hadamard` is the block size, `rotation` [K/B, B, B] a dense one; `padded`:
    channels of x_q, if more than K. With x_q in bf16 and no x_scale, what would be quantized."""
    (m, columns), stride = x.shape, x.stride(0)
    k = columns // 2 if source == "GEGLU" else columns
    block = "DENSE" if rotation is not None else (hadamard or "NONE")
    tensors = (x, gain, shift, input_scale, permutation, rotation, activation_scale, x_q, x_scale)
    dense_block = rotation.shape[-1] if rotation is not None else 0
    values = (*tensors, k, padded or k, stride, dense_block, slab_tokens, epsilon)
    out = "signed char" if x_q.dtype == torch.int8 else TYPES[x_q.dtype]
    run(pointwise.rotate_quantize(m, k, TYPES[x.dtype], source, block, padded, out), values, overlap)


def hadamard_quantize(
    x: torch.Tensor, x_q: torch.Tensor, x_scale: torch.Tensor, slab_tokens: int = 0, overlap: bool = False
) -> None:
    m, k = x.shape
    run(pointwise.hadamard_quantize(m, k), (x, x_q, x_scale, m, k, x.stride(0), slab_tokens), overlap)


def rotary_tables(positions: int, dims: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [positions, dims / 2] float32."""
    frequency = 10000.0 ** -(torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency
    return angle.cos().float().cuda(), angle.sin().float().cuda()


def attention(
    config: Attention | WgmmaAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    own_k: torch.Tensor | None = None,
    own_v: torch.Tensor | None = None,
    *,
    images: int = 1,
    past: torch.Tensor | None = None,
    cache_ready: bool = False,
    overlap: bool = False,
) -> None:
    """One launch; every operand is a matrix with a row a token, dense within a row. `past`: int32, keys of k that count."""
    tokens, kv_heads = len(q) // images, k.shape[1] // config.dims
    own_keys, own_stride = (0, 0) if own_k is None else (len(own_k), own_k.stride(0))
    sizes = tokens, len(k) // images if past is None else 0, own_keys
    strides = q.stride(0), k.stride(0), own_stride, out.stride(0)
    values = (q, k, v, own_k, own_v, out, past, *sizes, *strides, int(cache_ready), config.dims**-0.5)
    shape = config.shape(tokens, kv_heads, images)
    function = kernel(config.source, config.expression(), tuple(config.headers().items()))
    function.launch(shape, arguments(values), torch.cuda.current_stream().cuda_stream, overlap)


def rotary(
    qkv: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    first_position: int = 0,
    cache: tuple[torch.Tensor, torch.Tensor] | None = None,
    *,
    heads: int,
    dims: int,
    past: torch.Tensor | None = None,
    overlap: bool = False,
) -> None:
    """One launch on qkv [tokens, (heads + 2) dims], in place; keys and values into `cache`, [positions, dims] each."""
    stride = cache[0].stride(0) if cache else 0
    values = (qkv, *tables, *(cache or (None, None)), past, first_position, qkv.stride(0), stride)
    run(pointwise.rotary(len(qkv), heads, dims), values, overlap)


def normalize(
    x: torch.Tensor,
    y: torch.Tensor,
    gain: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    *,
    center: bool,
    epsilon: float = 1e-6,
    overlap: bool = False,
) -> None:
    """One launch on x [M, K] -> y [M, K], dense within a row."""
    launch = pointwise.normalize(*x.shape, TYPES[x.dtype], TYPES[y.dtype], center)
    run(launch, (x, gain, shift, y, x.shape[1], x.stride(0), y.stride(0), epsilon), overlap)


def patches(images: torch.Tensor, y: torch.Tensor, patch: int, overlap: bool = False) -> None:
    """One launch on images [cameras, size, size, 3], bytes or floats -> y [cameras (size / patch)^2, pitch]."""
    cameras, size, _, _ = images.shape
    pixel = "float" if images.dtype == torch.float32 else "unsigned char"
    run(pointwise.patches(cameras, size, patch, pixel), (images, y, size, y.shape[1]), overlap)


def tokens(rows: torch.Tensor, y: torch.Tensor, scale: float, overlap: bool = False) -> None:
    """One launch on rows [M, K], dense -> y [M, K]."""
    run(pointwise.tokens(*rows.shape), (rows, y, rows.shape[1], y.stride(0), scale), overlap)


def linear_narrow(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    activation: str = "NONE",
    for_norm: ForNorm = ForNorm(),
    overlap: bool = False,
) -> None:
    """One launch on x [M, K] and weight [K, N] -> y [M, N], all dense."""
    launch = pointwise.linear_narrow(len(x), weight.shape[1], activation, TYPES[y.dtype])
    run(launch, (x, weight, bias, y, *weight.shape, *for_norm), overlap)


def flow_step(
    x: torch.Tensor,
    gain: torch.Tensor | None,
    shift: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    flow: torch.Tensor,
    epsilon: float = 1e-6,
    overlap: bool = False,
) -> None:
    """One launch on x [M, K] and weight [K, N], dense; adds to flow [M, N] in place."""
    launch = pointwise.flow_step(len(x), weight.shape[1])
    run(launch, (x, gain, shift, weight, bias, flow, x.shape[1], epsilon), overlap)


def geglu(x: torch.Tensor, y: torch.Tensor, overlap: bool = False) -> None:
    """One launch on x [M, 2 K] -> y [M, K], dense."""
    run(pointwise.geglu(*y.shape), (x, y, y.shape[1]), overlap)


def dequantize(
    acc: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    y: torch.Tensor,
    *,
    rotation: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    finish: str = "NONE",
    overlap: bool = False,
) -> None:
    """One launch on sums int32 [M, N] -> y [M, N] (GEGLU: [M, N / 2]), dense; `rotation` is [N/B, B, B]."""
    launch = pointwise.dequantize(*y.shape, TYPES[y.dtype], rotation is not None, finish)
    block = rotation.shape[-1] if rotation is not None else 0
    tensors = (acc, x_scale, weight_scale, rotation, bias, gate, residual, y)
    run(launch, (*tensors, acc.shape[1], int(x_scale.numel() > 1), block), overlap)


def expand(weight: torch.Tensor, scale: torch.Tensor, y: torch.Tensor, overlap: bool = False) -> None:
    """One launch on a packed INT4 weight -> y bf16 [N, K], dense."""
    run(pointwise.expand(*y.shape), (weight, scale, y, *y.shape), overlap)


def pack_float_weight(weight: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(pack_float_fragments(weight.cpu().view(torch.uint16).numpy())).cuda()


def gemm_float(
    tactic: Float,
    x: torch.Tensor,
    weight: torch.Tensor,
    y: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    *,
    n: int,
    bits: int = 16,
    finish: str = "NONE",
    squares: torch.Tensor | None = None,
    channel_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    tables: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    past: torch.Tensor | None = None,
    first_position: int = 0,
    to_cache: bool = False,
    epsilon: float = 1e-6,
    for_norm: ForNorm = ForNorm(),
    overlap: bool = False,
) -> None:
    """One launch on x [M, K], dense, and a packed weight [n, K] of `bits`; with `squares` [M, K / 16] the norm ahead; `k` and
    `v` are for ROTARY."""
    m, depth = x.shape
    kv_stride = k.stride(0) if k is not None else 0
    tensors = (x, squares, weight, channel_scale, bias, residual, y, k, v, *tables, past)
    values = (*tensors, m, n, depth, y.stride(0), kv_stride, first_position, int(to_cache), epsilon, *for_norm)
    function = kernel(tactic.source, tactic.expression(TYPES[y.dtype], squares is not None, finish, bits))
    function.launch(tactic.shape(m, n), arguments(values), torch.cuda.current_stream().cuda_stream, overlap)
