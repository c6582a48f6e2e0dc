"""Weights as MatMul reads them: y = x W with W [K, N], no Transpose or Gemm left around a weight."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from duq.compiler.graph.edit import initializer, insert_before, is_weight, lazy, replace, simplify
from duq.compiler.graph.export import Graphs


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
                name = (
                    f"{weight.name.removesuffix('.weight')}.gain"  # of equal weights the exporter keeps one, a bias perhaps
                )
                gain = lazy(model.graph, name, [weight, one], weight.shape, np.add)
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
    (node,) = [n for n in graph if n.op_type == "Gather" and n.inputs[0].name == "llm.embed_tokens.weight"]
    tensor = ir.LazyTensor(
        lambda: ir.tensor_adapters.TorchTensor(table, name="llm.embed_tokens.bfloat16"),
        dtype=ir.DataType.BFLOAT16,
        shape=ir.Shape(table.shape),
        name="llm.embed_tokens.bfloat16",
    )
    (rows,) = insert_before(node, "Gather", [initializer(graph, tensor.name, tensor), node.inputs[1]])
    (wide,) = insert_before(node, "Cast", [rows], to=ir.DataType.FLOAT)
    replace(node.outputs[0], wide)
    simplify(graphs.prefix)
    return 1


def _transposed(graph: ir.Graph, weight: ir.Value) -> ir.Value:
    name = f"{weight.name.removesuffix('.weight')}.weight_kn"
    return lazy(graph, name, [weight], reversed(weight.shape.numpy()), lambda w: w.T)
