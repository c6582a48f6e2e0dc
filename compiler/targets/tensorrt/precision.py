"""One float type throughout. The network is strongly typed: what the ONNX says is what runs.

Activations and weights become the float type; scales and rotations of the quantized linears stay float32, and so do the
state x of the flow, to which every step adds a little, and the solver's history.
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
        value.dtype = np.float32 if value.name in ("x_next", "history_next") else int(float_type.onnx)
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
    """x_next = x + change, or what the solver makes of it: computed in float32, of the inputs as they are."""
    (last,) = x_next.inputs
    for index, operand in enumerate(list(last.inputs)):
        source = next((value for node in operand.inputs if node.op == "Cast" for value in node.inputs), None)
        if any(source is each for each in graph.inputs):
            last.inputs[index] = source
        elif operand.inputs:  # the change
            wide = gs.Variable(f"{operand.name}_float32")
            last.inputs[index] = wide
            insert_before(graph, last, _cast(operand, wide, ir.DataType.FLOAT))


def _cast(value: gs.Variable, result: gs.Variable, to: ir.DataType) -> gs.Node:
    return gs.Node("Cast", f"cast.{result.name}", {"to": int(to)}, [value], [result])
