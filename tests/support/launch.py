"""Runs the kernels on torch tensors: what the tests and the benchmarks of the kernels share."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from duq.plugins import driver, kernels
from duq.plugins.gpu import Gpu, gpu_of, runs_code_of, runs_ptx_of, stand_in
from duq.plugins.kernel import Code, Instance
from duq.plugins.kernels import Attention, GemmFloat, ProjectedAttention, SplitAttention, WgmmaAttention
from duq.plugins.layout import activation_slabs, pack_float_fragments, pack_fragments, pack_head_slabs
from duq.plugins.nvrtc import compile_cubin, compile_ptx
from duq.plugins.tactics import Tactic

TYPES = {
    torch.bfloat16: "Bf16",
    torch.float16: "Half",
    torch.float32: "float",
    torch.int32: "int",
    torch.int8: "signed char",
}
Value = torch.Tensor | float | int | None


class Address(int):
    """Of a tensor. `type`: the C++ type of its elements; None for packed bytes, which kernels take as what they please."""

    type: str | None

    def __new__(cls, tensor: torch.Tensor) -> Address:
        self = super().__new__(cls, tensor.data_ptr())
        self.type = TYPES.get(tensor.dtype)
        return self


class ForNorm(NamedTuple):
    """What a launch leaves for a norm of its y [M, N]: y * gain bf16 [M, N], sums of squares float32 [M, N / 16]."""

    x: torch.Tensor | None = None
    gain: torch.Tensor | None = None
    squares: torch.Tensor | None = None

    @property
    def arguments(self) -> dict[str, Value]:
        return {"normed": self.x, "normed_gain": self.gain, "normed_squares": self.squares}


NO_NORM = ForNorm()


@functools.cache
def compute_capability() -> int:
    torch.cuda.init()
    return driver.open_device()


class Image(NamedTuple):
    """What kernels are compiled to: for a GPU, as PTX or as machine code."""

    gpu: Gpu
    ptx: bool = False


_program: list[Image] = []  # the one in use last


def image() -> Image:
    return _program[-1] if _program else Image(gpu_of(compute_capability()))


def gpu() -> Gpu:
    """Whose limits the kernels keep."""
    return image().gpu


@contextmanager
def program(sm: int) -> Iterator[Image]:
    """Within, kernels are launched as the program of an SM launches them on this GPU: as machine code, as PTX, or with a
    stand-in, as `options_of_program` of the cuda target has it."""
    here = compute_capability()
    if runs_code_of(here, sm):
        _program.append(Image(gpu_of(sm)))
    elif runs_ptx_of(here, sm):
        _program.append(Image(gpu_of(sm), ptx=True))
    else:
        _program.append(Image(stand_in(gpu_of(sm), here)))
    try:
        yield _program[-1]
    finally:
        _program.pop()


def kernel(code: Code, options: tuple[str, ...] = ()) -> driver.Kernel:
    if os.environ.get("DUQ_RACECHECK"):
        options = (*options, "-DFOR_RACECHECK")  # plugins/cuda/gemm_wgmma.cuh
    return _compiled(code, options, image())


@functools.cache
def _compiled(code: Code, options: tuple[str, ...], image: Image) -> driver.Kernel:
    compile = compile_ptx if image.ptx else compile_cubin
    return driver.load(compile(code.source, image.gpu, [code.expression], dict(code.headers), options))[code.expression]


def compile_all(instances: Iterable[Instance]) -> None:
    """Fills the cache of cubins on all cores."""
    sm = compute_capability()
    with ProcessPoolExecutor() as pool:
        codes = dict.fromkeys(each.code for each in instances)
        for job in [pool.submit(compile_cubin, c.source, sm, [c.expression], dict(c.headers)) for c in codes]:
            job.result()


def run(instance: Instance, arguments: Mapping[str, Value], overlap: bool = False, options: tuple[str, ...] = ()) -> None:
    """One launch. arguments: tensors and numbers by the names of the kernel's parameters."""
    values = {name: Address(each) if isinstance(each, torch.Tensor) else each for name, each in arguments.items()}
    stream = torch.cuda.current_stream().cuda_stream
    kernel(instance.code, options).launch(instance.on(gpu()).shape, instance.scalars(values), stream, overlap)


def pack_weight(weight: torch.Tensor, tactic: Tactic, bits: int) -> torch.Tensor:
    return _packed(pack_fragments(weight.cpu().numpy(), bits, tactic.layout))


def pack_float_weight(weight: torch.Tensor) -> torch.Tensor:
    return _packed(pack_float_fragments(weight.cpu().view(torch.uint16).numpy()))


def pack_head_weight(weight: torch.Tensor, tactic: ProjectedAttention) -> torch.Tensor:
    """Of an output projection, bf16 [width, heads * dims]."""
    return _packed(pack_head_slabs(weight.cpu().view(torch.uint16).numpy(), len(weight) // tactic.split))


def _packed(weight: np.ndarray) -> torch.Tensor:
    """As bytes: a weight's elements are the kernel's affair."""
    return torch.from_numpy(np.ascontiguousarray(weight).view(np.uint8)).cuda()


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
    epilogue: str = "NONE",
    for_norm: ForNorm = NO_NORM,
    options: tuple[str, ...] = (),
    overlap: bool = False,
) -> None:
    """One launch on arranged operands; M is the number of scales."""
    m = x_scale.numel()
    instance = tactic.instance(m, n, bits, TYPES[y.dtype], epilogue)
    if "-DNO_CLUSTER" in options:
        instance = replace(instance, shape=replace(instance.shape, cluster=(1, 1, 1)))
    elif workspace is None and tactic.split > 1 and not gpu().has_clusters:
        workspace = accumulators(tactic, m, n)
    arguments = {
        "x_q": x,
        "x_scale": x_scale,
        "weight": weight,
        "weight_scale": weight_scale,
        "bias": bias,
        "residual": residual,
        "y": y,
        "workspace": workspace,
        "tokens": m,
        "rows": n,
        "depth": k,
    }
    run(instance, arguments | for_norm.arguments, overlap, options)


@functools.cache
def accumulators(tactic: Tactic, m: int, n: int) -> torch.Tensor:
    """Where blocks that share K add theirs without clusters: zero, and left so by each launch."""
    tiles = -(-m // tactic.tile_tokens)
    return torch.zeros(tiles * (tactic.tile_tokens * n + n // 16), dtype=torch.int32, device="cuda")


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
    m, columns = x.shape
    k = columns // 2 if source == "GEGLU" else columns
    how = "DENSE" if rotation is not None else (hadamard or "NONE")
    arguments = {
        "x": x,
        "gain": gain,
        "shift": shift,
        "input_scale": input_scale,
        "permutation": permutation,
        "rotation": rotation,
        "activation_scale": activation_scale,
        "x_q": x_q,
        "x_scale": x_scale,
        "depth": k,
        "padded_depth": padded or k,
        "row_stride": x.stride(0),
        "block": rotation.shape[-1] if rotation is not None else 0,
        "slab_tokens": slab_tokens,
        "epsilon": epsilon,
    }
    instance = kernels.rotate_quantize(m, k, TYPES[x.dtype], source, how, padded, TYPES[x_q.dtype])
    run(instance, arguments, overlap)


def residual_quantize(
    x: torch.Tensor,
    parts: torch.Tensor,
    y: torch.Tensor,
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    *,
    hadamard: int = 0,
    gate: torch.Tensor | None = None,
    gain: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    slab_tokens: int = 0,
    epsilon: float = 1e-6,
    overlap: bool = False,
) -> None:
    """One launch on x [M, K] and parts [P, M, K] -> y [M, K], all float32 and dense, which may be x, and its INT8."""
    m, k = x.shape
    operands: dict[str, Value] = {
        "x": x, "parts": parts, "gate": gate, "gain": gain, "shift": shift, "y": y, "x_q": x_q, "x_scale": x_scale,
    }  # fmt: skip
    instance = kernels.residual_quantize(m, k, len(parts), hadamard or "NONE")
    run(instance, {**operands, "depth": k, "slab_tokens": slab_tokens, "epsilon": epsilon}, overlap)


def hadamard_quantize(
    x: torch.Tensor, x_q: torch.Tensor, x_scale: torch.Tensor, slab_tokens: int = 0, overlap: bool = False
) -> None:
    m, k = x.shape
    sizes = {"tokens": m, "depth": k, "row_stride": x.stride(0), "slab_tokens": slab_tokens}
    run(kernels.hadamard_quantize(m, k), {"x": x, "x_q": x_q, "x_scale": x_scale, **sizes}, overlap)


def rotary_tables(positions: int, dims: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [positions, dims / 2] float32."""
    frequency = 10000.0 ** -(torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency
    return angle.cos().float().cuda(), angle.sin().float().cuda()


def attention(
    tactic: Attention | WgmmaAttention,
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
    meeting: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """One launch; every operand is a matrix with a row a token, dense within a row. `past`: int32, keys of k that count.
    meeting: `partial` and `counters` of a SplitAttention, by default `meeting_place`'s."""
    tokens, kv_heads = len(q) // images, k.shape[1] // tactic.dims
    arguments = _attention_arguments(q, k, v, out, own_k, own_v, images, past, cache_ready, tactic.dims)
    if isinstance(tactic, SplitAttention):
        sizes = tokens, kv_heads, images
        partial, counters = meeting or meeting_place(tactic.partial_words(*sizes), tactic.groups(*sizes))
        arguments |= {"partial": partial, "counters": counters}
    run(tactic.instance(tokens, kv_heads, images), arguments, overlap)


def projected_attention(
    tactic: ProjectedAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor,
    parts: torch.Tensor,
    own_k: torch.Tensor | None = None,
    own_v: torch.Tensor | None = None,
    *,
    past: torch.Tensor | None = None,
    cache_ready: bool = False,
    overlap: bool = False,
) -> None:
    """One launch on operands as those of `attention` and a weight packed by `pack_head_weight` -> parts float32 [heads, tokens,
    width]."""
    dims = WgmmaAttention.dims
    arguments = _attention_arguments(q, k, v, parts[0], own_k, own_v, 1, past, cache_ready, dims)
    instance = tactic.instance(len(q), q.shape[1] // dims, parts.shape[-1])
    run(instance, arguments | {"weight": weight}, overlap)


def _attention_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    own_k: torch.Tensor | None,
    own_v: torch.Tensor | None,
    images: int,
    past: torch.Tensor | None,
    cache_ready: bool,
    dims: int,
) -> dict[str, Value]:
    own_keys, own_stride = (0, 0) if own_k is None else (len(own_k), own_k.stride(0))
    return {
        "q": q,
        "k": k,
        "v": v,
        "own_k": own_k,
        "own_v": own_v,
        "out": out,
        "past": past,
        "tokens": len(q) // images,
        "keys": len(k) // images if past is None else 0,
        "own_keys": own_keys,
        "q_stride": q.stride(0),
        "kv_stride": k.stride(0),
        "own_stride": own_stride,
        "out_stride": out.stride(0),
        "cache_ready": int(cache_ready),
        "scale": dims**-0.5,
    }


@functools.cache
def meeting_place(words: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`partial`, NaN at first, and `counters`, zero, for blocks that meet in memory, of the launches of one stream."""
    return torch.full((words,), math.nan, device="cuda"), torch.zeros(groups, dtype=torch.int32, device="cuda")


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
    k_cache, v_cache = cache or (None, None)
    arguments = {
        "qkv": qkv,
        "cosine": tables[0],
        "sine": tables[1],
        "k_cache": k_cache,
        "v_cache": v_cache,
        "past": past,
        "first_position": first_position,
        "stride": qkv.stride(0),
        "cache_stride": k_cache.stride(0) if k_cache is not None else 0,
    }
    run(kernels.rotary(len(qkv), heads, dims), arguments, overlap)


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
    m, k = x.shape
    arguments = {
        "x": x,
        "gain": gain,
        "shift": shift,
        "y": y,
        "depth": k,
        "x_stride": x.stride(0),
        "y_stride": y.stride(0),
        "epsilon": epsilon,
    }
    run(kernels.normalize(m, k, TYPES[x.dtype], TYPES[y.dtype], center), arguments, overlap)


def patches(images: torch.Tensor, y: torch.Tensor, patch: int, overlap: bool = False) -> None:
    """One launch on images [cameras, size, size, 3], bytes or floats -> y [cameras (size / patch)^2, pitch]."""
    cameras, size, _, _ = images.shape
    pixel = "float" if images.dtype == torch.float32 else "unsigned char"
    arguments: dict[str, Value] = {"images": images, "y": y, "size": size, "pitch": y.shape[1]}
    run(kernels.patches(cameras, size, patch, pixel), arguments, overlap)


def tokens(rows: torch.Tensor, y: torch.Tensor, scale: float, overlap: bool = False) -> None:
    """One launch on rows [M, K], dense -> y [M, K]."""
    m, k = rows.shape
    run(kernels.tokens(m, k), {"rows": rows, "y": y, "depth": k, "y_stride": y.stride(0), "scale": scale}, overlap)


def linear_narrow(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    activation: str = "NONE",
    for_norm: ForNorm = NO_NORM,
    overlap: bool = False,
) -> None:
    """One launch on x [M, K] and weight [K, N] -> y [M, N], all dense."""
    depth, columns = weight.shape
    arguments = {"x": x, "weight": weight, "bias": bias, "y": y, "depth": depth, "columns": columns}
    instance = kernels.linear_narrow(len(x), columns, activation, TYPES[y.dtype])
    run(instance, arguments | for_norm.arguments, overlap)


def flow_step(
    x: torch.Tensor,
    gain: torch.Tensor | None,
    shift: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    flow: torch.Tensor,
    epsilon: float = 1e-6,
    overlap: bool = False,
    history: torch.Tensor | None = None,
    coefficients: torch.Tensor | None = None,
) -> None:
    """One launch on x [M, K] and weight [K, N], dense; adds to flow [M, N] in place. history [P, M, N], coefficients [1 + P]."""
    m, k = x.shape
    operands: dict[str, Value] = {
        "x": x, "gain": gain, "shift": shift, "weight": weight, "bias": bias, "flow": flow, "history": history,
        "coefficients": coefficients,
    }  # fmt: skip
    instance = kernels.flow_step(m, weight.shape[1], 0 if history is None else len(history))
    run(instance, {**operands, "depth": k, "epsilon": epsilon}, overlap)


def geglu(x: torch.Tensor, y: torch.Tensor, overlap: bool = False) -> None:
    """One launch on x [M, 2 K] -> y [M, K], dense."""
    run(kernels.geglu(*y.shape), {"x": x, "y": y, "width": y.shape[1]}, overlap)


def epilogue(
    acc: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    y: torch.Tensor,
    *,
    rotation: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "NONE",
    overlap: bool = False,
) -> None:
    """One launch on accumulators int32 [M, N] -> y [M, N] (GEGLU: [M, N / 2]), dense; `rotation` is [N/B, B, B]."""
    arguments: dict[str, Value] = {
        "acc": acc,
        "x_scale": x_scale,
        "weight_scale": weight_scale,
        "rotation": rotation,
        "bias": bias,
        "gate": gate,
        "residual": residual,
        "y": y,
        "rows": acc.shape[1],
        "scale_stride": int(x_scale.numel() > 1),
        "block": rotation.shape[-1] if rotation is not None else 0,
    }
    m, columns = y.shape
    run(kernels.epilogue(m, columns, TYPES[y.dtype], rotation is not None, activation), arguments, overlap)


def dequantize_weight(weight: torch.Tensor, scale: torch.Tensor, y: torch.Tensor, overlap: bool = False) -> None:
    """One launch on a packed INT4 weight -> y bf16 [N, K], dense."""
    n, k = y.shape
    arguments: dict[str, Value] = {"weight": weight, "weight_scale": scale, "y": y, "rows": n, "depth": k}
    run(kernels.dequantize_weight(n, k), arguments, overlap)


def gemm_float(
    tactic: GemmFloat,
    x: torch.Tensor,
    weight: torch.Tensor,
    y: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    *,
    n: int,
    bits: int = 16,
    epilogue: str = "NONE",
    squares: torch.Tensor | None = None,
    channel_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    tables: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    past: torch.Tensor | None = None,
    first_position: int = 0,
    to_cache: bool = False,
    epsilon: float = 1e-6,
    for_norm: ForNorm = NO_NORM,
    overlap: bool = False,
) -> None:
    """One launch on x [M, K], dense, and a packed weight [n, K] of `bits`; with `squares` [M, K / 16] the norm ahead; `k`
    and `v` are for ROTARY."""
    m, depth = x.shape
    arguments = {
        "x": x,
        "squares": squares,
        "weight": weight,
        "channel_scale": channel_scale,
        "bias": bias,
        "residual": residual,
        "y": y,
        "k": k,
        "v": v,
        "cosine": tables[0],
        "sine": tables[1],
        "past": past,
        "tokens": m,
        "rows": n,
        "depth": depth,
        "y_stride": y.stride(0),
        "kv_stride": k.stride(0) if k is not None else 0,
        "first_position": first_position,
        "to_cache": int(to_cache),
        "epsilon": epsilon,
    }
    instance = tactic.instance(m, n, TYPES[y.dtype], squares is not None, epilogue, bits)
    if tactic.split > 1 and not gpu().has_clusters:
        partial, counters = meeting_place(tactic.partial_words(m, n), tactic.groups(m, n))
        arguments |= {"partial": partial, "counters": counters}
    run(instance, arguments | for_norm.arguments, overlap)
