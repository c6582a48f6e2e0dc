"""Float linears -> duq nodes, following the packs of the quantizer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from duq.compiler.errors import GraphError
from duq.compiler.graph.edit import initializer, insert_before, is_weight, reader, replace, simplify
from duq.compiler.graph.export import Graphs
from duq.compiler.graph.weights import Part, by_content, of_module, weight_of
from duq.compiler.quant.pack import LinearPack
from duq.compiler.quant.transforms import hadamard
from duq.plugins import ops
from duq.plugins.layout import pack_int4


def lower_quantized_linears(graphs: Graphs) -> int:
    """Replaces the linear of every pack by its prologue (RotateQuantize or Rotate) and its duq linear.

    Each linear gets a prologue of its own. Those of linears that share input and transforms are equal nodes, and
    merging equal nodes leaves one; foreign packs with transforms that differ keep one each. Matches linears in both graphs.
    Raises GraphError if a pack names a linear that is in neither graph.
    """
    packs, matches = graphs.packs, 0
    missing = set(packs)
    for _, model in graphs.items():
        for node in list(model.graph):
            weight = weight_of(node.inputs[1]) if node.op_type == "MatMul" else None
            pack = packs.get(weight.linears[0]) if weight is not None else None
            if pack is not None and weight == of_module(pack.name, "weight", "kn"):
                _lower(model.graph, node, pack)
                missing.discard(pack.name)
                matches += 1
        simplify(model)
        ops.add_functions(model)
    if missing:
        raise GraphError(f"quantized linears that the policy never computes: {', '.join(sorted(missing))}")
    return matches


def _lower(graph: ir.Graph, node: ir.Node, pack: LinearPack) -> None:
    bias = reader(node.outputs[0])
    has_bias = bias is not None and bias.op_type == "Add" and is_weight(bias.inputs[1], rank=1)
    last = bias if has_bias else node

    integer = pack.activation_bits == 8
    if pack.weight_bits not in (4, 8):
        raise GraphError(f"{pack.name}: {pack.weight_bits}-bit weights have no operator")
    stage_values = _prologue(graph, pack)
    if integer and pack.activation_scale is None:
        stage_values["per_token"] = []
    elif integer:
        scale = np.array(pack.activation_scale, np.float32)
        stage_values["per_tensor"] = [_by_content(graph, "activation_scale", scale)]
    activations = [node.inputs[0]]
    if integer or stage_values:
        operands = [operand for operands in stage_values.values() for operand in operands]
        activations = insert_before(
            last,
            "RotateQuantize" if integer else "Rotate",
            [node.inputs[0], *operands],
            outputs=2 if integer else 1,
            domain=ops.DOMAIN,
            overload=ops.overload_name(list(stage_values)),
        )

    k, n = node.inputs[1].shape.numpy()
    integers = of_module(pack.name, "weight", "q")
    inputs = [
        *activations,
        initializer(graph, integers, QuantizedTensor(integers.name, pack.weight, (n, k), pack.weight_bits)),
        initializer(graph, of_module(pack.name, "weight_scale"), np.asarray(pack.weight_scale, np.float32)),
    ]
    overload = []
    if pack.output_rotation is not None:
        overload.append("output_rotation")
        rotation = np.asarray(pack.output_rotation, np.float32)
        inputs.append(initializer(graph, of_module(pack.name, "output_rotation"), rotation))
    if has_bias:
        overload.append("bias")
        inputs.append(bias.inputs[1])
    (y,) = insert_before(
        last,
        f"W{pack.weight_bits}A{8 if integer else 16}Linear",
        inputs,
        domain=ops.DOMAIN,
        overload=ops.overload_name(overload),
        name=pack.name,
    )
    replace(last.outputs[0], y)


def _prologue(graph: ir.Graph, pack: LinearPack) -> dict[str, list[ir.Value]]:
    """Stage -> its operands. Initializers are named by content, so that equal transforms make equal nodes."""
    found: dict[str, list[ir.Value]] = {}
    if pack.input_scale is not None:
        found["scale"] = [_by_content(graph, "input_scale", np.asarray(pack.input_scale, np.float32))]
    if pack.permutation is not None:
        found["permute"] = [_by_content(graph, "permutation", np.asarray(pack.permutation, np.int64))]
    if isinstance(pack.rotation, str):
        found["hadamard"] = [_by_content(graph, "hadamard", hadamard(pack.block_size).numpy())]
    elif pack.rotation is not None:
        found["rotation"] = [_by_content(graph, "rotation", np.asarray(pack.rotation, np.float32))]
    return found


def _by_content(graph: ir.Graph, part: Part, array: np.ndarray) -> ir.Value:
    return initializer(graph, by_content(part, array), array)


class QuantizedTensor(ir.LazyTensor):
    """The weight of a quantized linear: to ONNX [K, N], INT4 (two a byte) or INT8, made when it is written out.

    Whoever has another form for it starts from `integers()`, int8 [N, K], as packs and kernels have them.
    """

    def __init__(self, name: str, integers: Callable[[], np.ndarray], shape: tuple[int, int], bits: int):
        """shape: (N, K) of the integers."""
        self.integers = integers
        dtype, in_onnx = ir.DataType.INT4 if bits == 4 else ir.DataType.INT8, ir.Shape(shape[::-1])

        def load() -> ir.TensorProtocol:
            values = np.ascontiguousarray(integers().T)
            if bits == 8:
                return ir.Tensor(values, name=name)
            return ir.PackedTensor(pack_int4(values.reshape(-1)), dtype, shape=in_onnx, name=name)

        super().__init__(load, dtype=dtype, shape=in_onnx, name=name)
