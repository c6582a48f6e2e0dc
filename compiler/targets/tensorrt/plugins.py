"""Ops -> plugin nodes: quantizers and integer linears, each with what its kernels compute around it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_graphsurgeon as gs
import onnx_ir as ir

from duq.compiler.graph.edit import is_weight, reader
from duq.compiler.graph.passes.quantize import QuantizedTensor
from duq.compiler.graph.weights import record
from duq.compiler.targets.ops import Linear, Norm, Op, Quantize
from duq.compiler.targets.patterns import other_input
from duq.compiler.targets.tensorrt.network import Network
from duq.compiler.targets.values import dims_of, input_of, name_of, shape_of, size_of
from duq.plugins import bitblas
from duq.plugins import ops as duq_ops
from duq.plugins.gpu import gpu_of
from duq.plugins.layout import pack_bitblas
from duq.plugins.nodes import EPSILON, KernelName, Node, RotateQuantize, Tensor, W4A8Linear
from duq.plugins.trt import attributes


class Plugin(NamedTuple):
    """A plugin node: what it runs, and the BitBLAS kernel's (N, K, tile) if it runs one."""

    node: Node
    kernels: list[KernelName]
    problem: bitblas.Problem | None


def add_plugins(network: Network, ops: Sequence[Op], float_type: str, sm: int, prefix_tokens: int) -> dict[str, Plugin]:
    """Makes the nodes of quantizers and integer linears plugin nodes, in place; returns the plugins by their nodes' names.

    ops: of the model that the network was made of. float_type: of activations, "Bf16", "Half" or "float". prefix_tokens: of
    the largest observation, which the kernels of the prefix are chosen for. Raises KernelError for a linear that has no kernel.
    """
    plugins, writer = {}, _Writer(network, float_type, sm, prefix_tokens)
    for op in ops:
        if isinstance(op, Quantize):
            name, plugin = writer.quantizer(op)
        elif isinstance(op, Linear) and op.kind == "integer":
            name, plugin = writer.linear(op)
        else:
            continue  # TensorRT's own
        plugins[name] = plugin
    network.graph.cleanup()
    return plugins


class _Writer:
    """Writes plugin nodes over nodes of the network."""

    def __init__(self, network: Network, float_type: str, sm: int, prefix_tokens: int):
        self._network, self._float_type, self._sm, self._prefix_tokens = network, float_type, sm, prefix_tokens
        self._values = network.graph.tensors()

    def quantizer(self, op: Quantize) -> tuple[str, Plugin]:
        """x [.., tokens, K], or [gate, up] [.., tokens, 2 K], and operands -> x_q, x_scale."""
        source, front = _in_front(op)
        node = RotateQuantize(op.node.overload, source)
        operands = [*front, *list(op.operands.values())[1:]]
        inputs = [self._values[name_of(value)] for value in operands]
        if "permutation" in op.operands:
            inputs[node.operands.index("permutation")] = self._int32(op.operands["permutation"])
        x, *others = operands
        tensors = [Tensor((self._prefix_tokens, size_of(x, -1)), self._float_type)]
        tensors += [Tensor(shape_of(value), "float") for value in others]
        name = name_of(op.node)
        self._write(op.node, name, node, inputs)
        return name, Plugin(node, list(node.launches(tensors)), None)

    def linear(self, op: Linear) -> tuple[str, Plugin]:
        """x_q [.., tokens, K], x_scale, the packed weight [N, K / 2] and operands -> y [.., tokens, N]."""
        k, n = shape_of(op.weight)
        rows = self._rows(op)
        tile, stages = bitblas.best(rows, n, k, gpu_of(self._sm)), duq_ops.stages(op.node.overload)
        operands = [self._packed(op.weight) if name == "weight" else self._values[name_of(value)]
                    for name, value in op.operands.items()]  # fmt: skip
        last, residual = _residual(op)
        if residual is not None:
            stages, operands = [*stages, "residual"], [*operands, self._values[name_of(residual)]]
        node = W4A8Linear(duq_ops.overload_name(stages), tile, self._float_type)
        name = "+".join(record(op.weight).linears)
        self._write(last, name, node, operands)
        shapes = [((rows, k), "int8"), ((rows, 1), "float"), ((n, k // 2), "int8"), ((n,), "float")]
        return name, Plugin(node, list(node.launches([Tensor(*each) for each in shapes])), (n, k, tile))

    def _write(self, over: ir.Node, name: str, node: Node, inputs: list[gs.Tensor]) -> None:
        """Makes the node that computes the plugin's results the plugin node: it has its place, and its outputs."""
        (old,) = self._values[name_of(over.outputs[0])].inputs
        old.op, old.name, old.domain = type(node).__name__, name, duq_ops.DOMAIN
        old.attrs, old.inputs = attributes(node), inputs

    def _rows(self, op: Linear) -> int:
        """The tokens of a linear, of the largest observation."""
        assert op.quantize is not None
        sizes = dims_of(input_of(op.quantize.node, 0))[:-1]
        fixed = [size for size in sizes if isinstance(size, int)]
        return math.prod(fixed) if len(fixed) == len(sizes) else self._prefix_tokens

    def _int32(self, permutation: ir.Value) -> gs.Constant:
        return self._network.derived(
            name_of(permutation), "int32", ir.DataType.INT32, lambda tensor: tensor.numpy().astype(np.int32)
        )

    def _packed(self, weight: ir.Value) -> gs.Constant:
        """The quantized weight [N, K] as the kernels' int8 [N, K / 2]."""
        k, n = shape_of(weight)

        def pack(tensor: ir.TensorProtocol) -> np.ndarray[Any, Any]:
            assert isinstance(tensor, QuantizedTensor)
            return pack_bitblas(tensor.integers()).view(np.int8)

        return self._network.derived(name_of(weight), "bitblas", ir.DataType.INT8, pack, (n, k // 2))


def _in_front(op: Quantize) -> tuple[str, list[ir.Value]]:
    """How a quantizer's input is computed, as RotateQuantize's `source`, and from what."""
    x = input_of(op.node, 0)
    if op.geglu:
        return "GEGLU", [op.x]
    if op.norm is not None and _is_taken(op.norm, x):
        return "RMS_NORM", [input_of(op.norm.nodes[0], index) for index in (0, 1)]
    return "PLAIN", [x]


def _is_taken(norm: Norm, x: ir.Value) -> bool:
    """Whether the plugin computes the norm: nobody else reads it, and it is of the form that the kernel has."""
    only_reader = norm.out is x and reader(x) is not None
    return only_reader and is_weight(norm.nodes[0].inputs[1], rank=1) and bool(np.isclose(norm.epsilon, EPSILON))


def _residual(op: Linear) -> tuple[ir.Node, ir.Value | None]:
    """(The node that adds a tensor of the same shape to a linear's output, that tensor), or (the linear, None)."""
    y, following = op.node.outputs[0], op.epilogue.nodes[:1]
    if op.epilogue.residual is None or following[0].op_type != "Add" or y.shape is None:
        return op.node, None
    other = other_input(following[0], y)
    same = other.shape is not None and list(map(str, other.shape)) == list(map(str, y.shape))
    return (following[0], other) if same else (op.node, None)
