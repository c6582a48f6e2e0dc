"""What happens to the ONNX graphs before they are TensorRT's: the token table leaves, and ops are found."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from duq.compiler.errors import GraphError
from duq.compiler.graph.edit import expect, initializer, insert_before, reader, replace
from duq.compiler.graph.weights import is_embedding
from duq.compiler.targets.fuse import Fusions, fuse
from duq.compiler.targets.ops import Op
from duq.compiler.targets.values import dims_of, input_of, size_of
from duq.plugins import ops
from duq.plugins.nodes import NODES

FUSIONS = Fusions(
    anchors=frozenset({"quantizer", "linear"}),
    norms=frozenset({"RMSNormalization"}),
    adaptive_norms=False,
    geglu_in_front=True,
    epilogue=frozenset({"residual"}),
)

EXPANDED = ("Multistep",)  # duq's operators that are TensorRT's own in the form of their definition


def take_embeddings(model: ir.Model) -> ir.Value:
    """Makes the rows of the token table an input, `embeddings` float32 [prompt, width], in place of `tokens`; returns the
    table [vocabulary, width].

    The executor looks the rows up on the host: a gigabyte less on the device for 200 rows.
    """
    graph = model.graph
    (tokens,) = [value for value in graph.inputs if value.name == "tokens"]
    gathers = [node for node in graph if node.op_type == "Gather"]
    (gather,) = [node for node in gathers if is_embedding(input_of(node, 0))]
    table = input_of(gather, 0)
    shape = ir.Shape([dims_of(tokens)[0], size_of(table, -1)])
    embeddings = ir.Value(name="embeddings", type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
    graph.inputs[list(graph.inputs).index(tokens)] = embeddings
    widened = reader(gather.outputs[0])
    rows = widened.outputs[0] if widened is not None and widened.op_type == "Cast" else gather.outputs[0]
    (one_sequence,) = insert_before(
        gather, "Unsqueeze", [embeddings, initializer(graph, "first_axis", np.array([0], np.int64))]
    )
    one_sequence.shape, one_sequence.type = rows.shape, rows.type
    rows.replace_all_uses_with(one_sequence)
    for use in list(tokens.uses()):
        if use.node.op_type == "Shape":  # of its first axis
            use.node.replace_input_with(use.idx, embeddings)
    common.RemoveUnusedNodesPass()(model)
    expect(not tokens.uses(), "tokens are read for their rows and their number only")
    return table


def prepare(model: ir.Model) -> list[Op]:
    """Infers shapes and expands what TensorRT has no kernel for, in place; returns the ops that plugins are made from.

    Raises GraphError for a quantized linear that there is no plugin for.
    """
    common.ShapeInferencePass()(model)
    _check_operators(model)
    _expand_attention_of_one_query(model)
    return fuse(model, FUSIONS)


def _check_operators(model: ir.Model) -> None:
    unknown = sorted({node.op_type for node in model.graph if node.domain == ops.DOMAIN} - {*NODES, *EXPANDED})
    if unknown:
        raise GraphError(
            f"--target tensorrt has plugins for {', '.join(NODES)}, not for {', '.join(unknown)}: quantize to 4-bit weights "
            "and 8-bit activations, or leave those linears in float"
        )


def _expand_attention_of_one_query(model: ir.Model) -> None:
    """softmax(q k^T scale) v of a single token, pi0's state, as products: TensorRT-RTX has no attention kernel for it."""
    for node in list(model.graph):
        if node.op_type != "Attention" or len(node.inputs) > 3 or dims_of(input_of(node, 0))[-2] != 1:
            continue
        query, key, value = node.inputs
        dims = size_of(input_of(node, 0), -1)
        scale = node.attributes.get_float("scale", dims**-0.5)
        (turned,) = insert_before(node, "Transpose", [key], perm=[0, 1, 3, 2])
        factor = initializer(model.graph, f"attention_scale_{dims}", np.array(scale, np.float32))
        (scaled,) = insert_before(node, "Mul", [query, factor])
        (scores,) = insert_before(node, "MatMul", [scaled, turned])
        (weights,) = insert_before(node, "Softmax", [scores], axis=-1)
        (mixed,) = insert_before(node, "MatMul", [weights, value])
        replace(node.outputs[0], mixed)
    common.RemoveUnusedNodesPass()(model)
