"""Integers of a graph, positions for example, at one size of the observation: computed now, by ONNX's own reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from duq.compiler.targets.patterns import INTEGERS


class Integers:
    """shapes: of the graph's inputs, by name; sizes: what its symbolic dimensions are."""

    def __init__(self, model: ir.Model, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int]):
        self._model, self._shapes, self._sizes = model, shapes, dict(sizes)
        self._known: dict[ir.Value, np.ndarray] = {}

    def __getitem__(self, value: ir.Value) -> np.ndarray:
        """The value. One that is no integer stands for its shape: nothing else is asked of it."""
        if value.const_value is not None:
            return value.const_value.numpy()
        if value not in self._known:
            node = value.producer()
            if node is None or value.dtype not in INTEGERS:
                return np.broadcast_to(np.float32(0), self._shape(value))
            operands = {str(each.name): self[each] for each in node.inputs if each is not None}
            results: Any = ReferenceEvaluator(ir.to_proto(node)).run(None, operands)
            self._known |= dict(zip(node.outputs, results, strict=True))
        return self._known[value]

    def _shape(self, value: ir.Value) -> tuple[int, ...]:
        if value.name is not None and value.name in self._shapes:
            return self._shapes[value.name]
        dimensions = (each if isinstance(each, int) else each.evaluate(self._sizes) for each in value.shape or ())
        return tuple(int(str(size)) for size in dimensions)
