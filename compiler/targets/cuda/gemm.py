"""GEMMs that several tactics compute: what a tactic is chosen for, its sizes and what its instance has to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from duq.plugins import kernels, tactics
from duq.plugins.gpu import Gpu
from duq.plugins.kernel import Instance
from duq.plugins.kernels import bitblas
from duq.plugins.layout import HEAD_DIMS

IntegerTactic = tactics.Tactic | kernels.Generated
Tactic = IntegerTactic | kernels.GemmFloat


@dataclass(frozen=True)
class Gemm:
    """y = epilogue(x[m, k] w[n, k]^T) of INT8 activations and a weight of `bits`, y of the C++ type `out`; `epilogue` as in
    common.cuh."""

    m: int
    n: int
    k: int
    bits: int
    out: str
    epilogue: str

    def candidates(self, gpu: Gpu) -> list[IntegerTactic]:
        """What is worth timing. With large M not mma.sync beside wgmma, which multiplies twice as fast."""
        found: list[IntegerTactic] = list(tactics.candidates(self.m, self.n, self.k, self.bits, gpu))
        if self.m <= tactics.SMALL_M:
            return found
        by_wgmma = [tactic for tactic in found if tactic.layout == "wgmma"]
        generated = bitblas.offered(self.m, self.n, self.k, gpu) if self.bits == 4 else []
        return by_wgmma or [*found, *generated]

    def best(self, gpu: Gpu, slab_tokens: int | None = None) -> IntegerTactic:
        return tactics.best(self.m, self.n, self.k, self.bits, gpu, slab_tokens)

    def instance(self, tactic: IntegerTactic) -> Instance:
        epilogue = "NONE" if self.leaves_rotation(tactic) else self.epilogue
        return tactic.instance(self.m, self.n, self.bits, self.out, epilogue)

    def instances(self, tactic: Tactic) -> list[Instance]:
        """That one, and the epilogue's and the rotary embedding's where the tactic leaves these to others."""
        assert not isinstance(tactic, kernels.GemmFloat)
        found = [self.instance(tactic)]
        if self.leaves_accumulators(tactic):
            columns = self.n // 2 if self.epilogue == "GEGLU" else self.n
            activation = "NONE" if self.epilogue == "ROTARY" else self.epilogue
            found.append(kernels.epilogue(self.m, columns, self.out, False, activation))
        if self.leaves_rotation(tactic):
            found.append(kernels.rotary(self.m, self.n // HEAD_DIMS - 2, HEAD_DIMS))
        return found

    def leaves_accumulators(self, tactic: IntegerTactic) -> bool:
        """Whether another launch has to compute the epilogue: BitBLAS generates GEMMs without one."""
        return isinstance(tactic, kernels.Generated) and self.out != "int"

    def leaves_rotation(self, tactic: IntegerTactic) -> bool:
        """Whether another launch has to turn q and k by their positions."""
        return self.epilogue == "ROTARY" and not (isinstance(tactic, kernels.Wgmma) and tactic.has_rotary)

    def order(self, tactic: IntegerTactic) -> str:
        """In which the tactic's epilogue wants the weight's rows, their scales and biases (weights.rows_in_order)."""
        if self.leaves_accumulators(tactic) or self.leaves_rotation(tactic):
            return ""
        return {"GEGLU": "gate-up", "ROTARY": "rotary"}.get(self.epilogue, "")

    def workspace_words(self, tactic: IntegerTactic) -> int:
        """Accumulators and counters of the blocks that share K, on GPUs without clusters."""
        return -(-self.m // tactic.tile_tokens) * (tactic.tile_tokens * self.n + self.n // 16)


@dataclass(frozen=True)
class FloatGemm:
    """The same of float activations, a weight of 16 (bf16) or 4 bits and small M, with the norm in front or without;
    `epilogue` as in gemm_float.cu."""

    m: int
    n: int
    k: int
    bits: int
    out: str
    norm: bool
    epilogue: str

    def candidates(self, gpu: Gpu) -> list[kernels.GemmFloat]:
        return tactics.float_candidates(self.m, self.n, self.k, gpu)

    def best(self, gpu: Gpu, slab_tokens: int | None = None) -> kernels.GemmFloat:
        return tactics.best_float(self.m, self.n, self.k, gpu)

    def instance(self, tactic: kernels.GemmFloat) -> Instance:
        return tactic.instance(self.m, self.n, self.out, self.norm, self.epilogue, self.bits)

    def instances(self, tactic: Tactic) -> list[Instance]:
        assert isinstance(tactic, kernels.GemmFloat)
        return [self.instance(tactic)]


AnyGemm = Gemm | FloatGemm
Tuner = Callable[[AnyGemm, int | None], Tactic]
"""The tactic for a GEMM; where its activations are there already, one for slabs of so many tokens (0: for rows)."""


def from_table(gpu: Gpu) -> Tuner:
    """The choice where nothing is timed. It raises KernelError when no tactic fits."""

    def choose(gemm: AnyGemm, slab_tokens: int | None = None) -> Tactic:
        return gemm.best(gpu, slab_tokens)

    return choose
