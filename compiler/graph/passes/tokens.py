"""Rewrites of what is computed for which token: compaction, the hoisted state token, the dead tail."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from duq.compiler.graph.edit import (
    adopt,
    depends_on,
    evaluate,
    expect,
    graph_input,
    initializer,
    insert_before,
    replace,
    simplify,
    small_constant,
)
from duq.compiler.graph.export import Graphs, key_value_names


def compact_tokens(graphs: Graphs) -> int:
    """Absent cameras and prompt padding are left out of the inputs instead of being computed and masked.

    Positions count valid tokens, so leaving out the others changes nothing for the rest. The mask inputs become
    constants, all true. Matches the inputs.
    """
    masks = [(graphs.prefix.graph, "image_mask", "images", 0), (graphs.prefix.graph, "token_mask", "tokens", 0),
             (graphs.step.graph, "prefix_mask", "key.0", 2)]  # fmt: skip
    for graph, mask, masked, axis in masks:
        first = next(iter(graph))
        (length,) = insert_before(first, "Shape", [graph_input(graph, masked)], start=axis, end=axis + 1)
        (all_true,) = insert_before(first, "Expand", [initializer(graph, "true", np.array(True)), length])
        replace(graph_input(graph, mask), all_true)
        _forget_inputs(graph, mask)
    return len(masks)


def count_instead_of_summing(graphs: Graphs) -> int:
    """Over a mask that is all true, CumSum(mask) - 1 is 0, 1, 2, ... and ReduceSum(mask) is the mask's length."""
    matches = 0
    for _, model in graphs.items():
        for node in list(model.graph):
            if node.op_type in ("CumSum", "ReduceSum") and node.inputs[0].dtype == ir.DataType.INT64:
                _count(model.graph, node)
                matches += 1
        simplify(model)
    return matches


def drop_true_masks(graphs: Graphs) -> int:
    """Removes the mask of every Attention for which it is true whatever the number of tokens (checked at two)."""
    matches = 0
    for _, model in graphs.items():
        masked = [node for node in model.graph if node.op_type == "Attention" and len(node.inputs) > 3]
        values = {mask: _mask_values(model, mask, graphs) for mask in {node.inputs[3] for node in masked}}
        for node in masked:
            if all(np.all(value) for value in values[node.inputs[3]]):
                node.resize_inputs(3)
                matches += 1
        simplify(model)
    return matches


def hoist_state_token(graphs: Graphs) -> int:
    """pi0's state token depends on neither time nor noise, and sees only the prefix and itself: its keys and values
    are the same in every denoising step. They move to the end of the prefix's, and the loop is left with H rows.
    """
    if graphs.config.pi05:
        return 0
    step, names = graphs.step, key_value_names(graphs.config.llm.depth)
    _check_state_sees_prefix_and_itself(graphs)
    state_only = step.clone()
    _keep_suffix_rows(state_only.graph, state=True)
    _keep_suffix_rows(step.graph, state=False)

    # The state token's pass ends at its keys and values, appended to the prefix's.
    attentions = [node for node in state_only.graph if node.op_type == "Attention"]
    state_only.graph.outputs.clear()
    state_only.graph.outputs.extend(value for node in attentions for value in node.inputs[1:3])
    simplify(state_only)
    _forget_inputs(state_only.graph, "x", "time")
    _append(graphs.prefix.graph, state_only.graph, names)

    (slice_node,) = [
        n for n in step.graph if n.op_type == "Slice" and small_constant(n.inputs[1]) == -graphs.config.action_horizon
    ]
    replace(slice_node.outputs[0], slice_node.inputs[0])  # the last H of H rows
    for _, model in graphs.items():
        simplify(model)
        common.ShapeInferencePass()(model)  # row counts have changed
    _forget_inputs(step.graph, "state")
    return 1


def eliminate_dead_prefix_tail(graphs: Graphs) -> int:
    """Only keys and values leave the prefix, so its last layer needs no queries, attention, MLP or final norm.

    Matches the attentions that nothing is left of.
    """
    outputs = graphs.prefix.graph.outputs
    attentions = _attentions(graphs.prefix.graph)
    hidden = [output for output in outputs if output.name == "hidden"]
    expect(len(hidden) == 1, "the prefix has an output `hidden`")
    outputs.remove(hidden[0])
    simplify(graphs.prefix)
    return attentions - _attentions(graphs.prefix.graph)


def _attentions(graph: ir.Graph) -> int:
    return sum(node.op_type == "Attention" for node in graph)


def _forget_inputs(graph: ir.Graph, *names: str) -> None:
    for value in list(graph.inputs):
        if value.name in names:
            expect(not value.uses(), f"input {value.name} is still read")
            graph.inputs.remove(value)


def _count(graph: ir.Graph, node: ir.Node) -> None:
    (length,) = insert_before(node, "Shape", [node.inputs[0]], start=1, end=2)
    if node.op_type == "ReduceSum":  # [1, P] -> [1, 1]
        (count,) = insert_before(node, "Unsqueeze", [length, initializer(graph, "axis0", np.array([0]))])
    else:  # [1, P] -> [1, P]
        zero, one = initializer(graph, "zero", np.array(0)), initializer(graph, "one", np.array(1))
        (scalar,) = insert_before(node, "Squeeze", [length])
        (index,) = insert_before(node, "Range", [zero, scalar, one])
        (row,) = insert_before(node, "Unsqueeze", [index, initializer(graph, "axis0", np.array([0]))])
        (count,) = insert_before(node, "Add", [row, one])
    replace(node.outputs[0], count)


def _mask_values(model: ir.Model, mask: ir.Value, graphs: Graphs) -> list[np.ndarray]:
    config = graphs.config
    sizes = [(1, 3), (2, 5)]  # cameras, prompt tokens
    feeds = [
        {
            "images": np.zeros((cameras, 3, config.vision.image_size, config.vision.image_size), np.float32),
            "tokens": np.zeros(prompt, np.int64),
            "key.0": np.zeros((1, config.llm.kv_heads, cameras + prompt, config.llm.head_dim), np.float32),
        }
        for cameras, prompt in sizes
    ]
    expect(depends_on(mask) <= feeds[0].keys(), "an attention mask depends on more than the number of tokens")
    return [values[0] for values in evaluate(model, [mask], feeds)]


def _check_state_sees_prefix_and_itself(graphs: Graphs) -> None:
    horizon = graphs.config.action_horizon
    masks = {node.inputs[3] for node in graphs.step.graph if node.op_type == "Attention" and len(node.inputs) > 3}
    expect(len(masks) == 1, "the suffix has one attention mask")
    for value in _mask_values(graphs.step, masks.pop(), graphs):
        prefix = value.shape[-1] - 1 - horizon
        expect(value[0, 0, 0].tolist() == [True] * (prefix + 1) + [False] * horizon, "the state row sees prefix and itself")
        expect(bool(value[0, 0, 1:].all()), "the action rows see everything")


def _keep_suffix_rows(graph: ir.Graph, state: bool) -> None:
    """Reduces a step graph to its state row (row 0) or its action rows (1..H): all else in it works row by row."""
    (join,) = [
        node
        for node in graph
        if node.op_type == "Concat" and any(depends_on(operand) == {"state"} for operand in node.inputs)
    ]
    state_token, action_tokens = join.inputs
    rows = action_tokens.shape.numpy()[1] + 1
    replace(join.outputs[0], state_token if state else action_tokens)
    for value in list(graph.initializers.values()):  # a row's position is the number of past tokens + 0, 1, ..., H
        offsets = small_constant(value)
        if offsets is not None and offsets.shape == (rows,) and offsets.tolist() == list(range(rows)):
            # Both start at 0 again: to the actions, the state token is now one of the past.
            kept = offsets[: 1 if state else rows - 1]
            value.replace_all_uses_with(initializer(graph, f"row_offsets_{len(kept)}", kept))
    for node in graph:
        if node.op_type == "Attention":
            node.resize_inputs(3)  # checked above: what is left sees everything
        for output in node.outputs:
            if not output.is_graph_output():
                output.shape = None


def _append(graph: ir.Graph, tail: ir.Graph, names: list[str]) -> None:
    """Moves the nodes of `tail` behind those of `graph`; `names` are outputs of `graph`, inputs and outputs of `tail`."""
    before = {output.name: output for output in graph.outputs}
    after = list(tail.outputs)
    for value in list(tail.inputs):
        if value.name in before:
            value.replace_all_uses_with(before[value.name])
        else:
            tail.inputs.remove(value)
            graph.inputs.append(value)
    for value in list(tail.initializers.values()):
        value.replace_all_uses_with(adopt(graph, value, "state"))
    nodes = list(tail)
    tail.outputs.clear()
    tail.remove(nodes)
    for node in nodes:
        node.name = f"state.{node.name}"
        for output in node.outputs:
            output.name = f"state.{output.name}"
    graph.extend(nodes)
    for index, output in enumerate(graph.outputs):
        if output.name in names:
            new = after[names.index(output.name)]
            output.name, new.name = f"prefix_only.{output.name}", output.name
            new.shape = ir.Shape([*output.shape[:2], "past", output.shape[3]])  # the prefix and the state token
            graph.outputs[index] = new
