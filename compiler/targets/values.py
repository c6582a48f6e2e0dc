"""What an ONNX graph says of its values, where it must: onnx_ir allows a value without a name, a type or a shape."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from duq.compiler.graph.edit import expect


def input_of(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None, node.name
    return value


def inputs_of(node: ir.Node) -> list[ir.Value]:
    """All inputs of a node that has no optional one missing."""
    return [input_of(node, index) for index in range(len(node.inputs))]


def name_of(value: ir.Value | ir.Node) -> str:
    assert value.name is not None
    return value.name


def dtype_of(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None, value.name
    return value.dtype


def tensor_of(value: ir.Value) -> ir.TensorProtocol:
    """What the initializer holds."""
    assert value.const_value is not None, value.name
    return value.const_value


def dims_of(value: ir.Value) -> tuple[int | ir.SymbolicDim, ...]:
    """The shape, with symbols where a size depends on the observation. GraphError if shape inference did not find it."""
    expect(value.shape is not None, f"the shape of {value.name} is known")
    assert value.shape is not None
    return tuple(value.shape)


def size_of(value: ir.Value, axis: int) -> int:
    """The size of an axis that is the same for all observations."""
    size = dims_of(value)[axis]
    expect(isinstance(size, int), f"axis {axis} of {value.name} has one size")
    assert isinstance(size, int)
    return size


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """The shape of a constant."""
    return tuple(size_of(value, axis) for axis in range(len(dims_of(value))))


def columns_of(value: ir.Value) -> int:
    """The channels of activations, whose other dimensions may be symbolic."""
    return size_of(value, -1)


def array_of(value: ir.Value) -> np.ndarray:
    """A weight or a constant as numpy: computed, or read, now."""
    return np.asarray(tensor_of(value).numpy())
