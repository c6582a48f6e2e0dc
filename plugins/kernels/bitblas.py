"""The INT8 x INT4 kernels that BitBLAS generates (plugins/bitblas.py), described as the others are, and as tactics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from duq.plugins.bitblas import OFFERED, SMS, SYMBOL, Tile, best, is_available, ranked, sources
from duq.plugins.errors import KernelError
from duq.plugins.gpu import Gpu
from duq.plugins.kernel import Instance, Kernel, Shape
from duq.plugins.kernels.reference import Launched, Pointer


def reference(launch: Launched, x_q: Pointer, weight: Pointer, y: Pointer, tokens: int) -> None:
    """None from a launch alone: N and K are constants of the generated source."""
    raise KernelError(f"{launch.kernel}: a generated kernel is emulated from its source (tests/support/emulate_bitblas.py)")


BITBLAS = Kernel(
    "bitblas.cu",
    SYMBOL,
    "",
    "const signed char* x_q, const signed char* weight, int* y, int tokens",
    reference,
    waits=False,
)
"""y int32 [tokens, N] = x_q[tokens, K] w[N, K]^T; the weight is in the order of plugins.layout.pack_bitblas."""


@dataclass(frozen=True)
class Generated:
    """A tactic for a weight [n, k]: one tile's kernel, which leaves accumulators for epilogue.cu."""

    n: int
    k: int
    sm: int
    tile: Tile

    layout: ClassVar[str] = "bitblas"
    slab_tokens: ClassVar[int] = 0
    split: ClassVar[int] = 1
    needs_wgmma: ClassVar[bool] = False

    @property
    def tile_tokens(self) -> int:
        return self.tile.block_m

    @property
    def tile_rows(self) -> int:
        return self.tile.block_n

    def shape(self, m: int, n: int, bits: int = 4) -> Shape:
        return self.tile.shape(m, n)

    def instance(self, m: int, n: int, bits: int = 4, out: str = "int", epilogue: str = "NONE") -> Instance:
        """It leaves int32 accumulators, whatever `out` and `epilogue` are: kernels.epilogue makes y of them.

        Raises KernelError where its source is neither kept nor can be generated here.
        """
        return BITBLAS.instance(self.shape(m, n), {"generated.cuh": sources([(self.n, self.k, self.tile)], self.sm)[0]})


def offered(m: int, n: int, k: int, gpu: Gpu) -> list[Generated]:
    """As tactics the likeliest tiles that there is source for: all where BitBLAS is installed, else those kept."""
    tiles = ranked(m, n, k, gpu) if gpu.sm in SMS else []
    likeliest = list(dict.fromkeys([best(m, n, k, gpu), *tiles]))[:OFFERED] if tiles else []
    return [Generated(n, k, gpu.sm, tile) for tile in likeliest if is_available((n, k, tile), gpu.sm)]


def generate(tactics: Sequence[Generated]) -> None:
    """Has the source made that is not kept, of all tactics (for one SM) at once. Raises KernelError as `sources` does."""
    if tactics:
        sources([(each.n, each.k, each.tile) for each in tactics], tactics[0].sm)
