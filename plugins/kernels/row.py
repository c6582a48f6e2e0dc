"""How kernels that keep a token's row in a thread block's registers are launched (row.cuh)."""

from __future__ import annotations

MAX_THREADS = 512  # of such a block


def row_in_registers(depth: int, most: int = MAX_THREADS) -> tuple[int, int]:
    """(vectors of 8 channels a thread, threads) of a block whose threads, `most` or fewer, hold a row of `depth` channels
    between them."""
    vectors = -(-depth // (8 * most))
    return vectors, 32 * -(-depth // (8 * 32 * vectors))
