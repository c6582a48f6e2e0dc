"""How quantised weights are stored.

In graphs and plans for the CPU: INT4, two to a byte, the lower index in the low nibble (the raw data of ONNX's INT4).
For our CUDA kernels: in the order of the tensor cores' registers, see :func:`pack_fragments`.
"""
from __future__ import annotations

import numpy as np

from plugins.errors import LayoutError


def pack_int4(values: np.ndarray) -> np.ndarray:
    """Packs int8 [..., N] with values in -8..7 into uint8 [..., N / 2].

    Element 2i goes to the low nibble of byte i and element 2i + 1 to the high nibble, both in two's complement.
    Raises LayoutError when N is odd, the type is not int8, or a value does not fit four bits.
    """
    values = np.asarray(values)
    if values.dtype != np.int8:
        raise LayoutError(f"INT4 packing takes int8 values, got {values.dtype}")
    if values.ndim == 0 or values.shape[-1] % 2:
        raise LayoutError(f"INT4 packing needs an even last dimension, got shape {values.shape}")
    if values.size and (values.min() < -8 or values.max() > 7):
        raise LayoutError(f"INT4 holds -8..7, got values in {values.min()}..{values.max()}")
    nibbles = values.view(np.uint8)
    return (nibbles[..., 0::2] & 0x0F) | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of :func:`pack_int4`: uint8 (any shape, C order) -> int8 of ``shape``, values in -8..7.

    Raises LayoutError when ``shape`` does not hold exactly two values for every byte.
    """
    packed = np.asarray(packed)
    if packed.dtype != np.uint8:
        raise LayoutError(f"packed INT4 is uint8, got {packed.dtype}")
    if not shape or shape[-1] % 2 or 2 * packed.size != int(np.prod(shape)):
        raise LayoutError(f"{packed.size} bytes hold {2 * packed.size} INT4 values, which is not shape {tuple(shape)}")
    values = np.empty((packed.size, 2), np.int8)
    flat = packed.reshape(-1).view(np.int8)
    values[:, 0] = (flat << 4) >> 4  # the arithmetic shift right extends the sign of the low nibble
    values[:, 1] = flat >> 4
    return values.reshape(shape)


# The tensor core instructions mma.m16n8k32 and wgmma.m64nXk32 take a 16 x 32 INT8 tile of W as four 32-bit registers
# a0..a3 a lane. With lane = 4 g + t (g < 8, t < 4), byte i of register a[u + 2 h] is row 8 u + g and column 16 h + 4 t + i
# of the tile. A chunk of K = 64 feeds two instructions s = 0, 1. Any bijection between the 64 columns of W and the
# (s, h, t, i) serves as long as the activations are read by the same one:
#   "direct"   k = 16 t + 8 s + 4 h + i   a lane's activations are 16 consecutive bytes: one load from memory, no shuffle
#   "wgmma"    k = 32 s + 16 h + 4 t + i  the order in which wgmma reads activations from shared memory
_K_AXES = {"direct": "tshi", "wgmma": "shti"}
_K_SIZES = {"t": 4, "s": 2, "h": 2, "i": 4}
CHUNK_K = 64
TILE_N = 16


def pack_fragments(values: np.ndarray, bits: int, k_order: str = "direct") -> np.ndarray:
    """Packs a weight int8 [N, K] for the CUDA GEMMs; N a multiple of 16, K of 64.

    With n = 16 j + 8 u + g, k = 64 c + (the ``k_order`` above) and lane = 4 g + t:
      bits 4: uint8 [N/16, K/64, 32 lanes, 16]; byte 8 s + 4 u + i of a lane holds w[h = 0] in its low and w[h = 1] in
        its high nibble, so one 16-byte load a lane is the operand of two instructions, and `word << 4` and `word`,
        both masked with 0xF0F0F0F0, are 16 times registers h = 0 and h = 1;
      bits 8: uint8 [N/16, K/64, 2 steps s, 32 lanes, 16]; byte 8 h + 4 u + i is w itself.
    Raises LayoutError when the shape does not divide or an INT4 value is outside -8..7.
    """
    n, k = _check_fragments(values.shape, bits, k_order)
    if values.dtype != np.int8:
        raise LayoutError(f"fragments are packed from int8 values, got {values.dtype}")
    if bits == 4 and values.size and (values.min() < -8 or values.max() > 7):
        raise LayoutError(f"INT4 holds -8..7, got values in {values.min()}..{values.max()}")
    axes = "jugc" + _K_AXES[k_order]
    split = values.reshape(n // TILE_N, 2, 8, k // CHUNK_K, *(_K_SIZES[axis] for axis in _K_AXES[k_order]))
    if bits == 8:
        lanes = np.einsum(f"{axes}->jcsgthui", split)
        return np.ascontiguousarray(lanes).view(np.uint8).reshape(n // TILE_N, k // CHUNK_K, 2, 32, 16)
    nibbles = np.einsum(f"{axes}->hjcgtsui", split).view(np.uint8)
    return ((nibbles[0] & 0x0F) | (nibbles[1] << 4)).reshape(n // TILE_N, k // CHUNK_K, 32, 16)


def unpack_fragments(packed: np.ndarray, shape: tuple[int, int], bits: int, k_order: str = "direct") -> np.ndarray:
    """The inverse of :func:`pack_fragments`: uint8 (any shape, C order) -> int8 ``shape`` = [N, K]."""
    n, k = _check_fragments(shape, bits, k_order)
    if packed.dtype != np.uint8 or packed.size * 8 != n * k * bits:
        raise LayoutError(f"{packed.size} elements of {packed.dtype} are no {n} x {k} weight of {bits} bits")
    axes = "jugc" + _K_AXES[k_order]
    lead = (n // TILE_N, k // CHUNK_K)
    if bits == 8:
        lanes = packed.view(np.int8).reshape(*lead, 2, 8, 4, 2, 2, 4)
        return np.einsum(f"jcsgthui->{axes}", lanes).reshape(n, k)
    lanes = packed.view(np.int8).reshape(*lead, 8, 4, 2, 2, 4)
    nibbles = np.stack([(lanes << 4) >> 4, lanes >> 4])  # arithmetic shifts extend the sign
    return np.einsum(f"hjcgtsui->{axes}", nibbles).reshape(n, k)


def _check_fragments(shape: tuple[int, ...], bits: int, k_order: str) -> tuple[int, int]:
    if bits not in (4, 8) or k_order not in _K_AXES:
        raise LayoutError(f"fragments hold 4 or 8 bits in the order {' or '.join(_K_AXES)}, not {bits} in {k_order!r}")
    if len(shape) != 2 or shape[0] % TILE_N or shape[1] % CHUNK_K or 0 in shape:
        raise LayoutError(f"a weight of shape {tuple(shape)} does not divide into tiles of {TILE_N} x {CHUNK_K}")
    return shape


SLAB_K = 128


def activation_slabs(x_q: np.ndarray, block_tokens: int) -> np.ndarray:
    """Activations int8 [M, K] as the wgmma GEMM reads them: int8 [K/128, M', 128], M' = M padded to `block_tokens`.

    Within a slab, 16-byte piece p of token m stands at piece p ^ (m % 8) (the 128-byte swizzle of SM 90), so that the
    tokens of a thread block are one contiguous piece of memory. Padding is zero here; the kernel accepts anything.
    """
    m, k = x_q.shape
    if k % SLAB_K or block_tokens % 8:
        raise LayoutError(f"slabs need K in multiples of {SLAB_K} and tokens of 8, got {k} and {block_tokens}")
    padded = -(-m // block_tokens) * block_tokens
    pieces = np.zeros((k // SLAB_K, padded, 8, 16), np.int8)
    token = np.arange(m)[:, None]
    pieces[:, token, np.arange(8)[None] ^ (token % 8)] = x_q.reshape(m, -1, 8, 16).transpose(1, 0, 2, 3)
    return pieces.reshape(-1, padded, SLAB_K)
