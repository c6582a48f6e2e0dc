"""Fuse: a graph becomes a list of ops, each with all that one kernel, or a GEMM and its epilogue, can compute.

An op is an anchor (a linear, a quantizer, an attention) with the norm in front of it and the element-wise nodes behind it.
Ops know nothing of a GPU, of tactics, or of how many tokens an observation has. Both GPU targets start here: `cuda` covers
every node of the graph with ops, `tensorrt` takes the ops that it has plugins for and leaves the other nodes to TensorRT
(`Fusions` says what a target's kernels take).

Everything that looks ahead in the graph is in this file. Later phases see the ops alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from duq.compiler.errors import GraphError
from duq.compiler.graph.edit import is_weight, small_constant
from duq.compiler.graph.edit import reader as reader_of
from duq.compiler.targets.ops import (
    Attention,
    Epilogue,
    JoinKeys,
    JoinRows,
    Linear,
    Multistep,
    Norm,
    Op,
    Patches,
    Prompt,
    Quantize,
    Rotate,
    Rotation,
)
from duq.compiler.targets.patterns import (
    is_gelu,
    is_integer,
    is_linear,
    is_prompt,
    is_table_row,
    is_view,
    is_whole,
    joins_rows,
    label,
    other_input,
    past_views,
    readers_of,
    source_of,
    table_of,
    views_between,
    views_of,
)
from duq.compiler.targets.values import (
    array_of,
    columns_of,
    dims_of,
    input_of,
    inputs_of,
    shape_of,
    size_of,
)
from duq.plugins import ops as duq_ops

NARROW = 64  # inputs of a linear from the robot's state or actions, which is computed in float32


@dataclass(frozen=True)
class Fusions:
    """What a target's kernels compute: its anchors, and what they take around one.

    anchors: the kinds of nodes that become ops; all others are the target's own business, in whatever form they are.
    norms: the norms that a quantizer computes in front. adaptive_norms: whether it takes their scale and shift by table too.
    geglu_in_front: whether it computes a GeGLU there too. epilogue: the parts of a linear's epilogue, of "bias", "gate",
    "activation", "residual", "split", "multistep".
    """

    anchors: frozenset[str] = frozenset(
        {"linear", "quantizer", "attention", "joined rows", "joined keys", "patches", "prompt"}
    )
    norms: frozenset[str] = frozenset({"RMSNormalization", "LayerNormalization"})
    adaptive_norms: bool = True
    geglu_in_front: bool = False
    epilogue: frozenset[str] = frozenset({"bias", "gate", "activation", "residual", "split", "multistep"})


ALL = Fusions()


def fuse(model: ir.Model, fusions: Fusions = ALL) -> list[Op]:
    """The ops of a graph, in its order. Raises GraphError for an anchor in a form that no kernel is made for."""
    return _Fuser(model, fusions).ops


def check_covered(model: ir.Model, ops: list[Op]) -> None:
    """Raises GraphError, which names the node, if one is neither in an op nor an integer's or a view's."""
    covered = {node for op in ops for node in op.nodes}
    for node in model.graph:
        looked_up = is_table_row(node.outputs[0])  # by whoever reads the row
        if node in covered or is_integer(node) or is_view(node) or is_whole(node) or looked_up:
            continue
        name = ", ".join(str(output.name) for output in node.outputs)
        overload = f" ({node.overload})" if node.overload else ""
        raise GraphError(
            f"--target cuda has no kernel for {node.domain or 'onnx'}::{node.op_type}{overload}, computing {name}"
        )


def expect(condition: bool, where: ir.Node | str) -> None:
    """Raises GraphError, which names the node or the linear, unless the condition holds."""
    if not condition:
        name = where if isinstance(where, str) else where.name or where.outputs[0].name
        raise GraphError(f"--target cuda: {name} is not in a form that it has kernels for")


class _Fuser:
    """The ops found so far, and which op or norm a value comes from."""

    def __init__(self, model: ir.Model, fusions: Fusions):
        self.fusions = fusions
        self.ops: list[Op] = []
        self._norms: dict[ir.Value, Norm] = {}
        self._writers: dict[ir.Value, Op] = {}
        self._covered: set[ir.Node] = set()
        self._of_state = {value for value in model.graph.inputs if value.name == "state"}
        self._flow = next((value for value in model.graph.inputs if value.name == "x"), None)
        for node in model.graph:
            if node not in self._covered and not is_integer(node):
                self._visit(node)

    def _visit(self, node: ir.Node) -> None:
        if node.op_type in self.fusions.norms:
            self._norm(node)
            return
        add_op = {
            "linear": self._linear,
            "quantizer": self._quantize,
            "attention": self._attention,
            "joined rows": self._join_rows,
            "joined keys": self._join_keys,
            "patches": self._patches,
            "prompt": self._prompt,
        }
        anchor = _anchor_of(node)
        if anchor in self.fusions.anchors:
            add_op[anchor](node)

    def _add(self, op: Op) -> None:
        op.branch = any(value in self._of_state for value in op.reads)
        self.ops.append(op)
        self._covered.update(op.nodes)
        cached = op.epilogue.rotation.caches if isinstance(op, Linear) and op.epilogue.rotation else []
        in_cache = len([each for each in cached if each])  # the last of the results: from there on nobody's own
        for index, value in enumerate(op.writes):
            self._writers[value] = op
            if op.branch and index < len(op.writes) - in_cache:
                self._of_state.add(value)

    # Norms: recorded, and computed by whoever reads them

    def _norm(self, node: ir.Node) -> None:
        gain, shift = (*node.inputs[1:3], None)[:2]
        ones = small_constant(gain)  # a gain that was folded into the weights
        gain = None if ones is not None and bool((ones == 1).all()) else gain
        out, nodes, adaptive = node.outputs[0], [node], False
        scaled = reader_of(out) if self.fusions.adaptive_norms else None
        if scaled is not None and scaled.op_type == "Mul" and is_table_row(other_input(scaled, out)):
            shifted = reader_of(scaled.outputs[0])
            expect(gain is None and shift is None and shifted is not None and shifted.op_type == "Add", node)
            assert shifted is not None
            rows = other_input(scaled, out), other_input(shifted, scaled.outputs[0])
            expect(all(map(is_table_row, rows)), node)
            gain, shift = map(table_of, rows)
            out, nodes, adaptive = shifted.outputs[0], [node, scaled, shifted], True
        epsilon = node.attributes.get_float("epsilon", 1e-5)
        x = source_of(node.inputs[0])
        self._norms[out] = Norm(out, x, gain, shift, adaptive, node.op_type == "LayerNormalization", epsilon, nodes)
        self._covered.update(nodes)

    def _input(self, value: ir.Value) -> tuple[ir.Value, Norm | None]:
        """What an op reads, and the norm in between if there is one."""
        source = source_of(value)
        norm = self._norms.get(source)
        return (source, None) if norm is None else (norm.x, norm)

    # Anchors

    def _quantize(self, node: ir.Node) -> None:
        operands = _operands(node)
        x, norm = self._input(node.inputs[0])
        nodes, geglu = [node, *(norm.nodes if norm else [])], False
        if self.fusions.geglu_in_front and norm is None:
            gate_up = _geglu_in_front(node.inputs[0])
            if gate_up is not None:
                x, geglu = gate_up, True
        readers = readers_of(node.outputs[0])
        name = label(readers[0].inputs[2 if node.op_type == "RotateQuantize" else 1])
        if node.op_type == "Rotate":
            self._add(Rotate(name=name, nodes=nodes, x=x, norm=norm, operands=operands, out=node.outputs[0]))
        else:
            self._add(Quantize(name=name, nodes=nodes, node=node, x=x, norm=norm, operands=operands, geglu=geglu))

    def _linear(self, node: ir.Node) -> None:
        operands = _operands(node) if node.op_type in duq_ops.QUANTIZED_LINEARS else {}
        weight = operands.get("weight", node.inputs[1])
        assert weight is not None
        name = label(weight)
        quantize = self._writers.get(source_of(node.inputs[0])) if node.op_type.endswith("A8Linear") else None
        if quantize is not None:
            assert isinstance(quantize, Quantize)
            x, norm = node.inputs[0], None
        else:
            x, norm = self._input(node.inputs[0])
        epilogue = epilogue_of(node, name, self.fusions)
        if "bias" in operands:
            epilogue.bias = [operands["bias"]]
        kind = self._kind(quantize, x, norm, weight, epilogue)
        nodes = [node, *epilogue.nodes, *(norm.nodes if norm else [])]
        if epilogue.rotation is not None:
            nodes += epilogue.rotation.nodes
        op = Linear(
            name=name, nodes=nodes, node=node, kind=kind, x=x, norm=norm, weight=weight, operands=operands,
            epilogue=epilogue, quantize=quantize,
        )  # fmt: skip
        self._add(op)
        if quantize is not None:
            order = readers_of(quantize.node.outputs[0])
            quantize.readers = sorted([*quantize.readers, op], key=lambda each: order.index(each.node))

    def _kind(self, quantize: Quantize | None, x: ir.Value, norm: Norm | None, weight: ir.Value, epilogue: Epilogue) -> str:
        k, n = shape_of(weight)
        if quantize is not None:
            return "integer"
        if norm is not None and n <= NARROW and epilogue.residual is not None and epilogue.residual is self._flow:
            return "flow step"
        if norm is None and k <= NARROW and self._is_float32(x):
            return "narrow"
        return "float"

    def _is_float32(self, value: ir.Value) -> bool:
        """Whether the value lies in memory as float32: the robot's state, the flow, and the residual stream."""
        if value.is_graph_input():
            return value.name in ("x", "state")
        writer = self._writers.get(value)
        epilogue = getattr(writer, "epilogue", None)
        return isinstance(writer, JoinRows) or (epilogue is not None and not epilogue.parts and epilogue.type == "float")

    def _attention(self, node: ir.Node) -> None:
        expect(all(operand is None for operand in node.inputs[3:]), node)
        q, k, v = (source_of(input_of(node, index)) for index in range(3))
        own = None
        keys, values = self._writers.get(k), self._writers.get(v)
        if isinstance(keys, JoinKeys) and isinstance(values, JoinKeys) and keys.cache is None:
            k, v, own = keys.past, values.past, (keys.own, values.own)
        q_input = input_of(node, 0)
        batch, dims = dims_of(q_input)[0], columns_of(q_input)
        name = self._writers[q].name.rpartition(".")[0] + ".attention"
        self._add(
            Attention(
                name=name,
                nodes=[node],
                q=q,
                k=k,
                v=v,
                own=own,
                out=node.outputs[0],
                dims=dims,
                heads=size_of(q_input, 1),
                scale=node.attributes.get_float("scale", dims**-0.5),
                kv_heads=size_of(input_of(node, 1), 1),
                each_image=batch != 1,
            )
        )

    def _join_rows(self, node: ir.Node) -> None:
        expect(len(node.inputs) == 2, node)
        parts = [source_of(each) for each in node.inputs if each is not None]
        self._add(JoinRows(name="joined rows", nodes=[node], parts=parts, out=node.outputs[0]))

    def _join_keys(self, node: ir.Node) -> None:
        out = node.outputs[0]
        past, own = (source_of(each) for each in node.inputs if each is not None)
        cache = out.name if out.is_graph_output() else None
        self._add(JoinKeys(name="joined keys", nodes=[node], past=past, own=own, out=out, cache=cache))

    # What brings an observation into the residual stream

    def _patches(self, node: ir.Node) -> None:
        _, weight, bias = inputs_of(node)
        last = past_views(node.outputs[0])
        added = readers_of(last)[0]
        position = input_of(added, 1)
        expect(added.op_type == "Add" and is_weight(position, rank=2), node)
        epilogue = destination(Epilogue(added.outputs[0]))
        nodes = [node, added, *views_between(node.outputs[0], last)]
        self._add(Patches(name=label(weight), nodes=nodes, weight=weight, bias=bias, position=position, epilogue=epilogue))

    def _prompt(self, node: ir.Node) -> None:
        """The host looks up the tokens' rows, for it alone keeps the table, a gigabyte; the device widens and scales them."""
        value, scale, nodes = node.outputs[0], 1.0, [node]
        while (reader := reader_of(value)) is not None and reader.op_type in ("Cast", "Mul"):
            if reader.op_type == "Mul":
                scale *= float(array_of(other_input(reader, value)).item())
            nodes.append(reader)
            value = reader.outputs[0]
        table, epilogue = input_of(node, 0), destination(Epilogue(value))
        self._add(Prompt(name="prompt", nodes=nodes, table=table, scale=scale, epilogue=epilogue))


def _anchor_of(node: ir.Node) -> str | None:
    """The kind of op that the node becomes, one of `Fusions.anchors`, or None."""
    if is_view(node) or is_whole(node):
        return None
    if is_linear(node):
        return "linear"
    if node.op_type == "Concat":
        return "joined rows" if joins_rows(node) else "joined keys"
    kinds = {"RotateQuantize": "quantizer", "Rotate": "quantizer", "Attention": "attention", "Conv": "patches"}
    return kinds.get(node.op_type) or ("prompt" if is_prompt(node) else None)


def _operands(node: ir.Node) -> dict[str, ir.Value]:
    """The operands of a duq node by their names in plugins/ops.py."""
    return dict(zip(duq_ops.inputs_of(node.op_type, node.overload), inputs_of(node), strict=True))


def _geglu_in_front(x: ir.Value) -> ir.Value | None:
    """[gate, up] of x = gelu_tanh(gate) * up, where nobody else reads what is in between."""
    multiply = x.producer()
    if multiply is None or multiply.op_type != "Mul" or reader_of(x) is None:
        return None
    activated, up = inputs_of(multiply)
    gelu, split = activated.producer(), up.producer()
    if any(reader_of(operand) is not multiply for operand in (activated, up)) or gelu is None or not is_gelu(gelu):
        return None
    gate = input_of(gelu, 0)
    if split is None or split.op_type != "Split" or reader_of(gate) is not gelu or list(split.outputs) != [gate, up]:
        return None
    return input_of(split, 0)


# Epilogues


def epilogue_of(node: ir.Node, name: str, fusions: Fusions = ALL) -> Epilogue:
    """Collects the element-wise nodes behind a linear, as far as each result has one reader and the kernels take them."""
    epilogue, takes = Epilogue(node.outputs[0]), fusions.epilogue
    while not epilogue.out.is_graph_output() and _extend(epilogue, takes):
        pass
    destination(epilogue)
    if epilogue.parts and _is_rotated(epilogue):
        epilogue.rotation = _rotation_of(name, epilogue.parts)
    return epilogue


def _extend(epilogue: Epilogue, takes: frozenset[str]) -> bool:
    """Takes the next node into the epilogue; False where that is not possible, or where it ends in parts."""
    value, readers = epilogue.out, readers_of(epilogue.out)
    if "activation" in takes and sorted(reader.op_type for reader in readers) == ["Mul", "Sigmoid"]:
        multiply = next(reader for reader in readers if reader.op_type == "Mul")
        if other_input(multiply, value).producer() not in readers:
            return False
        epilogue.activation, epilogue.out = "silu", multiply.outputs[0]
        epilogue.nodes += readers
        return True
    if len(readers) != 1:
        return False
    (following,) = readers
    if following.op_type == "Multistep" and "multistep" in takes:
        return _take_multistep(following, epilogue)
    if following.op_type == "Split" and "split" in takes:
        epilogue.nodes.append(following)
        _split(following, epilogue)
        return not epilogue.parts
    other = other_input(following, value) if len(following.inputs) == 2 else None
    plain = not epilogue.activation and epilogue.residual is None
    adds = following.op_type == "Add" and plain
    if adds and "bias" in takes and is_weight(other, rank=1):
        epilogue.bias = [other]
    elif adds and "bias" in takes and is_table_row(other):
        epilogue.bias_table = table_of(other)
    elif following.op_type == "Mul" and plain and "gate" in takes and is_table_row(other):
        epilogue.gate = table_of(other)
    elif plain and "activation" in takes and is_gelu(following):
        epilogue.activation = "gelu"
    elif adds and "residual" in takes and other is not None and not other.is_initializer() and not is_table_row(other):
        epilogue.residual = source_of(other)
    elif not (is_view(following) and following.op_type == "Gather"):
        return False
    epilogue.out = following.outputs[0]
    epilogue.nodes.append(following)
    return True


def _take_multistep(node: ir.Node, epilogue: Epilogue) -> bool:
    x, change, history, coefficients, _ = inputs_of(node)
    if change is not epilogue.out or epilogue.activation or epilogue.residual is not None:
        return False
    epilogue.out, history_next = node.outputs
    epilogue.residual = source_of(x)
    epilogue.multistep = Multistep(history, history_next, coefficients)
    epilogue.nodes.append(node)
    return True


def _split(node: ir.Node, epilogue: Epilogue) -> None:
    """A Split of gate and up that become GeGLU; or of q, k and v, perhaps with a bias each."""
    if len(node.outputs) == 2:
        gate, up = node.outputs
        gelu = reader_of(gate)
        multiply = reader_of(gelu.outputs[0]) if gelu is not None and is_gelu(gelu) else None
        if gelu is not None and multiply is not None and multiply.op_type == "Mul":
            if other_input(multiply, gelu.outputs[0]) is up:
                epilogue.activation, epilogue.out = "geglu", multiply.outputs[0]
                epilogue.nodes += [gelu, multiply]
                return
    epilogue.parts = list(node.outputs)
    adds = [reader_of(part) for part in node.outputs]
    if all(add is not None and add.op_type == "Add" and is_weight(add.inputs[1], rank=1) for add in adds):
        biased = [add for add in adds if add is not None]
        epilogue.nodes += biased
        epilogue.bias = [add.inputs[1] for add in biased]
        epilogue.parts = [add.outputs[0] for add in biased]


def destination(epilogue: Epilogue) -> Epilogue:
    """Sets where the result goes: float32 for the residual stream and for rows that are joined later, in their place."""
    readers = [] if epilogue.parts else list(final_readers(epilogue.out))
    norms = ("RMSNormalization", "LayerNormalization", "Add")
    concat = next((node for node in readers if node.op_type == "Concat" and joins_rows(node)), None)
    epilogue.any_stride = bool(epilogue.parts) or {node.op_type for node in readers} == {"RotateQuantize"}
    if concat is not None or any(node.op_type in norms for node in readers):
        epilogue.type = "float"
    if concat is not None:
        epilogue.joined = concat.outputs[0]
        epilogue.is_first = source_of(concat.inputs[0]) is source_of(epilogue.out)
    return epilogue


def final_readers(value: ir.Value) -> Iterator[ir.Node]:
    """Who reads the value, through views."""
    for view in views_of(value):
        yield from (node for node in readers_of(view) if not is_view(node))


def _is_rotated(epilogue: Epilogue) -> bool:
    readers = [reader for part in epilogue.parts for reader in readers_of(past_views(part))]
    return any(reader.op_type == "RotaryEmbedding" for reader in readers)


def _rotation_of(name: str, parts: list[ir.Value]) -> Rotation:
    """What becomes of the q, k and v (or k and v) of a linear: a rotary embedding of q and k, perhaps the cache."""
    columns = [columns_of(part) for part in parts]
    turned = [past_views(part) for part in parts]
    nodes = [readers_of(value)[0] for value in turned[:-1]]
    expect(len(parts) in (2, 3) and all(node.op_type == "RotaryEmbedding" for node in nodes), name)
    results = [*(node.outputs[0] for node in nodes), turned[-1]]
    dims = columns_of(input_of(nodes[-1], 0))
    expect(columns[-2:] == [dims, dims], name)  # one head of keys and values
    views = [view for part, last in zip(parts, turned, strict=True) for view in views_between(part, last)]
    caches = [_cache_of(result) for result in results[-2:]]
    tables, positions = [input_of(nodes[0], index) for index in (1, 2)], input_of(nodes[0], 3)
    return Rotation(columns, dims, [source_of(each) for each in results], tables, positions, caches, [*nodes, *views])


def _cache_of(value: ir.Value) -> str | None:
    """The cache that keys or values belong in: those that the prefix hands to the steps."""
    joined = [reader.outputs[0] for reader in readers_of(value) if reader.op_type == "Concat"]
    return next((each.name for each in [value, *joined] if each.is_graph_output()), None)
