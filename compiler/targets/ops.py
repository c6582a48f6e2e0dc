"""The ops that `fuse` makes of a graph: what is computed, with no GPU, tactic or number of tokens in it."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from duq.compiler.targets.patterns import source_of
from duq.compiler.targets.values import shape_of


@dataclass(eq=False)
class Norm:
    """norm(x) * gain + shift, which the reader of `out` computes, or a launch of its own.

    gain, shift: vectors of channels, or tables of the time [steps, channels] (`adaptive`); None where they were folded away.
    """

    out: ir.Value
    x: ir.Value
    gain: ir.Value | None
    shift: ir.Value | None
    adaptive: bool
    center: bool
    epsilon: float
    nodes: list[ir.Node]


@dataclass
class Rotation:
    """The rotary embedding of a linear's q and k.

    columns: widths of the parts [q, k, v] or [k, v]; dims: of a head; results: the values behind the embedding, v's as it is.
    tables: cosine and sine float32 [positions, dims / 2]; positions: of each row, an integer value of the graph. caches: where
    keys and values go, by the name of the graph's output; None: beside the queries.
    """

    columns: list[int]
    dims: int
    results: list[ir.Value]
    tables: list[ir.Value]
    positions: ir.Value
    caches: list[str | None]
    nodes: list[ir.Node]


@dataclass(frozen=True, eq=False)
class Multistep:
    """The operator of a solver that reads earlier changes: history [P, H, A] and what it becomes, coefficients [steps, 1 + P]."""

    history: ir.Value
    history_next: ir.Value
    coefficients: ir.Value


@dataclass
class Epilogue:
    """What follows a GEMM: (y * gate + bias) -> activation -> + residual, and the value, or the parts, that it ends in.

    multistep: what is added to the residual is not y alone.

    bias_table, gate: rows of tables of the time. type: of the value, "float" for the residual stream, else "Bf16". joined: the
    value that the rows become part of, in front of or behind another's (`is_first`). any_stride: whether those that read the
    result take rows of any stride, so that it may have columns of padding.
    """

    out: ir.Value
    nodes: list[ir.Node] = field(default_factory=list)
    bias: list[ir.Value] = field(default_factory=list)
    bias_table: ir.Value | None = None
    gate: ir.Value | None = None
    activation: str = ""
    residual: ir.Value | None = None
    multistep: Multistep | None = None
    parts: list[ir.Value] = field(default_factory=list)
    rotation: Rotation | None = None
    type: str = "Bf16"
    joined: ir.Value | None = None
    is_first: bool = False
    any_stride: bool = False

    @property
    def results(self) -> list[ir.Value]:
        if self.rotation is not None:
            return self.rotation.results
        return [source_of(value) for value in self.parts or [self.out]]


@dataclass(eq=False, kw_only=True)
class Op:
    """One op. name: in the checkpoint's words; nodes: all that it covers; branch: computed from the robot's state alone."""

    name: str
    nodes: list[ir.Node]
    branch: bool = False

    @property
    def reads(self) -> list[ir.Value]:
        return []

    @property
    def writes(self) -> list[ir.Value]:
        return []


@dataclass(eq=False, kw_only=True)
class Patches(Op):
    """Camera images to SigLIP's first tokens: a convolution without overlap, and the positions' embedding."""

    weight: ir.Value
    bias: ir.Value
    position: ir.Value
    epilogue: Epilogue

    @property
    def writes(self) -> list[ir.Value]:
        return self.epilogue.results


@dataclass(eq=False, kw_only=True)
class Prompt(Op):
    """The rows of the token table for the prompt, times `scale`."""

    table: ir.Value
    scale: float
    epilogue: Epilogue

    @property
    def writes(self) -> list[ir.Value]:
        return self.epilogue.results


@dataclass(eq=False, kw_only=True)
class JoinRows(Op):
    """Tokens behind tokens. No launch: those that compute them write them one behind the other."""

    parts: list[ir.Value]
    out: ir.Value

    @property
    def reads(self) -> list[ir.Value]:
        return self.parts

    @property
    def writes(self) -> list[ir.Value]:
        return [self.out]


@dataclass(eq=False, kw_only=True)
class JoinKeys(Op):
    """Keys or values of the prefix, then those of the suffix. No launch: attention reads both. cache: the graph's output."""

    past: ir.Value
    own: ir.Value
    out: ir.Value
    cache: str | None

    @property
    def reads(self) -> list[ir.Value]:
        return [self.past, self.own]

    @property
    def writes(self) -> list[ir.Value]:
        return [self.out]


@dataclass(eq=False, kw_only=True)
class Quantize(Op):
    """The prologue of quantized linears: norm, transforms, INT8 and a scale a token. `readers`: the linears behind it.

    operands: by the names of plugins/ops.py. geglu: x is [gate, up] and what is quantized gelu(gate) * up.
    """

    node: ir.Node
    x: ir.Value
    norm: Norm | None
    operands: dict[str, ir.Value]
    geglu: bool = False
    readers: list[Linear] = field(default_factory=list)

    @property
    def reads(self) -> list[ir.Value]:
        return [self.x]

    @property
    def writes(self) -> list[ir.Value]:
        return list(self.node.outputs)


@dataclass(eq=False, kw_only=True)
class Rotate(Op):
    """The same transforms without the quantizer, for linears of float activations."""

    x: ir.Value
    norm: Norm | None
    operands: dict[str, ir.Value]
    out: ir.Value

    @property
    def reads(self) -> list[ir.Value]:
        return [self.x]

    @property
    def writes(self) -> list[ir.Value]:
        return [self.out]


@dataclass(eq=False, kw_only=True)
class Linear(Op):
    """y = epilogue(x W). operands: of a quantized linear, by the names of plugins/ops.py.

    kind: "integer" INT8 activations; "flow step" the output projection, which takes a whole step of the flow; "narrow" the robot's
    state or actions, in float32; "float" any other, whose kernel depends on the number of tokens.
    """

    node: ir.Node
    kind: str
    x: ir.Value
    norm: Norm | None
    weight: ir.Value
    operands: dict[str, ir.Value]
    epilogue: Epilogue
    quantize: Quantize | None = None

    @property
    def reads(self) -> list[ir.Value]:
        return [self.x, *([self.epilogue.residual] if self.epilogue.residual is not None else [])]

    @property
    def writes(self) -> list[ir.Value]:
        return self.epilogue.results


@dataclass(eq=False, kw_only=True)
class Attention(Op):
    """Bidirectional attention: of an image's tokens, of the prefix, or of the suffix to the cache and itself (`own`)."""

    q: ir.Value
    k: ir.Value
    v: ir.Value
    own: tuple[ir.Value, ir.Value] | None
    out: ir.Value
    scale: float
    dims: int
    heads: int
    kv_heads: int
    each_image: bool  # its tokens see only each other

    @property
    def reads(self) -> list[ir.Value]:
        return [self.q, self.k, self.v, *(self.own or ())]

    @property
    def writes(self) -> list[ir.Value]:
        return [self.out]


def describe(ops: list[Op]) -> str:
    """The ops as text, one a line."""
    lines = []
    for index, op in enumerate(ops):
        reads, writes = (" ".join(str(value.name) for value in values) for values in (op.reads, op.writes))
        details = [type(op).__name__, op.name]
        if isinstance(op, Linear):
            e = op.epilogue
            details += [op.kind, "x".join(map(str, shape_of(op.weight)))]
            details += [word for word, there in (("bias", e.bias), ("gate", e.gate), (e.activation, e.activation),
                                                 ("residual", e.residual), ("rotary", e.rotation)) if there]  # fmt: skip
        if getattr(op, "norm", None) is not None:
            details.append("norm in front")
        lines.append(f"{index:4d} {'branch ' if op.branch else ''}{', '.join(details)}: {reads} -> {writes}")
    return "\n".join(lines) + "\n"
