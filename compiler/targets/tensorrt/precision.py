"""One float type throughout. The network is strongly typed: what the ONNX says is what runs.

Activations and weights become the float type; scales and rotations of the quantized linears stay float32, and so does the
state x of the flow, to which every step adds a little.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import onnx_ir as ir

from duq.compiler.targets.tensorrt.network import Network, insert_before, replace_readers
from duq.compiler.targets.tensorrt.options import FloatType
from duq.plugins import ops


def to_float_type(network: Network, float_type: FloatType) -> None:
    """float32 -> `float_type`, save for the operands of duq nodes, the observation, and the state of the flow."""
    graph = network.graph
    for node in graph.nodes:
        if node.domain != ops.DOMAIN:
            _cast_constants(network, node, float_type)
        if node.op == "Cast" and node.attrs["to"] == ir.DataType.FLOAT:
            node.attrs["to"] = int(float_type.onnx)
        for value in node.outputs:
            value.dtype = value.shape = None  # TensorRT infers what is between inputs and outputs
    for value in graph.inputs:
        if value.dtype == np.float32 and (value.name == "embeddings" or is_key_value(value.name)):
            value.dtype = int(float_type.onnx)
        elif value.dtype == np.float32:
            _cast_input(graph, value, float_type)
    for value in graph.outputs:
        value.dtype = np.float32 if value.name == "x_next" else int(float_type.onnx)
        if value.name == "x_next":
            _keep_flow_in_float32(graph, value)


def is_key_value(name: str) -> bool:
    return name.split(".")[0] in ("key", "value")


def _cast_constants(network: Network, node: gs.Node, float_type: FloatType) -> None:
    def cast(tensor: ir.TensorProtocol) -> np.ndarray[Any, Any]:
        return tensor.numpy().astype(float_type.numpy)

    for index, operand in enumerate(node.inputs):
        if isinstance(operand, gs.Constant) and network.tensors[operand.name].dtype == ir.DataType.FLOAT:
            node.inputs[index] = network.derived(operand.name, float_type.name, float_type.onnx, cast)


def _cast_input(graph: gs.Graph, value: gs.Variable, float_type: FloatType) -> None:
    narrow = gs.Variable(f"{value.name}_{float_type.name}")
    replace_readers(value, narrow)
    graph.nodes.insert(0, _cast(value, narrow, float_type.onnx))


def _keep_flow_in_float32(graph: gs.Graph, x_next: gs.Variable) -> None:
    """x_next = x + change: the sum is taken in float32, of the input as it is."""
    (add,) = x_next.inputs
    (cast,) = [node for operand in add.inputs for node in operand.inputs if node.op == "Cast"]
    (x,), (narrow,) = cast.inputs, cast.outputs
    (change,) = [operand for operand in add.inputs if operand is not narrow]
    wide = gs.Variable(f"{change.name}_float32")
    add.inputs = [wide if operand is change else x for operand in add.inputs]
    insert_before(graph, add, _cast(change, wide, ir.DataType.FLOAT))


def _cast(value: gs.Variable, result: gs.Variable, to: ir.DataType) -> gs.Node:
    return gs.Node("Cast", f"cast.{result.name}", {"to": int(to)}, [value], [result])
