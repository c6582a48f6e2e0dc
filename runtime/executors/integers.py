"""Whether ONNX Runtime multiplies 8-bit integers exactly on this CPU, found out by multiplying the largest.

On x86 processors without VNNI (AVX2, AVX512 alone) its kernels for uint8 x int8 add the products of two neighboring channels in
INT16 and saturate: 2 * 255 * 127 does not fit. It computes other accumulators there without a word. Its kernels for
uint8 x uint8 widen to INT16 first and are exact, but have no use of VNNI where there is one. So the CPU is asked, not known:
what is multiplied wrongly depends on the kernels of the ONNX Runtime at hand as well.

INT4 weights need none of this, 2 * 255 * 8 fits.
"""

from __future__ import annotations

import functools

import numpy as np
import onnxruntime

ROWS = (1, 7)  # ONNX Runtime has kernels for a single row, and for several at a time
CHANNELS, COLUMNS = 67, 37  # neither fills the kernels' blocks
_ONNX_TYPES = {np.dtype(np.float32): 1, np.dtype(np.uint8): 2, np.dtype(np.int8): 3}


@functools.cache
def multiplies_exactly(unsigned_weights: bool) -> bool:
    """Whether accumulators of uint8 activations and int8 (`unsigned_weights`: uint8) weights are right. Milliseconds, once."""
    lowest, highest = (0, 255) if unsigned_weights else (-128, 127)
    weight = _extremes(CHANNELS, COLUMNS, lowest, highest).astype(np.uint8 if unsigned_weights else np.int8)
    for rows in ROWS:
        x = _extremes(CHANNELS, rows, 255, 0).T.astype(np.uint8)
        exact = (x.astype(np.int64) - 128) @ (weight.astype(np.int64) - (128 if unsigned_weights else 0))
        if not np.array_equal(products(x, weight), exact):
            return False
    return True


def _extremes(channels: int, columns: int, first: int, second: int) -> np.ndarray:
    """int64 [channels, columns]: the first column is all `first`, the others change to `second` ever more often."""
    return np.where(np.arange(channels)[:, None] * np.arange(columns) // columns % 2, second, first)


def products(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(x - 128) @ (weight - its zero point) as ONNX Runtime computes it in the graphs of a plan: float32 [M, N].

    x: uint8 [M, K]; weight: int8 [K, N], or uint8 with the zero point 128.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(_model(weight), options, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"x": x})
    return np.asarray(result)


def _model(weight: np.ndarray) -> bytes:
    """The ONNX model of `products`, y = MatMulIntegerToFloat(x, weight). The runtime has no ONNX library to make it with: the
    numbers are those of the fields in onnx.proto."""
    operands = {
        "weight": weight,
        "one": np.array(1, np.float32),
        "scale": np.ones(weight.shape[1], np.float32),
        "x_zero": np.array(128, np.uint8),
        "weight_zero": np.array(128 if weight.dtype == np.uint8 else 0, weight.dtype),
    }
    inputs = [(1, name) for name in ("x", *operands)]
    node = _message(*inputs, (2, "y"), (4, "MatMulIntegerToFloat"), (7, "com.microsoft"))
    initializers = [(5, _tensor(name, array)) for name, array in operands.items()]
    x, y = (_message((1, name), (2, _message((1, _message((1, kind)))))) for name, kind in (("x", 2), ("y", 1)))
    graph = _message((1, node), (2, "products"), *initializers, (11, x), (12, y))
    opsets = [(8, _message((1, domain), (2, version))) for domain, version in (("", 21), ("com.microsoft", 1))]
    return _message((1, 10), (7, graph), *opsets)


def _tensor(name: str, array: np.ndarray) -> bytes:
    sizes = [(1, size) for size in array.shape]
    return _message(*sizes, (2, _ONNX_TYPES[array.dtype]), (8, name), (9, array.tobytes()))


def _message(*fields: tuple[int, int | str | bytes]) -> bytes:
    """A protobuf message: its fields by number, each an integer, text, or bytes (a message too)."""
    made = bytearray()
    for number, value in fields:
        if isinstance(value, int):
            made += _varint(number << 3) + _varint(value)
        else:
            data = value.encode() if isinstance(value, str) else value
            made += _varint(number << 3 | 2) + _varint(len(data)) + data
    return bytes(made)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; all but the last byte have their highest bit set."""
    groups = [value >> shift & 127 for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([*(group | 128 for group in groups[:-1]), groups[-1]])
