"""The few graph operations the passes share, on top of onnx_ir."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnx.reference import ReferenceEvaluator
from onnxscript import optimizer
from onnxscript.rewriter.pattern import RewriteRule

from duq.compiler.errors import GraphError
from duq.compiler.graph.weights import Weight, mark, weight_of


def simplify(model: ir.Model) -> None:
    """Folds shape arithmetic, merges equal nodes and drops what no output needs. Weights are left to the passes."""
    optimizer.fold_constants(model, should_fold=lambda node: False if any(map(weight_of, node.inputs)) else None)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _merge_equal_constants(model.graph)
    common.CommonSubexpressionEliminationPass()(model)
    common.IdentityEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)


def _merge_equal_constants(graph: ir.Graph, limit: int = 256) -> None:
    """Small constants of one content become one, so that nodes which read them are equal. Weights stay apart."""
    kept: dict[tuple, ir.Value] = {}
    for value in list(graph.initializers.values()):
        array = None if weight_of(value) else small_constant(value, limit)
        if array is None or value.is_graph_output():
            continue
        first = kept.setdefault((value.dtype, array.shape, array.tobytes()), value)
        if first is not value:
            value.replace_all_uses_with(first)
            del graph.initializers[str(value.name)]


def small_constant(value: ir.Value | None, limit: int = 4096) -> np.ndarray | None:
    """The value as numpy if it is an initializer of at most `limit` elements, else None: never loads a weight."""
    if value is None or value.const_value is None or value.const_value.size > limit:
        return None
    return value.const_value.numpy()


def is_weight(value: ir.Value | None, rank: int | None = None) -> bool:
    """Whether the value is a floating-point initializer (of the given rank)."""
    return (
        value is not None
        and value.const_value is not None
        and value.const_value.dtype.is_floating_point()
        and rank in (None, len(value.const_value.shape))
    )


def initializer(graph: ir.Graph, what: Weight | str, array: np.ndarray | ir.TensorProtocol) -> ir.Value:
    """Adds a weight by its record, or a constant by its name, or returns the one that is there under this name: a pass
    gives equal names only to equal contents."""
    name = what if isinstance(what, str) else what.name
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.tensor(array, name=name) if isinstance(array, np.ndarray) else array
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor)
    if isinstance(what, Weight):
        mark(value, what)
    graph.register_initializer(value)
    return value


def adopt(graph: ir.Graph, value: ir.Value, prefix: str) -> ir.Value:
    """Another graph's initializer in this one: a weight as itself, a constant under a name of its own."""
    return initializer(graph, weight_of(value) or f"{prefix}.{value.name}", value.const_value)


def lazy(
    graph: ir.Graph,
    what: Weight | str,
    sources: Sequence[ir.Value],
    shape: Sequence[int],
    compute: Callable[..., np.ndarray],
    dtype: ir.DataType = ir.DataType.FLOAT,
) -> ir.Value:
    """An initializer computed from others only when it is written out: the policy's weights never lie in memory
    together. `compute` gets the sources as numpy arrays, and may return a view: a weight that is transposed twice is
    never copied."""
    name = what if isinstance(what, str) else what.name
    tensors = [source.const_value for source in sources]
    tensor = ir.LazyTensor(
        lambda: ir.Tensor(compute(*(t.numpy() for t in tensors)), dtype=dtype, name=name),
        dtype=dtype,
        shape=ir.Shape(shape),
        name=name,
    )
    return initializer(graph, what, tensor)


Op = Any  # of onnxscript's patterns: what makes nodes
Var = Any  # and what stands for any value


def apply(rule: RewriteRule, *models: ir.Model) -> int:
    """Replaces the rule's pattern wherever it is; returns how often."""
    matches = sum(rule.apply_to_model(model) for model in models)
    for model in models:
        simplify(model)
    return matches


def insert_before(
    node: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], outputs: int = 1, **options
) -> list[ir.Value]:
    """A new node in front of `node`; returns its outputs. `options`: attributes, or domain= and overload=."""
    attributes = {key: value for key, value in options.items() if key not in ("domain", "overload", "name")}
    new = ir.node(
        op_type,
        list(inputs),
        attributes=attributes,
        num_outputs=outputs,
        domain=options.get("domain", ""),
        overload=options.get("overload", ""),
        name=options.get("name"),
    )
    node.graph.insert_before(node, new)
    return list(new.outputs)


def replace(old: ir.Value, new: ir.Value) -> None:
    """Makes every reader of `old` read `new`; a graph output keeps its name."""
    if old.is_graph_output():
        outputs = old.producer().graph.outputs if old.producer() else old.graph.outputs
        new.name, old.name = old.name, f"{old.name}.replaced"
        for index, output in enumerate(outputs):
            if output is old:
                outputs[index] = new
    if new.shape is None:
        new.shape, new.type = old.shape, old.type
    old.replace_all_uses_with(new)


def graph_input(graph: ir.Graph, name: str) -> ir.Value:
    """The input of this name. GraphError if there is none."""
    found = [value for value in graph.inputs if value.name == name]
    expect(len(found) == 1, f"{graph.name} has an input `{name}`")
    return found[0]


def reader(value: ir.Value) -> ir.Node | None:
    """The only node that reads the value, if there is exactly one (and it is no graph output)."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def ancestors(value: ir.Value) -> set[ir.Value]:
    """Every value that `value` is computed from, itself included."""
    seen, stack = set(), [value]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.producer() is not None:
            stack.extend(operand for operand in current.producer().inputs if operand is not None)
    return seen


def depends_on(value: ir.Value) -> set[str]:
    """The names of the graph inputs the value is computed from."""
    return {source.name for source in ancestors(value) if source.is_graph_input()}


def evaluate(model: ir.Model, values: Sequence[ir.Value], feeds: Iterable[Mapping[str, Any]]) -> list[list[Any]]:
    """Computes values inside the graph, once for each dict of graph inputs, with ONNX's own reference in numpy."""
    needed = sorted(set().union(*(depends_on(value) for value in values)))
    inputs = [value for value in model.graph.inputs if value.name in needed]
    part = ir.convenience.extract(model.graph, inputs, list(values))
    evaluator = ReferenceEvaluator(ir.to_proto(ir.Model(part, ir_version=10)))
    return [list(evaluator.run(None, {name: feed[name] for name in needed})) for feed in feeds]


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise GraphError(f"the graph is not of the form that is known: {what}; was PyTorch or compiler/model changed?")
