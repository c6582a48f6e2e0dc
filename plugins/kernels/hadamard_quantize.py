"""bf16 activations to INT8 behind a block Hadamard of 64, for large M: hadamard_quantize.cu."""

from __future__ import annotations

from duq.plugins.kernel import Instance, Kernel, Shape
from duq.plugins.kernels.reference import Launched, Pointer
from duq.plugins.kernels.rotate_quantize import reference as rotate_and_quantize
from duq.plugins.kernels.row import MAX_THREADS

HADAMARD_DEPTHS = range(4096, 16384 + 1, 1024)  # that it is for; of 2048 rotate_quantize is faster


def reference(
    launch: Launched,
    x: Pointer,
    x_q: Pointer,
    x_scale: Pointer,
    tokens: int,
    depth: int,
    row_stride: int,
    slab_tokens: int,
) -> None:
    assert depth % 1024 == 0 and 32 * launch.threads == depth
    vectors = str(depth // (8 * launch.threads))
    template = {"In": "Bf16", "SOURCE": "PLAIN", "BLOCK": "64", "VECTORS": vectors, "Out": "signed char"}
    of_each_token = Launched("rotate_quantize", template, (tokens, 1, 1), launch.threads)
    sizes = depth, depth, row_stride, 0, slab_tokens, 0.0
    rotate_and_quantize(of_each_token, x, None, None, None, None, None, None, x_q, x_scale, *sizes)


HADAMARD_QUANTIZE = Kernel(
    "hadamard_quantize.cu",
    "hadamard_quantize",
    "",
    "const Bf16* x, signed char* x_q, float* x_scale, int tokens, int depth, int row_stride, int slab_tokens",
    reference,
)


def hadamard_quantize(tokens: int, depth: int) -> Instance:
    """bf16 rows of `depth` (HADAMARD_DEPTHS) channels, rotated by a block Hadamard of 64."""
    threads = depth // 32
    return HADAMARD_QUANTIZE.instance(
        Shape((tokens, 1, 1), threads, 6 * depth, a_multiprocessor=2 * MAX_THREADS // threads)
    )
