"""What lowering looks for in the graph: kinds of nodes, chains of them behind products, and views of one matrix."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from duq.compiler.graph.edit import depends_on, is_weight, small_constant
from duq.compiler.graph.edit import reader as reader_of
from duq.compiler.graph.weights import is_time_table
from duq.compiler.targets.cuda.problems import Gemm
from duq.plugins import ops
from duq.plugins.tactics import FEW_TOKENS

VIEWS = ("Reshape", "Unsqueeze", "Squeeze", "Transpose")


@dataclass
class Epilogue:
    """What follows a product: (y * gate + bias) -> activation -> + residual, and the value or the parts it ends in."""

    out: ir.Value
    nodes: list[ir.Node] = field(default_factory=list)
    bias: list[ir.Value] = field(default_factory=list)
    bias_table: ir.Value | None = None
    gate: ir.Value | None = None
    activation: str = ""
    residual: ir.Value | None = None
    parts: list[ir.Value] = field(default_factory=list)


def is_rotated(epilogue: Epilogue) -> bool:
    readers = [reader for part in epilogue.parts for reader in readers_of(past_views(part))]
    return any(reader.op_type == "RotaryEmbedding" for reader in readers)


def epilogue_of(node: ir.Node) -> Epilogue:
    """Collects the element-wise nodes behind a product, as far as each result has one reader."""
    epilogue = Epilogue(node.outputs[0])
    while not epilogue.out.is_graph_output():
        value, readers = epilogue.out, readers_of(epilogue.out)
        if sorted(reader.op_type for reader in readers) == ["Mul", "Sigmoid"]:
            multiply = next(reader for reader in readers if reader.op_type == "Mul")
            if other_input(multiply, value).producer() not in readers:
                break
            epilogue.activation, epilogue.out = "silu", multiply.outputs[0]
            epilogue.nodes += readers
            continue
        if len(readers) != 1:
            break
        (following,) = readers
        other = other_input(following, value) if len(following.inputs) == 2 else None
        plain = not epilogue.activation and epilogue.residual is None
        if following.op_type == "Split":
            epilogue.nodes.append(following)
            split_parts(following, epilogue)
            if epilogue.parts:
                break
            continue
        if following.op_type == "Add" and is_weight(other, rank=1) and plain:
            epilogue.bias = [other]
        elif following.op_type == "Add" and is_table_row(other) and plain:
            epilogue.bias_table = other
        elif following.op_type == "Mul" and is_table_row(other) and plain:
            epilogue.gate = other
        elif is_gelu(following) and plain:
            epilogue.activation = "gelu"
        elif following.op_type == "Add" and other is not None and not other.is_initializer() and plain:
            epilogue.residual = other
        elif not (is_view(following) and following.op_type == "Gather"):
            break
        epilogue.out = following.outputs[0]
        epilogue.nodes.append(following)
    return epilogue


def split_parts(node: ir.Node, epilogue: Epilogue) -> None:
    """A Split of gate and up that become GeGLU; or of q, k and v, perhaps with a bias each."""
    if len(node.outputs) == 2:
        gate, up = node.outputs
        gelu = reader_of(gate)
        multiply = reader_of(gelu.outputs[0]) if gelu is not None and is_gelu(gelu) else None
        if multiply is not None and multiply.op_type == "Mul" and other_input(multiply, gelu.outputs[0]) is up:
            epilogue.activation, epilogue.out = "geglu", multiply.outputs[0]
            epilogue.nodes += [gelu, multiply]
            return
    epilogue.parts = list(node.outputs)
    adds = [reader_of(part) for part in node.outputs]
    if all(add is not None and add.op_type == "Add" and is_weight(add.inputs[1], rank=1) for add in adds):
        epilogue.nodes += adds
        epilogue.bias = [add.inputs[1] for add in adds]
        epilogue.parts = [add.outputs[0] for add in adds]


def output_type(epilogue: Epilogue) -> str:
    """float32 for the residual stream and rows that are concatenated later, bf16 for what a product reads."""
    readers = [] if epilogue.parts else final_readers(epilogue.out)
    stream = any(joins_rows(node) or node.op_type in ("RMSNormalization", "LayerNormalization", "Add") for node in readers)
    return "float" if stream else "Bf16"


def integer_gemm(node: ir.Node, rows: int) -> Gemm:
    """What the GEMM of a quantized linear computes for so many tokens: in front of an output rotation its sums alone.

    Zeros make the sizes multiples of what the kernels take at a time: of K always, of N where it is worth it (few tokens take
    any 16) and the readers of y take rows of any stride.
    """
    epilogue, (k, n) = epilogue_of(node), node.inputs[2].shape.numpy()
    bits, many = ops.QUANTIZED_LINEARS[node.op_type][0], rows > FEW_TOKENS
    k = padded(k, 128 if many else 64)
    if "output_rotation" in ops.inputs_of(node.op_type, node.overload):
        return Gemm(rows, n, k, bits, "int", "NONE")
    any_stride = epilogue.parts or {reader.op_type for reader in final_readers(epilogue.out)} == {"RotateQuantize"}
    if many and n % 64 and any_stride:
        parts = 2 if epilogue.activation == "geglu" else 1
        n = parts * padded(n // parts, 128)
    return Gemm(rows, n, k, bits, output_type(epilogue), epilogue.activation.upper() or "NONE")


def padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def is_view(node: ir.Node) -> bool:
    """Whether the node only sees the same matrix in another shape, the choice of the only batch included."""
    if node.op_type == "Gather" and not node.inputs[0].is_initializer():
        index = small_constant(node.inputs[1], limit=1)
        return index is not None and index.item() == 0 and node.inputs[0].shape[0] == 1
    return node.op_type in VIEWS


def is_whole(node: ir.Node) -> bool:
    """A Slice that takes everything."""
    return node.op_type == "Slice" and node.outputs[0].shape == node.inputs[0].shape


def is_linear(node: ir.Node) -> bool:
    return node.op_type in ops.QUANTIZED_LINEARS or (node.op_type == "MatMul" and is_weight(node.inputs[1], rank=2))


def is_prompt(node: ir.Node) -> bool:
    """The rows of the embedding table for the prompt's tokens."""
    return node.op_type == "Gather" and "tokens" in depends_on(node.inputs[1])


def joins_rows(node: ir.Node) -> bool:
    """A Concat of tokens [1, tokens, channels]; one of keys or values [1, heads, tokens, channels] has its axis at 2."""
    return node.op_type == "Concat" and node.attributes["axis"].value != 2


def is_gelu(node: ir.Node) -> bool:
    """In the form that the kernels have, with tanh."""
    return node.op_type == "Gelu" and node.attributes.get_string("approximate", "none") == "tanh"


def is_table_row(value: ir.Value | None) -> bool:
    """table[step], a table of the time."""
    node = value.producer() if value is not None else None
    return node is not None and node.op_type == "Gather" and is_time_table(node.inputs[0])


def readers_of(value: ir.Value) -> list[ir.Node]:
    return [use.node for use in value.uses()]


def other_input(node: ir.Node, value: ir.Value) -> ir.Value:
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def past_views(value: ir.Value) -> ir.Value:
    """The value behind the reshapes and transposes that follow, as far as each is the only reader."""
    while (node := reader_of(value)) is not None and is_view(node):
        value = node.outputs[0]
    return value


def views_between(first: ir.Value, last: ir.Value) -> list[ir.Node]:
    """The nodes from one value to a view of it."""
    nodes = []
    while last is not first:
        nodes.append(last.producer())
        last = last.producer().inputs[0]
    return nodes


def views_of(value: ir.Value) -> list[ir.Value]:
    """The value and all its views."""
    found = [value]
    for node in readers_of(value):
        if is_view(node):
            found += views_of(node.outputs[0])
    return found


def final_readers(value: ir.Value) -> list[ir.Node]:
    """Who reads the value, through views."""
    return [node for view in views_of(value) for node in readers_of(view) if not is_view(node)]
