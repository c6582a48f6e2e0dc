"""Time is a constant: the timesteps are known when compiling, so what depends on time alone becomes tables."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter.pattern import RewriteRule

from duq.compiler.graph.edit import (
    Op,
    Var,
    apply,
    depends_on,
    evaluate,
    graph_input,
    initializer,
    insert_before,
    is_weight,
    lazy,
    replace,
    simplify,
)
from duq.compiler.graph.export import Graphs
from duq.compiler.graph.weights import of_module, record
from duq.compiler.model.pi0 import timesteps


def split_time_from_actions(graphs: Graphs) -> int:
    """W [a; t] + b = W_a a + (W_t t + b): pi0's action_time_mlp_in is separated into its action and its time half.

    The time half is the same for every row, so it loses the Expand over rows and broadcasts in the sum.
    """
    return apply(RewriteRule(_joined, _apart, _is_time), graphs.step)


def _joined(op: Op, actions: Var, time: Var, rows: Var, weight: Var, bias: Var) -> Var:
    return op.MatMul(op.Concat(actions, op.Expand(time, rows)), weight) + bias


def _apart(op: Op, actions: ir.Value, time: ir.Value, weight: ir.Value, bias: ir.Value, **_: ir.Value) -> ir.Value:
    rows, columns = weight.shape.numpy()
    split = rows // 2  # both halves have the expert's width
    of_actions = _rows(weight, "actions", 0, split, columns)
    of_time = _rows(weight, "time", split, rows, columns)
    return op.Add(op.MatMul(actions, of_actions), op.Add(op.MatMul(time, of_time), bias))


def _is_time(context: object, time: ir.Value, weight: ir.Value, **_: ir.Value) -> bool:
    return is_weight(weight, rank=2) and depends_on(time) == {"time"}


def _rows(weight: ir.Value, part: str, start: int, stop: int, columns: int) -> ir.Value:
    return lazy(weight.graph, record(weight).of_rows(part), [weight], (stop - start, columns), lambda w: w[start:stop])


def tabulate_time(graphs: Graphs) -> int:
    """Replaces every value that depends on time alone, and is read by something that does not, by table[step].

    pi0: ten bias vectors. pi0.5: 1 + scale, shift and gate of every adaptive norm. The input `time` becomes `step`,
    the index of the denoising step. Matches the values that become tables.
    """
    graph = graphs.step.graph
    time = graph_input(graph, "time")
    reach = {node: set().union(*(depends_on(operand) for operand in node.inputs if operand)) for node in graph}
    frontier = {
        operand: None  # a dict keeps the order
        for node in graph
        for operand in node.inputs
        if operand is not None and reach[node] != {"time"} and reach.get(operand.producer()) == {"time"}
    }
    feeds = [{"time": np.array(t, np.float32)} for t in timesteps(graphs.num_steps)]
    columns = zip(*evaluate(graphs.step, list(frontier), feeds), strict=True)

    step = ir.Value(name="step", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
    graph.inputs.append(step)
    first = next(iter(graph))
    for value, column in zip(frontier, columns, strict=True):
        table = initializer(graph, of_module(value.name, "time_table"), np.stack(column))
        (row,) = insert_before(first, "Gather", [table, step], axis=0)
        replace(value, row)
    simplify(graphs.step)
    graph.inputs.remove(time)
    return len(frontier)
