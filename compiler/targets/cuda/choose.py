"""Choose: a tactic for every GEMM and attention. The constraints between ops are solved here, once.

A quantizer writes one layout for all linears behind it, rows or slabs of so many tokens. The largest of them chooses freely,
and the others take the best tactic for activations in that layout.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from duq.compiler.targets.cuda.gemm import AnyGemm, Gemm, IntegerTactic, Tactic, Tuner
from duq.compiler.targets.cuda.projections import Projection, projections
from duq.compiler.targets.cuda.specialize import Sized
from duq.compiler.targets.ops import Attention, Linear, Quantize
from duq.plugins import tactics
from duq.plugins.errors import KernelError
from duq.plugins.gpu import Gpu
from duq.plugins.kernels import GemmFloat


@dataclass(frozen=True)
class Layout:
    """Of the INT8 activations that a quantizer writes: in slabs of so many tokens, or (0) in rows, and their channels, padding
    included."""

    slab_tokens: int
    columns: int


@dataclass
class Chosen:
    """The tactics of a graph at one size, and the layouts that ops share."""

    integer: dict[Linear, IntegerTactic] = field(default_factory=dict)
    floating: dict[Linear, GemmFloat] = field(default_factory=dict)
    attention: dict[Attention, tactics.AttentionTactic] = field(default_factory=dict)
    layouts: dict[Quantize, Layout] = field(default_factory=dict)
    projections: dict[Attention, Projection] = field(default_factory=dict)

    @property
    def projected(self) -> set[Linear]:
        """The linears that are computed with their attention."""
        return {each.linear for each in self.projections.values()}

    def __str__(self) -> str:
        projected = [(op, projection.tactic) for op, projection in self.projections.items()]
        each = [*self.integer.items(), *self.floating.items(), *self.attention.items(), *projected]
        layouts = [f"{op.name} (quantize): {layout}" for op, layout in self.layouts.items()]
        return "\n".join([*(f"{op.name}: {tactic}" for op, tactic in each), *layouts]) + "\n"


def gemms_of(graphs: Iterable[Sized]) -> list[AnyGemm]:
    """Every GEMM that a tactic is chosen for, each once."""
    found = (linear.gemm for sized in graphs for linear in sized.linears.values())
    return list(dict.fromkeys(gemm for gemm in found if gemm is not None))


def choose(sized: Sized, gpu: Gpu, tuner: Tuner) -> Chosen:
    """Raises KernelError, which names the linear, for sizes that no kernel takes."""
    chosen = Chosen(projections=projections(sized, gpu))
    projected = chosen.projected
    for op in sized.ops:
        match op:
            case Quantize():
                chosen.layouts[op] = _layout(op, sized, tuner)
            case Linear() if op.quantize is not None:
                tactic = _tactic(op.name, sized.linears[op].gemm, tuner, chosen.layouts[op.quantize].slab_tokens)
                assert not isinstance(tactic, GemmFloat)
                chosen.integer[op] = tactic
            case Linear() if sized.linears[op].gemm is not None and op not in projected:
                tactic = _tactic(op.name, sized.linears[op].gemm, tuner, None)
                assert isinstance(tactic, GemmFloat)
                chosen.floating[op] = tactic
            case Attention() if op not in chosen.projections:
                chosen.attention[op] = _attention(op, sized, gpu)
    return chosen


def _layout(op: Quantize, sized: Sized, tuner: Tuner) -> Layout:
    gemms = [gemm for reader in op.readers if isinstance(gemm := sized.linears[reader].gemm, Gemm)]
    largest = max(gemms, key=lambda gemm: gemm.n)
    tactic = _tactic(op.name, largest, tuner, None)
    assert not isinstance(tactic, GemmFloat)
    return Layout(tactic.slab_tokens, largest.k)


def _tactic(name: str, gemm: AnyGemm | None, tuner: Tuner, slab_tokens: int | None) -> Tactic:
    assert gemm is not None, name
    try:
        return tuner(gemm, slab_tokens)
    except KernelError as error:
        raise KernelError(f"{name}: --target cuda has {error}") from error


def _attention(op: Attention, sized: Sized, gpu: Gpu) -> tactics.AttentionTactic:
    images = sized.size.cameras if op.each_image else 1
    own = sized.rows[op.own[0]] if op.own else 0
    rows, cached = sized.rows[op.q] // images, sized.rows[op.k] // images
    return tactics.best_attention(op.dims, rows, images, gpu, cached, own)
