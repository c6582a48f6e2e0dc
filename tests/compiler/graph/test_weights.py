"""Records of what initializers hold: they survive copies and simplification, and a weight without one is an error."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from duq.compiler.errors import GraphError
from duq.compiler.graph.edit import adopt, initializer, lazy, simplify
from duq.compiler.graph.export import Graphs
from duq.compiler.graph.weights import by_content, check_records, mark, merged, of_module, record, weight_of
from duq.compiler.phases import Pass


def small_graph() -> ir.Model:
    """y = x + a + b + c + c' with two equal weights and two equal constants."""
    graph = ir.Graph([ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([4]))], [], nodes=[],
                     opset_imports={"": 23}, name="small")  # fmt: skip
    ones, twos = np.ones(4, np.float32), np.full(4, 2, np.float32)
    addends = [
        initializer(graph, of_module("a", "bias"), ones),
        initializer(graph, of_module("b", "bias"), ones),
        initializer(graph, "c", twos),
        initializer(graph, "d", twos),
    ]
    value = graph.inputs[0]
    for addend in addends:
        node = ir.node("Add", [value, addend])
        graph.append(node)
        value = node.outputs[0]
    value.name, value.type, value.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape([4])
    graph.outputs.append(value)
    return ir.Model(graph, ir_version=10)


def test_records_survive_copies_and_simplification():
    model = small_graph().clone()
    simplify(model)
    assert set(model.graph.initializers) == {"a.bias", "b.bias", "c"}  # equal weights stay apart, equal constants do not
    assert record(model.graph.initializers["a.bias"]) == of_module("a", "bias")
    assert weight_of(model.graph.initializers["c"]) is None


def test_another_graph_takes_weights_as_they_are_and_constants_under_their_own_name():
    source, graph = small_graph().graph, ir.Graph([], [], nodes=[], opset_imports={"": 23}, name="other")
    names = [adopt(graph, value, "step").name for value in source.initializers.values()]
    assert names == ["a.bias", "b.bias", "step.c", "step.d"]
    assert weight_of(graph.initializers["a.bias"]) == of_module("a", "bias")


def test_a_weight_that_lost_its_record_is_an_error_of_the_pass():
    model = small_graph()
    weight = lazy(model.graph, of_module("w", "weight"), [], (2, 2), lambda: np.zeros((2, 2), np.float32))
    check_records(model)

    def lose(graphs: Graphs) -> int:
        weight.meta.clear()
        return 1

    with pytest.raises(GraphError, match="pass lose .*: w.weight has no record"):
        Pass(lose, "for this test", lambda graphs: 1).run(Graphs(model, small_graph(), None, 1))
    large = small_graph()
    initializer(large.graph, "mask", np.zeros((71, 71), bool))
    check_records(large)
    initializer(large.graph, "table", np.zeros(5000, np.float32))
    with pytest.raises(GraphError, match="table has no record"):
        check_records(large)
    with pytest.raises(GraphError, match="c has no record"):
        record(large.graph.initializers["c"])


def test_names_are_made_from_records():
    gate, up = (of_module(f"llm.layers.0.mlp.{leaf}", "weight", "kn") for leaf in ("gate_proj", "up_proj"))
    gain = of_module("llm.layers.0.post_attention_layernorm", "gain")
    both = merged([each.times(gain.name) for each in (gate, up)])
    assert both.name == "+".join(
        f"llm.layers.0.post_attention_layernorm.gain*llm.layers.0.mlp.{leaf}.weight_kn" for leaf in ("gate_proj", "up_proj")
    )
    assert both.label == "llm.layers.0.mlp.gate_proj+up_proj"
    assert both.title == "llm.layers.0.post_attention_layernorm.gain*llm.layers.0.mlp.gate_proj+up_proj"
    assert both.linears == ("llm.layers.0.mlp.gate_proj", "llm.layers.0.mlp.up_proj")
    chain = of_module("second", "weight", "kn").of_rows("actions").behind(of_module("first", "weight", "kn"))
    assert chain.name == "first*second.actions.weight_kn" and chain.linears == ("first", "second")
    with pytest.raises(GraphError, match="cannot be merged"):
        merged([gate, gain])


def test_equal_arrays_have_one_name():
    array = np.arange(6.0)
    assert by_content("rotation", array) == by_content("rotation", array.copy())
    assert by_content("rotation", array).name != by_content("rotation", array + 1).name
    value = ir.Value(name="v")
    mark(value, by_content("permutation", array))
    assert record(value).part == "permutation"
