"""Integer GEMM for large M, mma.sync: gemm_large.cu."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from duq.plugins.kernel import Instance, Kernel, Shape
from duq.plugins.kernels.gemm import PARAMETERS, make_reference, warp_staging_bytes
from duq.plugins.kernels.reference import Launched, Pointer


def _check(launch: Launched, tokens: int, rows: int, workspace: Pointer | None) -> None:
    tile_rows = 16 * launch.number("ROWS16") * launch.number("WARPS_N")
    tile_tokens = 8 * launch.number("TOKENS8") * launch.number("WARPS_M")
    assert rows % tile_rows == 0 and launch.grid == (-(-tokens // tile_tokens), rows // tile_rows, 1)


GEMM_LARGE = Kernel(
    "gemm_large.cu",
    "gemm_large",
    "int BITS, int ROWS16, int TOKENS8, int WARPS_N, int WARPS_M, int STAGES, int EPILOGUE, class Out",
    PARAMETERS,
    make_reference("direct", _check),
)


@dataclass(frozen=True)
class Large:
    """A tactic: a thread block of `warps_n` x `warps_m` warps computes a tile of their tiles."""

    rows16: int
    tokens8: int
    warps_n: int
    warps_m: int
    stages: int

    layout: ClassVar[str] = "direct"
    slab_tokens: ClassVar[int] = 0
    split: ClassVar[int] = 1
    needs_wgmma: ClassVar[bool] = False

    @property
    def tile_tokens(self) -> int:
        return 8 * self.tokens8 * self.warps_m

    @property
    def tile_rows(self) -> int:
        return 16 * self.rows16 * self.warps_n

    def divides(self, n: int, k: int) -> bool:
        return n % self.tile_rows == 0 and k % 128 == 0

    def shape(self, m: int, n: int, bits: int) -> Shape:
        warps = self.warps_n * self.warps_m
        ring = self.stages * (self.tile_tokens * 128 + self.tile_rows * 16 * bits + 2 * 8)  # and two barriers a stage
        shared_bytes = max(ring, warps * warp_staging_bytes(self.rows16))
        return Shape((-(-m // self.tile_tokens), n // self.tile_rows, 1), 32 * warps, shared_bytes)

    def instance(self, m: int, n: int, bits: int, out: str, epilogue: str = "NONE") -> Instance:
        """For y [m, n] of the C++ type `out`, a weight of `bits`; epilogue: NONE, GELU or GEGLU."""
        return GEMM_LARGE.instance(
            self.shape(m, n, bits),
            BITS=bits,
            ROWS16=self.rows16,
            TOKENS8=self.tokens8,
            WARPS_N=self.warps_n,
            WARPS_M=self.warps_m,
            STAGES=self.stages,
            EPILOGUE=epilogue,
            Out=out,
        )
