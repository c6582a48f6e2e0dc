"""Kinds of nodes, and views of one matrix: what the GPU targets recognize in a graph."""

from __future__ import annotations

import onnx_ir as ir

from duq.compiler.graph.edit import depends_on, is_weight, small_constant
from duq.compiler.graph.edit import reader as reader_of
from duq.compiler.graph.weights import is_time_table, record
from duq.plugins import ops

VIEWS = ("Reshape", "Unsqueeze", "Squeeze", "Transpose")
INTEGERS = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)


def is_integer(node: ir.Node) -> bool:
    """Whether the node computes integers, positions for example, which are constants of a size of the observation."""
    return all(output.dtype in INTEGERS for output in node.outputs)


def is_view(node: ir.Node) -> bool:
    """Whether the node only sees the same matrix in another shape, the choice of the only batch included.

    Activations stay [tokens, channels] in memory, whatever their shape in the graph.
    """
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


def table_of(row: ir.Value) -> ir.Value:
    """The table [steps, ...] of a row of it."""
    return row.producer().inputs[0]


def label(weight: ir.Value) -> str:
    """What a weight's linear is called: its modules' names, without the gains that were folded in."""
    return record(weight).label


def readers_of(value: ir.Value) -> list[ir.Node]:
    return [use.node for use in value.uses()]


def other_input(node: ir.Node, value: ir.Value) -> ir.Value:
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def source_of(value: ir.Value) -> ir.Value:
    """The value that this one is a view of: what lies in memory."""
    while (node := value.producer()) is not None and (is_view(node) or is_whole(node)):
        value = node.inputs[0]
    return value


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
