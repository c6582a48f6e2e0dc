"""The CUDA kernels in numpy: what the comment at the head of each source says, in a few lines.

Each is computed from nothing but a launch's own arguments, template parameters and grid, on pointers into bytes. Integers
are exact; floats are float32, rounded to bf16 where they are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from duq.compiler.targets.cuda.program import LIBRARY, MATMUL
from duq.compiler.targets.cuda.weights import to_bf16
from duq.plugins.layout import activation_slabs, unpack_float_fragments, unpack_fragments, unpack_int4_fragments

TYPES = {"float": np.float32, "int": np.int32, "Bf16": np.uint16, "signed char": np.int8, "unsigned char": np.uint8}
NUMBERS = {4: "float", 2: "Bf16"}  # by their size: how library calls name a type


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded_to_bf16(values: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(values), np.uint16(0x7FFF), to_bf16(values))


class Memory:
    """Bytes, and the views that the current launch has taken of them."""

    def __init__(self, data: np.ndarray):
        self.data, self.read, self.written = data, [], []

    def end_launch(self) -> None:
        """Thread blocks run in any order: what one writes, no other may read, unless it is the very same element."""
        for written in self.written:
            for read in self.read:
                same = written.__array_interface__ == read.__array_interface__
                assert same or not np.shares_memory(written, read), "a launch overwrites what it reads"
        self.read, self.written = [], []


@dataclass(frozen=True)
class Pointer:
    memory: Memory
    offset: int

    def read(self, kind: str, *shape: int, stride: int = 0, at: int = 0) -> np.ndarray:
        """A copy of `shape` elements from element `at` on; rows `stride` elements apart. bf16 comes as float32."""
        view = self._view(kind, shape, stride, at)
        self.memory.read.append(view)
        return from_bf16(view) if kind == "Bf16" else view.copy()

    def write(self, kind: str, values: np.ndarray, stride: int = 0, at: int = 0) -> None:
        view = self._view(kind, values.shape, stride, at)
        self.memory.written.append(view)
        view[...] = rounded_to_bf16(values) if kind == "Bf16" else values

    def _view(self, kind: str, shape: tuple[int, ...], stride: int, at: int) -> np.ndarray:
        dtype = np.dtype(TYPES[kind])
        assert self.offset % 16 == 0, "kernels load 16 bytes at a time"
        strides = (stride * dtype.itemsize, dtype.itemsize) if stride else None
        return np.ndarray(shape, dtype, self.memory.data, self.offset + at * dtype.itemsize, strides)  # checks the bounds


class Launch(NamedTuple):
    kernel: str
    template: list[str]
    grid: tuple[int, int, int]
    threads: int
    split: int  # thread blocks in a cluster


# What enters the transformers: embed.cu


def patches(launch: Launch, images, y, size, pitch):
    pixels = images.read("unsigned char", launch.grid[1], size, size, 3) / np.float32(127.5) - np.float32(1)
    _write_patches(launch, pixels, y, pitch)


def float_patches(launch: Launch, images, y, size, pitch):
    _write_patches(launch, images.read("float", launch.grid[1], size, size, 3), y, pitch)


def _write_patches(launch: Launch, pixels: np.ndarray, y, pitch: int) -> None:
    patch, (count, cameras, _) = int(launch.template[0]), launch.grid
    across = pixels.shape[1] // patch
    assert count == across**2
    pixels = pixels.reshape(cameras, across, patch, across, patch, 3)
    rows = pixels.transpose(0, 1, 3, 5, 2, 4).reshape(cameras * count, -1)
    y.write("Bf16", np.pad(rows, ((0, 0), (0, pitch - rows.shape[1]))))


def tokens(launch: Launch, rows, y, depth, y_stride, scale):
    y.write("float", rows.read("Bf16", launch.grid[0], depth) * np.float32(scale), y_stride)


# Norms and quantizers: normalize.cu, rotate_quantize.cu, hadamard_quantize.cu


def normalize(launch: Launch, x, gain, shift, y, depth, x_stride, y_stride, epsilon):
    in_type, out_type, center, vectors = launch.template
    assert 8 * int(vectors) * launch.threads >= depth
    v = x.read(in_type, launch.grid[0], depth, stride=x_stride)
    if center == "true":
        v -= v.mean(-1, keepdims=True)
    y.write(out_type, _affine(_rms_norm(v, epsilon), gain, shift), y_stride)


def rotate_quantize(launch: Launch, x, gain, shift, input_scale, permutation, rotation, activation_scale, x_q, x_scale,
                    depth, padded_depth, row_stride, block, slab_tokens, epsilon):  # fmt: skip
    in_type, source, how, vectors, out = launch.template
    assert 8 * int(vectors) * launch.threads >= padded_depth >= depth
    m = launch.grid[0]
    v = x.read(in_type, m, depth, stride=row_stride)
    if source == "GEGLU":
        v = _gelu(v) * x.read(in_type, m, depth, stride=row_stride, at=depth)
    if source == "LAYER_NORM":
        v -= v.mean(-1, keepdims=True)
    if source in ("RMS_NORM", "LAYER_NORM"):
        v = _rms_norm(v, epsilon)
    v = _affine(_affine(v, gain, shift), input_scale)
    if permutation is not None:
        v = v[:, permutation.read("int", depth)]
    if how == "DENSE":
        matrices = rotation.read("float", depth // block, block, block)
        v = np.einsum("mki,kij->mkj", v.reshape(m, -1, block), matrices).reshape(m, depth)
    elif how not in ("NONE", "0"):
        v = (v.reshape(m, -1, int(how)) @ _hadamard(int(how))).reshape(m, depth)

    if out == "Bf16":
        x_q.write(out, v)
        return
    if activation_scale is not None:
        scale = np.broadcast_to(activation_scale.read("float", 1), (m, 1))
    else:
        scale = np.maximum(np.abs(v).max(-1, keepdims=True), np.float32(1e-12)) / np.float32(127)
    x_scale.write("float", scale[:, 0])
    with np.errstate(invalid="ignore"):  # rows of padding are NaN, and so is their scale
        values = np.clip(np.round(v / scale), -128, 127).astype(np.int8)
    values = np.pad(values, ((0, 0), (0, padded_depth - depth)))
    if slab_tokens:
        slabs = activation_slabs(values, slab_tokens)[:, :m]
        x_q.write("signed char", slabs.reshape(len(slabs), -1), slab_tokens * 128)
    else:
        x_q.write("signed char", values)


def hadamard_quantize(launch: Launch, x, x_q, x_scale, tokens, depth, row_stride, slab_tokens):
    assert depth % 1024 == 0 and 32 * launch.threads == depth
    template = ["Bf16", "PLAIN", "64", str(depth // (8 * launch.threads)), "signed char"]
    plain = launch._replace(template=template, grid=(tokens, 1, 1))
    none = [None] * 6
    rotate_quantize(plain, x, *none, x_q, x_scale, depth, depth, row_stride, 0, slab_tokens, 0.0)


# Products: gemm_small.cu, gemm_large.cu, gemm_wgmma.cu, gemm_float.cu, linear_narrow.cu, and the library's


def gemm(launch: Launch, x_q, x_scale, weight, weight_scale, bias, residual, y, workspace, m, n, k, *for_norm):
    bits, *tile, finish, out_type = launch.template
    w = unpack_fragments(
        weight.read("unsigned char", n * k * int(bits) // 8), (n, k), int(bits), _check_tiles(launch, m, n)
    )
    if launch.kernel.startswith("gemm_wgmma"):
        padded = _padded(m, 8 * int(tile[0 if launch.kernel == "gemm_wgmma_few" else 1]))
        pieces = x_q.read("signed char", k // 128, padded, 8, 16)
        token = np.arange(m)[:, None]
        x = pieces[:, token, np.arange(8) ^ token % 8].transpose(1, 0, 2, 3).reshape(m, k)
    else:
        x = x_q.read("signed char", m, k)
    if launch.kernel == "gemm_small" and launch.grid[1] > launch.split:  # no cluster: sums pass through the workspace
        padded = _padded(m, 8 * int(tile[1]))
        assert not workspace.read("int", padded * n + launch.grid[0] * launch.grid[2]).any()
    acc = x.astype(np.float64) @ w.astype(np.float64).T  # exact: below 2^53
    if out_type == "int":
        assert finish == "NONE"
        y.write("int", acc.astype(np.int32))
        return
    v = (acc.astype(np.float32) * weight_scale.read("float", n)) * x_scale.read("float", m)[:, None]
    v = _affine(v, None, bias)
    assert finish == "NONE" or residual is None
    v = {"NONE": np.asarray, "GELU": _gelu, "GEGLU": _geglu_of_16}[finish](v)
    v = v if residual is None else v + residual.read(out_type, m, n)
    y.write(out_type, v)
    _leave_for_norm(v, *for_norm)


def dequantize(launch: Launch, acc, x_scale, weight_scale, rotation, bias, gate, residual, y, n, scale_stride, block):
    out_type, rotate, finish = launch.template
    m, columns = launch.grid[1], n // 2 if finish == "GEGLU" else n
    assert launch.grid[0] * 1024 >= columns and columns % 4 == 0 and (rotate == "true") == (rotation is not None)
    scale = x_scale.read("float", m if scale_stride else 1)[:, None]
    v = (acc.read("int", m, n).astype(np.float32) * weight_scale.read("float", n)) * scale
    if rotation is not None:
        assert columns % block == 0
        matrices = rotation.read("float", n // block, block, block)
        v = np.einsum("mki,kij->mkj", v.reshape(m, -1, block), matrices).reshape(m, n)
    v = _affine(_affine(v, None, bias), gate)
    v = _gelu(v[:, :columns]) * v[:, columns:] if finish == "GEGLU" else _gelu(v) if finish == "GELU" else v
    y.write(out_type, v if residual is None else v + residual.read(out_type, m, columns))


def _check_tiles(launch: Launch, m: int, n: int) -> str:
    """The grid covers all of y; returns the layout of the weight."""
    _, *tile, _, _ = launch.template
    a, b, c, d = map(int, tile[:4])
    rows, tokens = {
        "gemm_small": (16 * a, 8 * b),
        "gemm_large": (16 * a * c, 8 * b * d),
        "gemm_wgmma": (64 * a, 8 * b),
        "gemm_wgmma_few": (64, 8 * a),
    }[launch.kernel]
    across, down = n // rows, -(-m // tokens)
    assert n % rows == 0
    if launch.kernel == "gemm_small":
        assert launch.grid[::2] == (across, down)
    elif launch.kernel == "gemm_large":
        assert launch.grid == (down, across, 1)
    elif launch.kernel == "gemm_wgmma_few":
        assert launch.split == d and launch.grid == (across * d, down, 1)
    else:
        assert launch.split == d and (d == 1 or launch.grid[0] == across * down * d)  # without a split, persistent
    return "wgmma" if launch.kernel.startswith("gemm_wgmma") else "direct"


def _leave_for_norm(y: np.ndarray, x, gain, squares) -> None:
    if x is not None:
        x.write("Bf16", _affine(y, gain))
        squares.write("float", (y * y).reshape(len(y), -1, 16).sum(-1))


def gemm_float(launch: Launch, x, squares, weight, channel_scale, bias, residual, y, k, v, cosine, sine, past,
               m, n, depth, y_stride, kv_stride, first_position, to_cache, epsilon, *for_norm):  # fmt: skip
    rows16, tokens8, _, _, split, norm, finish, out_type, bits = launch.template
    assert launch.grid == (n // (16 * int(rows16)), int(split), -(-m // (8 * int(tokens8))))
    if bits == "4":
        w = unpack_int4_fragments(weight.read("unsigned char", n * _padded(depth, 64) // 2), (n, depth)).astype(np.float32)
    else:
        w = from_bf16(unpack_float_fragments(weight.read("unsigned char", 2 * n * depth), (n, depth)))
    product = x.read("Bf16", m, depth) @ w.T
    if norm == "true":
        mean = squares.read("float", m, depth // 16).sum(-1, keepdims=True) / np.float32(depth)
        product = product / np.sqrt(mean + np.float32(epsilon))
    product = _affine(product, channel_scale, bias)
    if finish == "ROTARY":
        dims = 256
        position = first_position + (past.read("int", 1).item() if past else 0)
        pairs = product[:, :-dims].reshape(m, -1, dims // 16, 2, 8).transpose(0, 1, 3, 2, 4).reshape(m, -1, dims)
        turned = _turn(pairs, cosine, sine, position)
        y.write(out_type, turned[:, :-1].reshape(m, -1), y_stride)
        first_row = position if to_cache else 0
        for to, part in ((k, turned[:, -1]), (v, product[:, -dims:])):
            to.write(out_type, part, kv_stride, at=first_row * kv_stride)
        return
    if finish == "NONE" and residual is not None:
        product = product + residual.read("float", m, n, stride=y_stride)
    product = {"NONE": np.asarray, "SILU": _silu, "GEGLU": _geglu_of_16}[finish](product)
    y.write(out_type, product, y_stride)
    if (finish, out_type) == ("NONE", "float"):
        _leave_for_norm(product, *for_norm)


def expand(launch: Launch, weight, scale, y, n, k):
    assert launch.grid[0] * 8 >= n // 16 * -(-k // 64) and launch.threads == 256
    w = unpack_int4_fragments(weight.read("unsigned char", n * _padded(k, 64) // 2), (n, k))
    y.write("Bf16", w * scale.read("float", n)[:, None])


def linear_narrow(launch: Launch, x, weight, bias, y, depth, columns, *for_norm):
    activation, out_type, count = launch.template
    assert depth <= 64 and launch.grid[0] * 16 == columns
    v = _affine(x.read("float", int(count), depth) @ weight.read("float", depth, columns), None, bias)
    v = _silu(v) if activation == "SILU" else v
    y.write(out_type, v)
    if out_type == "float":
        _leave_for_norm(v, *for_norm)


def flow_step(launch: Launch, x, gain, shift, weight, bias, flow, depth, epsilon):
    columns, m = int(launch.template[0]), launch.grid[1]
    assert launch.grid[0] * 16 == columns
    v = _affine(_rms_norm(x.read("float", m, depth), epsilon), gain, shift)
    step = _affine(v @ weight.read("float", depth, columns), None, bias)
    flow.write("float", flow.read("float", m, columns) + step)


def matmul(launch: Launch, *arguments):
    a = dict(zip(MATMUL, arguments, strict=True))
    m, n, k, out_type = a["m"], a["n"], a["k"], NUMBERS[a["y_type"]]
    w = a["weight"].read("Bf16", n, k)
    for index in range(a["batch"]):
        v = a["x"].read("Bf16", m, k, stride=a["x_stride"], at=index * m * a["x_stride"]) @ w.T
        if a["bias"] is not None:
            v = v + a["bias"].read(out_type, n)
        v = _gelu(v) if a["gelu"] else v
        if a["addend"] is not None:
            v = v + a["addend"].read(out_type, m, n, stride=a["y_stride"], at=index * a["addend_batch_stride"])
        a["y"].write(out_type, v, a["y_stride"], at=index * m * a["y_stride"])


# Between the products: geglu.cu, rotary.cu, attention.cu, attention_wgmma.cu


def geglu(launch: Launch, x, y, width):
    m = launch.grid[1]
    assert launch.grid[0] * 8 * launch.threads >= width
    gate, up = np.split(x.read("Bf16", m, 2 * width), 2, axis=-1)
    y.write("Bf16", _gelu(gate) * up)


def rotary(launch: Launch, qkv, cosine, sine, k_cache, v_cache, past, first_position, stride, cache_stride):
    heads, dims = map(int, launch.template)
    m = launch.grid[0]
    assert launch.threads == (heads + 2) * dims // 16
    position = first_position + (past.read("int", 1).item() if past else 0)
    for head in range(heads + 2):
        v = qkv.read("Bf16", m, dims, stride=stride, at=head * dims)
        v = _turn(v[:, None], cosine, sine, position)[:, 0] if head <= heads else v
        cache = [k_cache, v_cache][head - heads] if head >= heads else None
        if cache is not None:
            cache.write("Bf16", v, cache_stride, at=position * cache_stride)
        elif head <= heads:
            qkv.write("Bf16", v, stride, at=head * dims)


def attention(launch: Launch, q, k, v, own_k, own_v, out, past, m, keys, own_keys, q_stride, kv_stride, own_stride,
              out_stride, cache_ready, scale):  # fmt: skip
    wgmma = launch.kernel == "attention_wgmma"
    dims, heads, rows = (256, *map(int, launch.template[:2])) if wgmma else map(int, launch.template[:3])
    blocks, kv_heads, images = launch.grid
    assert blocks == -(-m * heads // ((64 if wgmma else 16) * rows)) * launch.split
    keys += past.read("int", 1).item() if past else 0
    for image in range(images):
        for group in range(kv_heads):
            first, columns = group * dims, group * heads * dims
            matrices = [
                each.read("Bf16", keys, dims, stride=kv_stride, at=image * keys * kv_stride + first) for each in (k, v)
            ]
            if own_keys:
                own = [each.read("Bf16", own_keys, dims, stride=own_stride) for each in (own_k, own_v)]
                matrices = [np.concatenate(pair) for pair in zip(matrices, own)]
            for head in range(heads):
                at = columns + head * dims
                queries = q.read("Bf16", m, dims, stride=q_stride, at=image * m * q_stride + at)
                result = _softmax(queries @ matrices[0].T * np.float32(scale)) @ matrices[1]
                out.write("Bf16", result, out_stride, at=image * m * out_stride + at)


KERNELS: dict[str, Callable] = {
    each.__name__: each
    for each in (
        patches,
        float_patches,
        tokens,
        normalize,
        rotate_quantize,
        hadamard_quantize,
        dequantize,
        expand,
        gemm_float,
        linear_narrow,
        flow_step,
        geglu,
        rotary,
        attention,
    )  # fmt: skip
} | {
    "gemm_small": gemm,
    "gemm_large": gemm,
    "gemm_wgmma": gemm,
    "gemm_wgmma_few": gemm,
    "attention_wgmma": attention,
    LIBRARY: matmul,
}


# Formulas


def _affine(v: np.ndarray, gain: Pointer | None = None, shift: Pointer | None = None) -> np.ndarray:
    v = v if gain is None else v * gain.read("float", v.shape[-1])
    return v if shift is None else v + shift.read("float", v.shape[-1])


def _inverse_rms(v: np.ndarray, epsilon: float) -> np.ndarray:
    return 1 / np.sqrt((v * v).mean(-1, keepdims=True) + np.float32(epsilon))


def _rms_norm(v: np.ndarray, epsilon: float) -> np.ndarray:
    return v * _inverse_rms(v, epsilon)


def _gelu(v: np.ndarray) -> np.ndarray:
    return 0.5 * v * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (v + 0.044715 * v**3)))


def _silu(v: np.ndarray) -> np.ndarray:
    return v / (1 + np.exp(-v))


def _geglu_of_16(v: np.ndarray) -> np.ndarray:
    """Of every 16 columns 8 are of the gate and 8 of up."""
    gate, up = v.reshape(len(v), -1, 2, 8).transpose(2, 0, 1, 3)
    return (_gelu(gate) * up).reshape(len(v), -1)


def _turn(v: np.ndarray, cosine: Pointer, sine: Pointer, position: int) -> np.ndarray:
    """Rotary embedding of [tokens, heads, dims], token i at position + i."""
    half = v.shape[-1] // 2
    c, s = (table.read("float", len(v), 1, half, at=position * half) for table in (cosine, sine))
    first, second = v[..., :half], v[..., half:]
    return np.concatenate([first * c - second * s, second * c + first * s], axis=-1)


def _softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _hadamard(size: int) -> np.ndarray:
    h = np.ones((1, 1), np.float32)
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    return h / np.float32(np.sqrt(size))


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
