"""Integer GEMM for small M, mma.sync: gemm_small.cu."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from duq.plugins.kernel import Instance, Kernel, Shape
from duq.plugins.kernels.gemm import PARAMETERS, make_reference, staged_bytes
from duq.plugins.kernels.reference import Launched, Pointer, padded


def _check(launch: Launched, tokens: int, rows: int, workspace: Pointer | None) -> None:
    tile_rows, tile_tokens = 16 * launch.number("ROWS16"), 8 * launch.number("TOKENS8")
    assert rows % tile_rows == 0 and launch.grid[::2] == (rows // tile_rows, -(-tokens // tile_tokens))
    if launch.grid[1] > launch.split:  # no cluster: accumulators pass through the workspace
        assert workspace is not None
        words = padded(tokens, tile_tokens) * rows + launch.grid[0] * launch.grid[2]
        assert not workspace.read("int", words).any(), "the workspace is zero ahead of a launch"


GEMM_SMALL = Kernel(
    "gemm_small.cu",
    "gemm_small",
    "int BITS, int ROWS16, int TOKENS8, int WARPS, int STAGES, int EPILOGUE, class Out",
    PARAMETERS,
    make_reference("direct", _check),
)


@dataclass(frozen=True)
class Small:
    """A tactic: `warps` of a thread block, and `split` blocks, share K."""

    rows16: int
    tokens8: int
    warps: int
    stages: int
    split: int = 1

    layout: ClassVar[str] = "direct"
    slab_tokens: ClassVar[int] = 0
    needs_wgmma: ClassVar[bool] = False

    @property
    def tile_tokens(self) -> int:
        return 8 * self.tokens8

    @property
    def tile_rows(self) -> int:
        return 16 * self.rows16

    def divides(self, n: int, k: int) -> bool:
        return n % self.tile_rows == 0 and k % 64 == 0 and k // 64 >= self.split * self.warps

    def shape(self, m: int, n: int, bits: int) -> Shape:
        grid = (n // self.tile_rows, self.split, -(-m // self.tile_tokens))
        shared_bytes = self.warps * staged_bytes(self.tile_tokens, self.tile_rows)
        return Shape(grid, 32 * self.warps, shared_bytes, (1, self.split, 1))

    def instance(self, m: int, n: int, bits: int, out: str, epilogue: str = "NONE") -> Instance:
        """For y [m, n] of the C++ type `out`, a weight of `bits`; epilogue: NONE, GELU or GEGLU."""
        return GEMM_SMALL.instance(
            self.shape(m, n, bits),
            BITS=bits,
            ROWS16=self.rows16,
            TOKENS8=self.tokens8,
            WARPS=self.warps,
            STAGES=self.stages,
            EPILOGUE=epilogue,
            Out=out,
        )
