"""What an initializer of a graph holds of the policy, as a record on its value.

Names are labels made from records, for people, plans and tests. Nothing reads them back: whoever wants to know which
linears a weight belongs to, or whether a vector is a table of the time, asks the record. Initializers without one are
constants of the graph: shapes, axes, factors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx_ir as ir

from duq.compiler.errors import GraphError

Part = Literal[
    "weight", "bias", "gain", "embedding",  # of a module of the model; a gain is that of a norm, 1 + w
    "weight_scale", "output_rotation",  # of a quantized linear
    "input_scale", "permutation", "hadamard", "rotation", "activation_scale",  # of a quantizer, shared by its linears
    "time_table", "rotary",  # computed when compiling: a row for each denoising step, or each position
]  # fmt: skip
_OF_MODULES = ("weight", "bias", "gain", "embedding", "weight_scale", "output_rotation")
_KEY = "duq.weight"


@dataclass(frozen=True)
class Piece:
    """What one linear (norm, ...) has in a weight.

    Attributes:
        chain: canonical module names. More than one where linears were multiplied, in the order in which they are applied.
        rows: which of the K rows, if not all.
        factors: names of what was multiplied into it: gains, scales, a scalar.
    """

    chain: tuple[str, ...]
    rows: str = ""
    factors: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return "*".join(self.chain) + (f".{self.rows}" if self.rows else "")


@dataclass(frozen=True)
class Weight:
    """The record of an initializer.

    Attributes:
        pieces: in the order of its columns; more than one where linears were merged.
        part: which tensor of the modules it is.
        form: "" as the checkpoint has it ([N, K]), "kn" [K, N], "q" integers; targets have forms of their own.
    """

    pieces: tuple[Piece, ...]
    part: Part
    form: str = ""

    @property
    def linears(self) -> tuple[str, ...]:
        """The canonical names of the modules, in the order of the columns."""
        return tuple(module for piece in self.pieces for module in piece.chain)

    @property
    def name(self) -> str:
        """A unique name: equal records have equal contents."""
        part = "weight" if self.part == "embedding" else self.part
        suffix = f"{part}_{self.form}" if self.form else part
        return "+".join(self._name(piece, suffix) for piece in self.pieces)

    def _name(self, piece: Piece, suffix: str) -> str:
        own = f"{piece.label}.{suffix}" if self.part in _OF_MODULES else f"{suffix}.{piece.label}"
        return "*".join([*piece.factors, own])

    @property
    def label(self) -> str:
        """What the GEMM of a weight is called: `llm.layers.0.mlp.gate_proj+up_proj`, their common parent once."""
        first, *others = (piece.label for piece in self.pieces)
        parent = first.rpartition(".")[0]
        return "+".join([first, *(each.removeprefix(f"{parent}.") for each in others)])

    @property
    def title(self) -> str:
        """The same with factors, and the part if that is not the weight: unique but for the form."""
        factors = {piece.factors for piece in self.pieces}
        if len(factors) > 1 or self.part not in _OF_MODULES:
            return self.name
        return "*".join([*factors.pop(), self.label]) + (f".{self.part}" if self.part != "weight" else "")

    def times(self, *factors: str) -> Weight:
        """With factors multiplied into every piece."""
        return replace(self, pieces=tuple(replace(p, factors=(*factors, *p.factors)) for p in self.pieces))

    def behind(self, first: Weight) -> Weight:
        """Of the product of two linears, `first` applied first."""
        (a,), (b,) = first.pieces, self.pieces
        return replace(self, pieces=(Piece((*a.chain, *b.chain), b.rows, (*a.factors, *b.factors)),))

    def of_rows(self, rows: str) -> Weight:
        return replace(self, pieces=tuple(replace(piece, rows=rows) for piece in self.pieces))

    def in_form(self, form: str) -> Weight:
        return replace(self, form="_".join(filter(None, (self.form, form))))


def of_module(module: str, part: Part, form: str = "") -> Weight:
    return Weight((Piece((module,)),), part, form)


def by_content(part: Part, array: np.ndarray) -> Weight:
    """The record of an array that has its name from its content, so that equal arrays are one initializer."""
    digest = hashlib.sha256(array.tobytes()).hexdigest()[:16]
    return Weight((Piece((digest,)),), part)


def merged(weights: Sequence[Weight]) -> Weight:
    """Of weights side by side, [W1, W2, ...]."""
    if len({(weight.part, weight.form) for weight in weights}) != 1:
        raise GraphError(f"{', '.join(weight.name for weight in weights)}: are not of one kind and cannot be merged")
    return replace(weights[0], pieces=tuple(piece for weight in weights for piece in weight.pieces))


def mark(value: ir.Value, weight: Weight) -> None:
    value.meta[_KEY] = weight


def weight_of(value: ir.Value | None) -> Weight | None:
    """The record of an initializer; None for constants of the graph and everything computed."""
    return None if value is None else value.meta.get(_KEY)


def record(value: ir.Value) -> Weight:
    """The record of a weight. GraphError if it has none."""
    weight = weight_of(value)
    if weight is None:
        raise GraphError(f"{value.name} has no record of what it holds of the policy: a pass has lost it")
    return weight


def is_embedding(value: ir.Value | None) -> bool:
    weight = weight_of(value)
    return weight is not None and weight.part == "embedding"


def is_time_table(value: ir.Value | None) -> bool:
    weight = weight_of(value)
    return weight is not None and weight.part == "time_table"


def check_records(model: ir.Model, constant_size: int = 4096) -> None:
    """GraphError if an initializer that is no small constant has no record: passes of others keep what they do not know.

    A mask is a constant of any size: it grows with the square of the action horizon, and no weight is of booleans.
    """
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.dtype == ir.DataType.BOOL:
            continue
        if isinstance(tensor, ir.LazyTensor) or tensor.size > constant_size:
            record(value)
