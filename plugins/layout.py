"""How INT4 weights are stored: two to a byte, the lower index in the low nibble (the raw data of ONNX's INT4)."""
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
