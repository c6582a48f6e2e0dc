"""Graphs in onnx-graphsurgeon, without their weights: what becomes an engine, and what --keep-phases writes.

A weight is computed when it is read, once, and written where TensorRT reads it. So the constants here have a name, a type
and a shape, but no data (`Network.tensors` has what computes it), and a model of any size is a small ONNX file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.logger import G_LOGGER

from duq.compiler.graph.weights import weight_of
from duq.compiler.targets.values import tensor_of
from duq.plugins import ops

INLINE_BYTES = 1024  # smaller constants stay inside the model


class Network:
    """A graph, and its constants by name.

    Attributes:
        graph: its constants of at least INLINE_BYTES are stubs, TensorProtos of external data without a file.
        tensors: the constants by name; most are computed when they are read.
        weights: names of the policy's weights, and of their other forms. They mean the same in every graph of the policy;
            names of other constants are the graph's own.
    """

    def __init__(self, graph: gs.Graph, tensors: dict[str, ir.TensorProtocol], weights: set[str]):
        self.graph, self.tensors, self.weights = graph, tensors, weights
        self._constants: dict[str, gs.Constant] = {
            name: each for name, each in graph.tensors().items() if isinstance(each, gs.Constant)
        }

    @classmethod
    def of(cls, model: ir.Model) -> Network:
        """The graph of a model, which stays as it is, without the functions that define duq's operators."""
        copy = model.clone()
        copy.functions.clear()
        constants = copy.graph.initializers
        tensors = {name: tensor_of(value) for name, value in constants.items()}
        for name, value in constants.items():
            value.const_value = _stub(name, tensors[name])
        with G_LOGGER.suppress(G_LOGGER.ERROR):  # it warns that numpy has no bfloat16
            graph = gs.import_onnx(ir.to_proto(copy))
        return cls(graph, tensors, {name for name, value in constants.items() if weight_of(value) is not None})

    def proto(self) -> onnx.ModelProto:
        """The model without its weights, in topological order as the nodes are."""
        return gs.export_onnx(self.graph)

    def constant(self, name: str, tensor: ir.TensorProtocol, is_weight: bool = False) -> gs.Constant:
        """Adds a constant, or returns the one of this name: equal names are given only to equal contents."""
        if name not in self._constants:
            self.tensors[name] = tensor
            if is_weight:
                self.weights.add(name)
            with G_LOGGER.suppress(G_LOGGER.ERROR):
                values = LazyValues(ir.serde.serialize_tensor(_stub(name, tensor)))
            self._constants[name] = gs.Constant(name, values)
        return self._constants[name]

    def derived(
        self,
        source: str,
        form: str,
        dtype: ir.DataType,
        compute: Callable[[ir.TensorProtocol], np.ndarray],
        shape: tuple[int, ...] | None = None,
    ) -> gs.Constant:
        """Another form of the constant `source`, computed when it is read. shape: the source's, unless given."""
        name, tensor = f"{source}_{form}", self.tensors[source]
        lazy = ir.LazyTensor(
            lambda: ir.Tensor(compute(tensor), dtype=dtype, name=name),
            dtype=dtype,
            shape=ir.Shape(tensor.shape.numpy() if shape is None else shape),
            name=name,
        )
        return self.constant(name, lazy, source in self.weights)

    def adopted(self, other: Network, name: str) -> gs.Constant:
        """Another network's constant: a weight as itself, any other under a name of its own."""
        is_weight = name in other.weights
        return self.constant(name if is_weight else f"step.{name}", other.tensors[name], is_weight)


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether the tensor of a network's model is a stub."""
    return tensor.data_location == onnx.TensorProto.EXTERNAL


def unroll(prefix: Network, step: Network, num_steps: int) -> Network:
    """Prefix and all denoising steps as one network: images, embeddings, (state,) x -> x_next. `prefix` is used up."""
    whole, names = prefix.graph, step.graph.tensors()
    constants = {name: prefix.adopted(step, name) for name, each in names.items() if isinstance(each, gs.Constant)}
    key_values = {value.name: value for value in whole.outputs}
    x = names["x"]
    state: dict[str, gs.Tensor] = {"x": gs.Variable("x", x.dtype, x.shape)}
    whole.inputs.append(state["x"])
    if "history" in names:
        zeros = ir.tensor(np.zeros(names["history"].shape, np.float32))
        state["history"] = prefix.constant("history_before_the_first_step", zeros)
    for index in range(num_steps):
        number = prefix.constant(f"step_{index}", ir.tensor(np.array(index, np.int64)))
        inputs = {value.name: key_values.get(value.name, number) for value in step.graph.inputs} | state
        values = _append(whole, step.graph, constants | inputs, f"step_{index}")
        state = {name: values[f"{name}_next"] for name in state}
    flow = state["x"]
    flow.name, flow.dtype, flow.shape = "x_next", x.dtype, x.shape
    whole.outputs = [flow]
    whole.cleanup()
    return Network(whole, prefix.tensors, prefix.weights)


def _append(graph: gs.Graph, step: gs.Graph, known: Mapping[str, gs.Tensor], prefix: str) -> dict[str, gs.Tensor]:
    """Copies the step's nodes behind the graph's; returns its values, copied. known: the step's constants and inputs."""
    values = dict(known)
    for node in step.nodes:
        for output in node.outputs:
            values[output.name] = gs.Variable(f"{prefix}.{output.name}", output.dtype, output.shape)
        inputs = [gs.Variable.empty() if each.is_empty() else values[each.name] for each in node.inputs]
        outputs = [values[each.name] for each in node.outputs]
        graph.nodes.append(gs.Node(node.op, f"{prefix}.{node.name}", dict(node.attrs), inputs, outputs, node.domain))
    return values


def expand(network: Network, op_type: str) -> None:
    """Makes every node of a duq operator the nodes of its definition, for one that there is no plugin for."""
    graph = network.graph
    for node in [each for each in graph.nodes if (each.domain, each.op) == (ops.DOMAIN, op_type)]:
        body = ir.serde.serialize_function(ops.function(op_type, "plain", graph.opset))
        values: dict[str, gs.Tensor] = dict(zip([*body.input, *body.output], [*node.inputs, *node.outputs], strict=True))
        node.outputs.clear()
        for inner in body.node:
            for name in inner.output:
                values.setdefault(name, gs.Variable(f"{node.name}.{name}"))
            attributes = {each.name: onnx.helper.get_attribute_value(each) for each in inner.attribute}
            inputs, outputs = ([values[name] for name in names] for names in (inner.input, inner.output))
            insert_before(
                graph, node, gs.Node(inner.op_type, f"{node.name}.{outputs[0].name}", attributes, inputs, outputs)
            )
    graph.cleanup()


def replace_readers(value: gs.Tensor, new: gs.Tensor) -> None:
    """Makes every reader of `value` read `new`."""
    for node in list(value.outputs):
        for index, operand in enumerate(node.inputs):
            if operand is value:
                node.inputs[index] = new


def insert_before(graph: gs.Graph, node: gs.Node, new: gs.Node) -> None:
    """Adds a node in front of another: nodes compare by their content, so theirs is not list.index."""
    place = next(index for index, each in enumerate(graph.nodes) if each is node)
    graph.nodes.insert(place, new)


def _stub(name: str, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The tensor itself if it is small, else one of its type and shape without data."""
    if tensor.nbytes < INLINE_BYTES:
        return tensor
    return ir.ExternalTensor(
        "weights", None, None, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name, base_dir=""
    )
