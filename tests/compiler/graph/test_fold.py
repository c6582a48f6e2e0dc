"""Folding constants into weights, on graphs with more than one match."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from duq.compiler.graph.export import Graphs
from duq.compiler.graph.passes.fold import fold_output_scales
from duq.compiler.graph.weights import mark, of_module


def scaled_linears(factors: list[float], random: np.random.Generator) -> ir.Model:
    """y_i = (x W_i + b_i) c_i for each factor c_i."""
    nodes, initializers, outputs = [], {}, []
    for index, factor in enumerate(factors):
        initializers |= {
            f"w{index}.weight_kn": random.standard_normal((5, 3), np.float32),
            f"b{index}": random.standard_normal(3, np.float32),
            f"c{index}": np.float32(factor),
        }
        nodes += [
            onnx.helper.make_node("MatMul", ["x", f"w{index}.weight_kn"], [f"p{index}"]),
            onnx.helper.make_node("Add", [f"p{index}", f"b{index}"], [f"s{index}"]),
            onnx.helper.make_node("Mul", [f"s{index}", f"c{index}"], [f"y{index}"]),
        ]
        outputs.append(onnx.helper.make_tensor_value_info(f"y{index}", onnx.TensorProto.FLOAT, [2, 3]))
    inputs = [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 5])]
    tensors = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in initializers.items()]
    graph = onnx.helper.make_graph(nodes, "linears", inputs, outputs, tensors)
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]))
    for index in range(len(factors)):
        mark(model.graph.initializers[f"w{index}.weight_kn"], of_module(f"w{index}", "weight", "kn"))
        mark(model.graph.initializers[f"b{index}"], of_module(f"w{index}", "bias"))
    return model


def run(model: ir.Model, x: np.ndarray) -> list[np.ndarray]:
    return ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})


def test_each_linear_gets_its_own_factor():
    random = np.random.default_rng(0)
    model, x = scaled_linears([0.5, -3.0, 7.0], random), random.standard_normal((2, 5), np.float32)
    expected = run(model, x)
    assert fold_output_scales(Graphs(model, scaled_linears([2.0], random), None, 1)) == 4
    assert "Mul" not in [node.op_type for node in model.graph]
    for found, wanted in zip(run(model, x), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
