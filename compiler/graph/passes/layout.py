"""Weights as MatMul reads them: y = x W with W [K, N], no Transpose or Gemm left around a weight."""
from __future__ import annotations

import onnx_ir as ir

from compiler.graph.edit import insert_before, is_weight, lazy, replace, simplify
from compiler.graph.export import Graphs


def weights_as_matmul_reads_them(graphs: Graphs) -> Graphs:
    """PyTorch stores a linear's weight [N, K] and exports Transpose + MatMul, or Gemm for two-dimensional inputs."""
    for _, model in graphs.items():
        simplify(model)
        for node in list(model.graph):
            if node.op_type == "Gemm" and is_weight(node.inputs[1], rank=2) and node.attributes["transB"].as_int():
                x, weight, bias = node.inputs
                (product,) = insert_before(node, "MatMul", [x, _transposed(model.graph, weight)])
                (y,) = insert_before(node, "Add", [product, bias])
                replace(node.outputs[0], y)
            elif node.op_type == "Transpose" and is_weight(node.inputs[0], rank=2):
                replace(node.outputs[0], _transposed(model.graph, node.inputs[0]))
        simplify(model)
    return graphs


def _transposed(graph: ir.Graph, weight: ir.Value) -> ir.Value:
    name = f"{weight.name.removesuffix('.weight')}.weight_kn"
    return lazy(graph, name, [weight], reversed(weight.shape.numpy()), lambda w: w.T)
