"""How the kernels between the GEMMs and the attentions are launched: which file, which instance, which shape.

Types are the C++ names "float", "Bf16" and "Half". Arguments, layouts and what must be a multiple of what are in the
sources, plugins/cuda.
"""

from __future__ import annotations

from typing import NamedTuple

from duq.plugins.driver import Shape
from duq.plugins.tactics import MULTIPROCESSORS

MAX_THREADS = 512  # of a block that keeps a row in registers
NARROW_COLUMNS = 16  # of a block of linear_narrow
FLOW_COLUMNS = 16  # of a block of flow_step
HADAMARD_DEPTHS = range(4096, 16384 + 1, 1024)  # that hadamard_quantize is for; of 2048 rotate_quantize is faster


class Launch(NamedTuple):
    """A kernel, the C++ `expression` of an instance in plugins/cuda/<source>, and the shape of one launch."""

    source: str
    expression: str
    shape: Shape


def _row_in_registers(depth: int) -> tuple[int, int]:
    """(vectors of 8 channels a thread, threads) of a block whose threads hold a row between them."""
    vectors = -(-depth // (8 * MAX_THREADS))
    return vectors, 32 * -(-depth // (8 * 32 * vectors))


def normalize(tokens: int, depth: int, in_type: str, out_type: str, center: bool) -> Launch:
    """LayerNorm (`center`) or RMSNorm of rows of `depth` channels."""
    vectors, threads = _row_in_registers(depth)
    expression = f"normalize<{in_type}, {out_type}, {str(center).lower()}, {vectors}>"
    return Launch("normalize.cu", expression, Shape((tokens, 1, 1), threads))


def rotate_quantize(
    tokens: int, depth: int, in_type: str, source: str, rotation: str | int, padded: int = 0, out: str = "signed char"
) -> Launch:
    """`source` is PLAIN, RMS_NORM, LAYER_NORM or GEGLU; `rotation` is NONE, DENSE or the block size of a Hadamard; `padded`:
    the channels that are written, zeros beyond `depth`; `out` "signed char", or "Bf16" for what would be quantized."""
    vectors, threads = _row_in_registers(max(depth, padded))
    expression = f"rotate_quantize<{in_type}, {source}, {rotation}, {vectors}, {out}>"
    return Launch("rotate_quantize.cu", expression, Shape((tokens, 1, 1), threads, 4 * depth * (rotation == "DENSE")))


def hadamard_quantize(tokens: int, depth: int) -> Launch:
    """bf16 rows of `depth` (HADAMARD_DEPTHS) channels, rotated by a block Hadamard of 64; for many tokens."""
    threads = depth // 32
    blocks = min(tokens, MULTIPROCESSORS * (2 * MAX_THREADS // threads))
    return Launch("hadamard_quantize.cu", "hadamard_quantize", Shape((blocks, 1, 1), threads, 6 * depth))


def expand(rows: int, depth: int) -> Launch:
    """An INT4 weight [rows, depth], multiples of 16, to bf16."""
    return Launch("expand.cu", "expand", Shape((-(-(rows // 16 * -(-depth // 64)) // 8), 1, 1), 256))


def rotary(tokens: int, heads: int, dims: int) -> Launch:
    """Queries of `heads` heads, keys and values of one, `dims` channels each."""
    return Launch("rotary.cu", f"rotary<{heads}, {dims}>", Shape((tokens, 1, 1), (heads + 2) * dims // 16))


def patches(cameras: int, size: int, patch: int, pixel: str = "unsigned char") -> Launch:
    """Images of `size` x `size` pixels ("unsigned char" or "float") in patches of `patch` x `patch`; a thread takes two."""
    threads = 32 * -(-(patch**2) // (2 * 32))
    kernel = "float_patches" if pixel == "float" else "patches"
    return Launch("embed.cu", f"{kernel}<{patch}>", Shape(((size // patch) ** 2, cameras, 1), threads))


def tokens(count: int, depth: int) -> Launch:
    """`count` rows of the token table."""
    return Launch("embed.cu", "tokens", Shape((count, 1, 1), _row_in_registers(depth)[1]))


def linear_narrow(tokens: int, columns: int, activation: str, out_type: str) -> Launch:
    """A linear of at most 64 inputs and `columns` (a multiple of 16) outputs; `activation` is NONE or SILU."""
    expression = f"linear_narrow<{activation}, {out_type}, {tokens}>"
    return Launch("linear_narrow.cu", expression, Shape((columns // NARROW_COLUMNS, 1, 1), 256))


def flow_step(tokens: int, columns: int) -> Launch:
    """Final norm, output projection to `columns` (a multiple of 16) action dimensions, and Euler step."""
    return Launch("linear_narrow.cu", f"flow_step<{columns}>", Shape((columns // FLOW_COLUMNS, tokens, 1), 512))


def geglu(tokens: int, width: int) -> Launch:
    """`width` channels of gate and of up."""
    threads = 256
    return Launch("geglu.cu", "geglu", Shape((-(-width // (8 * threads)), tokens, 1), threads))


def dequantize(tokens: int, columns: int, out_type: str, rotate: bool, finish: str = "NONE") -> Launch:
    """Integer sums to `columns` (a multiple of 4) of y; `rotate` with a dense rotation behind the scales; `finish` is NONE,
    GELU or GEGLU (of twice as many columns)."""
    expression = f"dequantize<{out_type}, {str(rotate).lower()}, {finish}>"
    return Launch("dequantize.cu", expression, Shape((-(-columns // 1024), tokens, 1), 256))
