"""The products that several tactics compute, as what a tactic is chosen for: sizes and what the instance has to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from duq.plugins import kernels, tactics
from duq.plugins.gpu import gpu_of
from duq.plugins.kernel import Instance
from duq.plugins.kernels import bitblas

IntegerTactic = tactics.Tactic | bitblas.Generated


@dataclass(frozen=True)
class Gemm:
    """y = finish(x[m, k] w[n, k]^T) of INT8 activations and a weight of `bits`, y of the C++ type `out`; `finish` is an
    activation as in common.cuh."""

    m: int
    n: int
    k: int
    bits: int
    out: str
    finish: str

    def candidates(self, sm: int) -> list[IntegerTactic]:
        """What is worth timing. Of many tokens not mma.sync beside wgmma, which multiplies twice as fast."""
        found = tactics.candidates(self.m, self.n, self.k, self.bits, gpu_of(sm))
        if self.m <= tactics.SMALL_M:
            return found
        by_wgmma = [tactic for tactic in found if tactic.layout == "wgmma"]
        generated = bitblas.offered(self.m, self.n, self.k, gpu_of(sm)) if self.bits == 4 else []
        return by_wgmma or [*found, *generated]

    def best(self, sm: int, slab_tokens: int | None = None) -> tactics.Tactic:
        return tactics.best(self.m, self.n, self.k, self.bits, gpu_of(sm), slab_tokens)

    def launch(self, tactic: IntegerTactic) -> Instance:
        return tactic.instance(self.m, self.n, self.bits, self.out, self.finish)

    def launches(self, tactic: IntegerTactic) -> list[Instance]:
        """That one, and what finishes its sums where they are all that it leaves."""
        if not self.is_finished_apart(tactic):
            return [self.launch(tactic)]
        columns = self.n // 2 if self.finish == "GEGLU" else self.n
        return [self.launch(tactic), kernels.epilogue(self.m, columns, self.out, False, self.finish)]

    def is_finished_apart(self, tactic: IntegerTactic) -> bool:
        return isinstance(tactic, bitblas.Generated) and self.out != "int"

    def workspace_words(self, tactic: tactics.Tactic) -> int:
        """Sums and counters of the blocks that share K, on GPUs without clusters."""
        return -(-self.m // tactic.tile_tokens) * (tactic.tile_tokens * self.n + self.n // 16)


@dataclass(frozen=True)
class FloatGemm:
    """The same of float activations, a weight of 16 (bf16) or 4 bits and few tokens, with the norm in front or without;
    `finish` as in gemm_float.cu."""

    m: int
    n: int
    k: int
    bits: int
    out: str
    norm: bool
    finish: str

    def candidates(self, sm: int) -> list[kernels.GemmFloat]:
        return tactics.float_candidates(self.m, self.n, self.k, gpu_of(sm))

    def best(self, sm: int, slab_tokens: int | None = None) -> kernels.GemmFloat:
        return tactics.best_float(self.m, self.n, self.k, gpu_of(sm))

    def launch(self, tactic: kernels.GemmFloat) -> Instance:
        return tactic.instance(self.m, self.n, self.out, self.norm, self.finish, self.bits)

    def launches(self, tactic: kernels.GemmFloat) -> list[Instance]:
        return [self.launch(tactic)]


Problem = Gemm | FloatGemm
AnyTactic = IntegerTactic | kernels.GemmFloat
Choose = Callable[[Problem, int | None], AnyTactic]
"""The tactic for a problem; where its activations are there already, one for slabs of so many tokens (0: for rows)."""


def from_table(sm: int) -> Choose:
    """The choice where nothing is timed. It raises KernelError when no tactic fits."""
    return lambda problem, slab_tokens=None: problem.best(sm, slab_tokens)
