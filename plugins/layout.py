"""How quantized weights are stored.

In graphs and plans for the CPU: INT4, two to a byte, the lower index in the low nibble (the raw data of ONNX's INT4).
For our CUDA kernels: in the order of the tensor cores' registers, see :func:`pack_fragments`.
For the kernels that BitBLAS generates: row-major and unsigned, see :func:`pack_bitblas`.
"""

from __future__ import annotations

import numpy as np

from duq.plugins.errors import LayoutError


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
# a0..a3 a lane. With lane = 4 g + t (g < 8, t < 4), byte i of register a[u + 2 h] is row 8 u + g and column
# 16 h + 4 t + i of the tile. Two instructions s = 0, 1 make a tile of 16 x 64. Any bijection between its 64 columns and
# (s, h, t, i) serves as long as the activations are read by the same one. There are two layouts:
#   "direct"  k = 16 t + 8 s + 4 h + i: a lane's activations are 16 consecutive bytes, one load from memory, no shuffle.
#             Tiles are stored [N/16, K/64].
#   "wgmma"   k = 32 s + 16 h + 4 t + i: the order in which wgmma reads activations from shared memory.
#             Tiles are stored [N/64, K/128, 4, 2]: what a warpgroup needs for a step of K = 128 is one piece of memory.
_K_AXES = {"direct": "tshi", "wgmma": "shti"}
_K_SIZES = {"t": 4, "s": 2, "h": 2, "i": 4}
_BLOCKS = {"direct": (1, 1), "wgmma": (4, 2)}
CHUNK_K = 64
TILE_N = 16


def pack_fragments(values: np.ndarray, bits: int, layout: str = "direct") -> np.ndarray:
    """Packs a weight int8 [N, K] for the CUDA GEMMs as uint8 [N/16 x K/64 tiles in the layout's order, tile].

    "direct" needs N a multiple of 16 and K of 64, "wgmma" of 64 and 128. With row 8 u + g and column k(s, h, t, i) of a
    tile as above and lane = 4 g + t, a tile is
      bits 4: [32 lanes, 16]; byte 8 s + 4 u + i of a lane holds w[h = 0] in its low and w[h = 1] in its high nibble, so
        one 16-byte load a lane is the operand of two instructions, and `word << 4` and `word`, both masked with
        0xF0F0F0F0, are 16 times registers h = 0 and h = 1;
      bits 8: [2 steps s, 32 lanes, 16]; byte 8 h + 4 u + i is w itself.
    Raises LayoutError when the shape does not divide or an INT4 value is outside -8..7.
    """
    n, k = _check_fragments(values.shape, bits, layout)
    if values.dtype != np.int8:
        raise LayoutError(f"fragments are packed from int8 values, got {values.dtype}")
    if bits == 4 and values.size and (values.min() < -8 or values.max() > 7):
        raise LayoutError(f"INT4 holds -8..7, got values in {values.min()}..{values.max()}")
    # The four i are neighbors in W and in the tiles: they move as one word.
    words = np.ascontiguousarray(values).view(np.uint32).reshape(_split_shape(n, k, layout)[:-1])
    axes = _axes(layout)[:-1]
    if bits == 8:
        tiles = np.einsum(f"{axes}->njcmsgthu", words)
    else:
        low, high = np.einsum(f"{axes}->hnjcmgtsu", words)
        tiles = (low & 0x0F0F0F0F) | (high << 4 & 0xF0F0F0F0)
    return np.ascontiguousarray(tiles).view(np.uint8).reshape(-1, 2 * bits * CHUNK_K)


def unpack_fragments(packed: np.ndarray, shape: tuple[int, int], bits: int, layout: str = "direct") -> np.ndarray:
    """The inverse of :func:`pack_fragments`: uint8 (any shape, C order) -> int8 ``shape`` = [N, K]."""
    n, k = _check_fragments(shape, bits, layout)
    if packed.dtype != np.uint8 or packed.size * 8 != n * k * bits:
        raise LayoutError(f"{packed.size} elements of {packed.dtype} are no {n} x {k} weight of {bits} bits")
    rows, columns = _BLOCKS[layout]
    tiles = (n // (TILE_N * rows), k // (CHUNK_K * columns), rows, columns)
    if bits == 8:
        values = packed.view(np.int8).reshape(*tiles, 2, 8, 4, 2, 2, 4)
        return np.einsum(f"njcmsgthui->{_axes(layout)}", values).reshape(n, k)
    values = packed.view(np.int8).reshape(*tiles, 8, 4, 2, 2, 4)
    nibbles = np.stack([(values << 4) >> 4, values >> 4])  # arithmetic shifts extend the sign
    return np.einsum(f"hnjcmgtsui->{_axes(layout)}", nibbles).reshape(n, k)


def _axes(layout: str) -> str:
    """The axes of W split as below: block n, its tile c, row u g; block j, its tile m, column."""
    return "ncugjm" + _K_AXES[layout]


def _split_shape(n: int, k: int, layout: str) -> tuple[int, ...]:
    rows, columns = _BLOCKS[layout]
    column = (_K_SIZES[axis] for axis in _K_AXES[layout])
    return (n // (TILE_N * rows), rows, 2, 8, k // (CHUNK_K * columns), columns, *column)


def _check_fragments(shape: tuple[int, ...], bits: int, layout: str) -> tuple[int, int]:
    if bits not in (4, 8) or layout not in _K_AXES:
        raise LayoutError(f"fragments hold 4 or 8 bits, laid out {' or '.join(_K_AXES)}; not {bits}, {layout!r}")
    rows, columns = TILE_N * _BLOCKS[layout][0], CHUNK_K * _BLOCKS[layout][1]
    if len(shape) != 2 or shape[0] % rows or shape[1] % columns or 0 in shape:
        raise LayoutError(f"a weight of shape {tuple(shape)} does not divide into blocks of {rows} x {columns}")
    return shape


def interleave_gate_up(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Rows of gate and up (each [H, ...]) as the GEMMs' GeGLU epilogue wants them: 8 of gate, their 8 of up, and so on.

    Returns [2 H, ...]; for weights before they are packed, and for their scales and biases. Raises LayoutError unless
    the shapes are equal and H a multiple of 8.
    """
    if gate.shape != up.shape or gate.shape[0] % 8:
        raise LayoutError(f"gate {gate.shape} and up {up.shape} must be equal with rows in multiples of 8")
    pairs = np.stack([part.reshape(-1, 8, *part.shape[1:]) for part in (gate, up)], axis=1)
    return pairs.reshape(-1, *gate.shape[1:])


def interleave_rotary(qkv: np.ndarray, dims: int = 256) -> np.ndarray:
    """Rows [q heads, k, v] ([N, ...], `dims` rows a head) as the ROTARY epilogue of gemm_float.cu wants them.

    A rotation turns channel c with c + dims / 2; for q and k, 8 of the first half of a head are followed by their 8 of
    the second. The rows of v stay in order. Raises LayoutError unless there are whole heads, of a multiple of 16 rows.
    """
    if dims % 16 or qkv.shape[0] % dims or qkv.shape[0] < 3 * dims:
        raise LayoutError(f"{qkv.shape[0]} rows are no queries, keys and values of heads of {dims}")
    halves = qkv[:-dims].reshape(-1, 2, dims // 2, *qkv.shape[1:])
    turned = [interleave_gate_up(first, second) for first, second in halves]
    return np.concatenate([*turned, qkv[-dims:]])


FLOAT_TILE = 16


def pack_float_fragments(values: np.ndarray) -> np.ndarray:
    """Packs a weight [N, K], bf16 viewed as uint16, for gemm_float.cu: uint8 [N/16 x K/16 tiles, 512].

    mma.m16n8k16 takes a 16 x 16 tile of W as four registers a0..a3 a lane, two values each. With lane = 4 g + t, value
    i of register a[u + 2 h] is row 8 u + g and column 8 h + 2 t + i of the instruction, which is given column
    4 t + 2 h + i of the tile: a lane then needs 4 consecutive channels of a token, one load, and the four lanes of a
    token 16 of them, whole sectors. A tile is [32 lanes, a0..a3]: one 16-byte load a lane.
    Raises LayoutError for another type or a shape that does not divide by 16.
    """
    if values.dtype != np.uint16:
        raise LayoutError(f"float fragments are packed from bf16 viewed as uint16, got {values.dtype}")
    n, k = _check_float_fragments(values.shape)
    pairs = np.ascontiguousarray(values).view(np.uint32).reshape(n // FLOAT_TILE, 2, 8, k // FLOAT_TILE, 4, 2)
    tiles = np.einsum("nugjth->njgthu", pairs)
    return np.ascontiguousarray(tiles).view(np.uint8).reshape(-1, 2 * FLOAT_TILE**2)


def unpack_float_fragments(packed: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The inverse of :func:`pack_float_fragments`: uint8 (any shape, C order) -> uint16 ``shape`` = [N, K]."""
    n, k = _check_float_fragments(shape)
    if packed.dtype != np.uint8 or packed.size != 2 * n * k:
        raise LayoutError(f"{packed.size} elements of {packed.dtype} are no {n} x {k} weight of bf16")
    tiles = packed.view(np.uint16).reshape(n // FLOAT_TILE, k // FLOAT_TILE, 8, 4, 2, 2, 2)
    return np.einsum("njgthui->nugjthi", tiles).reshape(n, k)


def _check_float_fragments(shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 2 or shape[0] % FLOAT_TILE or shape[1] % FLOAT_TILE or 0 in shape:
        raise LayoutError(f"a weight of shape {tuple(shape)} does not divide into tiles of {FLOAT_TILE} x {FLOAT_TILE}")
    return shape


def pack_int4_fragments(values: np.ndarray) -> np.ndarray:
    """Packs a weight int8 [N, K] with values in -8..7 as tensor core fragments of a float GEMM (int4.cuh).

    Tiles and lanes are those of :func:`pack_float_fragments`; a lane's 8 values of a tile are one word, value i of register
    a[r] plus 8 in nibble r + 4 i, and the words of four tiles, K = 64, are side by side. K is filled up with zeros to whole
    chunks of 64. Returns uint8 [N/16 x K/64 chunks, 512]. Raises LayoutError for another type, a value that does not fit,
    or a shape that does not divide by 16.
    """
    n, k = _check_float_fragments(values.shape)
    if values.dtype != np.int8 or (values.size and (values.min() < -8 or values.max() > 7)):
        raise LayoutError(f"INT4 fragments are packed from int8 in -8..7, got {values.dtype}")
    chunks = -(-k // CHUNK_K)
    filled = np.pad(values, ((0, 0), (0, chunks * CHUNK_K - k)))
    nibbles = (filled + 8).view(np.uint8).reshape(n // FLOAT_TILE, 2, 8, chunks, 4, 4, 2, 2)  # row u g; tile, column t h i
    words = np.zeros((n // FLOAT_TILE, 8, chunks, 4, 4), np.uint32)
    for u, h, i in np.ndindex(2, 2, 2):
        words |= nibbles[:, u, :, :, :, :, h, i].astype(np.uint32) << np.uint32(4 * (u + 2 * h + 4 * i))
    return np.ascontiguousarray(words.transpose(0, 2, 1, 4, 3)).view(np.uint8).reshape(-1, 512)


def unpack_int4_fragments(packed: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The inverse of :func:`pack_int4_fragments`: uint8 (any shape, C order) -> int8 ``shape`` = [N, K]."""
    n, k = _check_float_fragments(shape)
    chunks = -(-k // CHUNK_K)
    if packed.dtype != np.uint8 or packed.size * 2 != n * chunks * CHUNK_K:
        raise LayoutError(f"{packed.size} elements of {packed.dtype} are no {n} x {k} weight of INT4")
    words = np.ascontiguousarray(packed).view(np.uint32).reshape(n // FLOAT_TILE, chunks, 8, 4, 4)
    values = np.empty((n // FLOAT_TILE, 2, 8, chunks, 4, 4, 2, 2), np.int8)
    for u, h, i in np.ndindex(2, 2, 2):
        nibble = words >> np.uint32(4 * (u + 2 * h + 4 * i)) & np.uint32(15)
        values[:, u, :, :, :, :, h, i] = nibble.transpose(0, 2, 1, 4, 3).astype(np.int8) - 8
    return np.ascontiguousarray(values.reshape(n, chunks * CHUNK_K)[:, :k])


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


HEAD_DIMS = 256
SWIZZLED = 64  # channels of bf16, 128 bytes


def pack_head_slabs(values: np.ndarray, rows: int) -> np.ndarray:
    """An output projection's weight [N, K], bf16 viewed as uint16, as attention_wgmma.cu reads it: uint8 [K/256 heads, N/rows
    thread blocks, 4, rows, 128].

    Of a head's 256 channels, a slab has 64: the rows' 16-byte pieces p at piece p ^ (row % 8), as in `activation_slabs`.
    Raises LayoutError for another type, or a shape that does not divide into heads and into multiples of 8 rows.
    """
    if values.dtype != np.uint16:
        raise LayoutError(f"slabs of heads are packed from bf16 viewed as uint16, got {values.dtype}")
    n, k = _check_head_slabs(values.shape, rows)
    pieces = values.reshape(n // rows, rows // 8, 8, k // HEAD_DIMS, HEAD_DIMS // SWIZZLED, 8, 8)
    slabs = np.ascontiguousarray(_swizzled(pieces).transpose(3, 0, 4, 1, 2, 5, 6))
    return slabs.view(np.uint8).reshape(k // HEAD_DIMS, n // rows, HEAD_DIMS // SWIZZLED, rows, 2 * SWIZZLED)


def unpack_head_slabs(packed: np.ndarray, shape: tuple[int, int], rows: int) -> np.ndarray:
    """The inverse of :func:`pack_head_slabs`: uint8 (any shape, C order) -> uint16 ``shape`` = [N, K]."""
    n, k = _check_head_slabs(shape, rows)
    if packed.dtype != np.uint8 or packed.size != 2 * n * k:
        raise LayoutError(f"{packed.size} elements of {packed.dtype} are no {n} x {k} weight of bf16")
    heads, blocks, slabs = k // HEAD_DIMS, n // rows, HEAD_DIMS // SWIZZLED
    pieces = packed.view(np.uint16).reshape(heads, blocks, slabs, rows // 8, 8, 8, 8)
    return _swizzled(pieces.transpose(1, 3, 4, 0, 2, 5, 6)).reshape(n, k)


def _swizzled(pieces: np.ndarray) -> np.ndarray:
    """[_, _, row % 8, _, _, piece, _] with piece p of a row at p ^ (row % 8), and from there back."""
    row, piece = np.arange(8)[:, None], np.arange(8)[None]
    return np.moveaxis(pieces, (2, 5), (0, 1))[row, row ^ piece].transpose(2, 3, 0, 4, 5, 1, 6)


def _check_head_slabs(shape: tuple[int, ...], rows: int) -> tuple[int, int]:
    if len(shape) != 2 or rows % 8 or 0 in (*shape, rows) or shape[0] % rows or shape[1] % HEAD_DIMS:
        raise LayoutError(f"a weight of shape {tuple(shape)} does not divide into {rows} rows and heads of {HEAD_DIMS}")
    return shape


# BitBLAS's kernels read activations int8 [M, K] as they are. A weight w[n, k] is stored as w + 8, unsigned, row after row:
# byte k / 2 of row n holds an even k in its low nibble. Adding 8 to a nibble modulo 16 is flipping its upper bit.
_OFFSET_8 = np.uint8(0x88)


def pack_bitblas(values: np.ndarray) -> np.ndarray:
    """Packs a weight int8 [N, K] with values in -8..7 as uint8 [N, K / 2] for the kernels of plugins/bitblas.py.

    Raises LayoutError as :func:`pack_int4` does.
    """
    return pack_int4(values) ^ _OFFSET_8


def unpack_bitblas(packed: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The inverse of :func:`pack_bitblas`: uint8 (any shape, C order) -> int8 ``shape`` = [N, K]."""
    return unpack_int4(np.asarray(packed) ^ _OFFSET_8, shape)
