"""Integer GEMM for small M by wgmma: gemm_wgmma_small.cu."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from duq.plugins.kernel import Instance, Kernel, Shape
from duq.plugins.kernels.gemm import PARAMETERS, make_reference, staged_bytes
from duq.plugins.kernels.gemm_wgmma import LAYOUT, wgmma_header
from duq.plugins.kernels.reference import Launched, Pointer


def _check(launch: Launched, tokens: int, rows: int, workspace: Pointer | None) -> None:
    tile_tokens, split = 8 * launch.number("TOKENS8"), launch.number("SPLIT")
    assert rows % 64 == 0 and launch.split == split
    assert launch.grid == (rows // 64 * split, -(-tokens // tile_tokens), 1)


GEMM_WGMMA_SMALL = Kernel(
    "gemm_wgmma_small.cu",
    "gemm_wgmma_small",
    "int BITS, int TOKENS8, int STAGES, int GROUPS, int SPLIT, int EPILOGUE, class Out",
    PARAMETERS,
    make_reference(LAYOUT, _check),
)


@dataclass(frozen=True)
class WgmmaSmall:
    """A tactic: `groups` warpgroups of a thread block, and `split` blocks, a cluster, share K."""

    tokens8: int
    stages: int
    groups: int
    split: int = 1

    layout: ClassVar[str] = LAYOUT
    tile_rows: ClassVar[int] = 64
    needs_wgmma: ClassVar[bool] = True

    @property
    def tile_tokens(self) -> int:
        return 8 * self.tokens8

    @property
    def slab_tokens(self) -> int:
        """The activations come in slabs, padded to a multiple of this (plugins.layout.activation_slabs)."""
        return self.tile_tokens

    def divides(self, n: int, k: int) -> bool:
        return n % 64 == 0 and k % 128 == 0 and k // 128 >= self.split

    def shape(self, m: int, n: int, bits: int) -> Shape:
        grid = (n // 64 * self.split, -(-m // self.tile_tokens), 1)
        holders, warps = self.groups * self.split, 4 * self.groups
        finished = -(-self.tokens8 // holders)  # groups of 8 tokens, of a warpgroup
        accumulators = warps * ((holders > 1) * finished * holders * 512 + staged_bytes(8 * finished, 16))
        ring = self.stages * (self.tile_tokens * 128 + 64 * 16 * bits)
        return Shape(grid, 128 * self.groups + 32, ring + accumulators, (self.split, 1, 1))

    def instance(self, m: int, n: int, bits: int, out: str, epilogue: str = "NONE") -> Instance:
        """For y [m, n] of the C++ type `out`, a weight of `bits`; epilogue: NONE, GELU or GEGLU."""
        return GEMM_WGMMA_SMALL.instance(
            self.shape(m, n, bits),
            {"wgmma.cuh": wgmma_header(self.tokens8)},
            BITS=bits,
            TOKENS8=self.tokens8,
            STAGES=self.stages,
            GROUPS=self.groups,
            SPLIT=self.split,
            EPILOGUE=epilogue,
            Out=out,
        )
