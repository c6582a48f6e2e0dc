"""Weights as MatMul reads them: y = x W with W [K, N], no Transpose or Gemm left around a weight."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import torch

from duq.compiler.graph.edit import initializer, insert_before, is_weight, lazy, replace, simplify
from duq.compiler.graph.export import Graphs
from duq.compiler.graph.weights import is_embedding, record


def weights_as_matmul_reads_them(graphs: Graphs) -> int:
    """PyTorch stores a linear's weight [N, K] and exports Transpose + MatMul, or Gemm for two-dimensional inputs.

    The gain 1 + w of a Gemma norm becomes one initializer as well. Matches linears and gains.
    """
    matches = 0
    for _, model in graphs.items():
        simplify(model)
        for node in list(model.graph):
            if node.op_type == "Gemm" and is_weight(node.inputs[1], rank=2) and node.attributes["transB"].as_int():
                x, weight, bias = node.inputs
                (product,) = insert_before(node, "MatMul", [x, _transposed(model.graph, weight)])
                (y,) = insert_before(node, "Add", [product, bias])
                replace(node.outputs[0], y)
                matches += 1
            elif node.op_type == "Transpose" and is_weight(node.inputs[0], rank=2):
                replace(node.outputs[0], _transposed(model.graph, node.inputs[0]))
                matches += 1
            elif node.op_type == "RMSNormalization" and node.inputs[1].producer() is not None:
                weight, one = node.inputs[1].producer().inputs
                of_gain = dataclasses.replace(record(weight), part="gain")
                gain = lazy(model.graph, of_gain, [weight, one], weight.shape.numpy(), np.add)
                node.replace_input_with(1, gain)
                matches += 1
        simplify(model)
    return matches


def keep_embedding_dtype(graphs: Graphs) -> int:
    """A bfloat16 embedding table stays bfloat16 (1 GB instead of 2 at full size): only the rows read are upcast."""
    table = graphs.weights["llm.embed_tokens.weight"]
    if table.dtype != torch.bfloat16:
        return 0
    graph = graphs.prefix.graph
    found = [node for node in graph if node.op_type == "Gather" and _is_wide_embedding(node.inputs[0])]
    if not found:
        return 0
    node, narrow = found[0], record(found[0].inputs[0]).in_form("bfloat16")
    tensor = ir.LazyTensor(
        lambda: ir.tensor_adapters.TorchTensor(table, name=narrow.name),
        dtype=ir.DataType.BFLOAT16,
        shape=ir.Shape(table.shape),
        name=narrow.name,
    )
    (rows,) = insert_before(node, "Gather", [initializer(graph, narrow, tensor), node.inputs[1]])
    (wide,) = insert_before(node, "Cast", [rows], to=ir.DataType.FLOAT)
    replace(node.outputs[0], wide)
    simplify(graphs.prefix)
    return len(found)


def _is_wide_embedding(value: ir.Value) -> bool:
    return is_embedding(value) and value.dtype == ir.DataType.FLOAT


def _transposed(graph: ir.Graph, weight: ir.Value) -> ir.Value:
    return lazy(graph, record(weight).in_form("kn"), [weight], weight.shape.numpy()[::-1], lambda w: w.T)
