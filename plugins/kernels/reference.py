"""What the numpy references of the kernels compute with: device memory as bytes, a launch's template and grid, formulas.

A reference computes from nothing but a launch's own arguments, template arguments and grid, on pointers into bytes.
Integers are exact; floats are float32, rounded to bf16 where they are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from duq.plugins.layout import HEAD_DIMS

TYPES: Mapping[str, type[np.generic]] = {
    "float": np.float32,
    "int": np.int32,
    "Bf16": np.uint16,
    "signed char": np.int8,
    "unsigned char": np.uint8,
}


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """The bits of bf16, uint16, as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest bf16 (half to even), uint16; every NaN as the one that the GPU stores."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


class Memory:
    """Bytes of the device, uint8, and the views that the current launch has taken of them."""

    def __init__(self, data: np.ndarray):
        self.data = data
        self.read: list[np.ndarray] = []
        self.written: list[np.ndarray] = []

    def end_launch(self) -> None:
        """Thread blocks run in any order: what one writes, no other may read, unless it is the very same element."""
        for written in self.written:
            for read in self.read:
                same = written.__array_interface__ == read.__array_interface__
                assert same or not np.shares_memory(written, read), "a launch overwrites what it reads"
        self.read, self.written = [], []


@dataclass(frozen=True)
class Pointer:
    """An address: `offset` bytes into `memory`."""

    memory: Memory
    offset: int = 0

    def read(self, kind: str, *shape: int, stride: int = 0, at: int = 0) -> np.ndarray:
        """A copy of `shape` elements from element `at` on; rows `stride` elements apart. bf16 comes as float32."""
        view = self._view(kind, shape, stride, at)
        self.memory.read.append(view)
        return from_bf16(view) if kind == "Bf16" else view.copy()

    def read_each(self, kind: str, count: int) -> np.ndarray:
        """A copy of elements that a kernel loads one at a time, so that they may lie anywhere."""
        view = self._view(kind, (count,), 0, 0, alignment=np.dtype(TYPES[kind]).itemsize)
        self.memory.read.append(view)
        return view.copy()

    def write(self, kind: str, values: np.ndarray, stride: int = 0, at: int = 0) -> None:
        """`values` from element `at` on, rows `stride` elements apart; float32 is rounded to bf16 where `kind` is Bf16."""
        view = self._view(kind, values.shape, stride, at)
        self.memory.written.append(view)
        view[...] = to_bf16(values) if kind == "Bf16" else values

    def _view(self, kind: str, shape: tuple[int, ...], stride: int, at: int, alignment: int = 16) -> np.ndarray:
        dtype = np.dtype(TYPES[kind])
        assert self.offset % alignment == 0, f"kernels load {alignment} bytes at a time"
        strides = (stride * dtype.itemsize, dtype.itemsize) if stride else None
        return np.ndarray(shape, dtype, self.memory.data, self.offset + at * dtype.itemsize, strides)  # checks the bounds


@dataclass(frozen=True)
class Launched:
    """One launch, as its reference sees it: the kernel's name, its template arguments by name, and its shape."""

    kernel: str
    template: Mapping[str, str] = field(default_factory=dict)
    grid: tuple[int, int, int] = (1, 1, 1)
    threads: int = 1
    cluster: tuple[int, int, int] = (1, 1, 1)

    @property
    def split(self) -> int:
        """Thread blocks in a cluster."""
        x, y, z = self.cluster
        return x * y * z

    def __getitem__(self, name: str) -> str:
        """A template argument, as C++ spells it."""
        return self.template[name]

    def number(self, name: str) -> int:
        return int(self.template[name])


# Formulas


def affine(v: np.ndarray, gain: Pointer | None = None, shift: Pointer | None = None) -> np.ndarray:
    """v * gain + shift, each float32 of v's last dimension or null."""
    v = v if gain is None else v * gain.read("float", v.shape[-1])
    return v if shift is None else v + shift.read("float", v.shape[-1])


def rms_norm(v: np.ndarray, epsilon: float) -> np.ndarray:
    return v * (1 / np.sqrt((v * v).mean(-1, keepdims=True) + np.float32(epsilon)))


def gelu(v: np.ndarray) -> np.ndarray:
    return 0.5 * v * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (v + 0.044715 * v**3)))


def silu(v: np.ndarray) -> np.ndarray:
    return v / (1 + np.exp(-v))


def geglu_of_16(v: np.ndarray) -> np.ndarray:
    """GeGLU of columns as plugins.layout.interleave_gate_up has them: of every 16, 8 are of the gate and 8 of up."""
    gate, up = v.reshape(len(v), -1, 2, 8).transpose(2, 0, 1, 3)
    return (gelu(gate) * up).reshape(len(v), -1)


ACTIVATIONS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "NONE": lambda v: v,
    "GELU": gelu,
    "SILU": silu,
    "GEGLU": geglu_of_16,
}
"""By the name of a GEMM's epilogue."""


def rotate_positions(v: np.ndarray, cosine: Pointer, sine: Pointer, position: int) -> np.ndarray:
    """Rotary embedding of [tokens, heads, dims], token i at position + i."""
    half = v.shape[-1] // 2
    c, s = (table.read("float", len(v), 1, half, at=position * half) for table in (cosine, sine))
    first, second = v[..., :half], v[..., half:]
    return np.concatenate([first * c - second * s, second * c + first * s], axis=-1)


def write_heads(
    qkv: np.ndarray,
    kind: str,
    y: Pointer,
    k: Pointer | None,
    v: Pointer | None,
    cosine: Pointer | None,
    sine: Pointer | None,
    past: Pointer | None,
    y_stride: int,
    kv_stride: int,
    first_position: int,
    to_cache: int,
) -> None:
    """What the epilogues ROTARY make of qkv [tokens, N], whose columns are as plugins.layout.interleave_rotary has them: q and k
    turned; q goes to y, k and v to rows of their own, with `to_cache` to those of the tokens' positions."""
    assert k is not None and v is not None and cosine is not None and sine is not None
    tokens, position = len(qkv), position_of(first_position, past)
    pairs = qkv[:, :-HEAD_DIMS].reshape(tokens, -1, HEAD_DIMS // 16, 2, 8).transpose(0, 1, 3, 2, 4)
    turned = rotate_positions(pairs.reshape(tokens, -1, HEAD_DIMS), cosine, sine, position)
    y.write(kind, turned[:, :-1].reshape(tokens, -1), y_stride)
    first_row = position if to_cache else 0
    for to, part in ((k, turned[:, -1]), (v, qkv[:, -HEAD_DIMS:])):
        to.write(kind, part, kv_stride, at=first_row * kv_stride)


def rotate_blocks(v: np.ndarray, rotation: Pointer, block: int) -> np.ndarray:
    """v [tokens, channels] @ blockdiag(rotation), rotation float32 [channels / block, block, block]."""
    (m, channels), size = v.shape, (block, block)
    assert channels % block == 0
    matrices = rotation.read("float", channels // block, *size)
    return np.einsum("mki,kij->mkj", v.reshape(m, -1, block), matrices).reshape(m, channels)


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def hadamard(size: int) -> np.ndarray:
    """The orthogonal Hadamard matrix of a power of two, in Sylvester's order."""
    h = np.ones((1, 1), np.float32)
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    return h / np.float32(np.sqrt(size))


def position_of(first_position: int, past: Pointer | None) -> int:
    """The position of token 0: some kernels count from a number in device memory."""
    return first_position + (int(past.read("int", 1).item()) if past is not None else 0)


def leave_for_norm(
    y: np.ndarray, normed: Pointer | None, normed_gain: Pointer | None, normed_squares: Pointer | None
) -> None:
    """What a launch leaves for a norm of its y (common.cuh, ForNorm): y * gain, and sums of y^2 over every 16 channels."""
    if normed is None:
        return
    assert normed_squares is not None
    normed.write("Bf16", affine(y, normed_gain))
    normed_squares.write("float", (y * y).reshape(len(y), -1, 16).sum(-1))


def padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
