"""The solver's part of a denoising step, where it is not Euler's."""

from __future__ import annotations

import onnx_ir as ir

from duq.compiler.graph.edit import expect, graph_input, initializer, insert_before, replace, simplify
from duq.compiler.graph.export import Graphs
from duq.compiler.graph.weights import of_module
from duq.plugins import ops
from duq.runtime.solver import Solver


def extend_step_by_history(graphs: Graphs) -> int:
    """x_next = x + change becomes Multistep (plugins/ops.py), which combines the change with those of earlier steps.

    The step gets the input `history` and the output `history_next`, which the next step takes for its own.
    """
    solver, graph, config = Solver(graphs.solver, graphs.num_steps), graphs.step.graph, graphs.config
    if not solver.history:
        return 0
    x, step = graph_input(graph, "x"), graph_input(graph, "step")
    (x_next,) = graph.outputs
    add = x_next.producer()
    expect(add is not None and add.op_type == "Add" and x in add.inputs, "a step ends in the sum of x and its change")
    assert add is not None
    (change,) = (value for value in add.inputs if value is not x)
    shape = ir.Shape((solver.history, config.action_horizon, config.action_dim))
    history = ir.Value(name="history", type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
    graph.inputs.append(history)
    table = initializer(graph, of_module("solver", "time_table"), solver.coefficients())
    new, history_next = insert_before(add, "Multistep", [x, change, history, table, step], 2, domain=ops.DOMAIN)
    replace(x_next, new)
    history_next.name, history_next.shape, history_next.type = "history_next", shape, history.type
    graph.outputs.append(history_next)
    graphs.step.opset_imports[ops.DOMAIN] = ops.VERSION
    simplify(graphs.step)
    return 1
