"""The `cpu` target: both graphs for ONNX Runtime, every weight an entry of the plan.

The graphs refer to their weights by offset into the plan file itself, so that ONNX Runtime maps them from there: a
13 GB policy opens without reading 13 GB, and what prefix and step share is stored once.

A graph with 8-bit weights has two entries, which read the same weights: how the products are exact depends on the CPU
(runtime/executors/integers.py).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx_ir as ir
from rich.progress import Progress

from duq.compiler.graph.export import Graphs
from duq.compiler.targets import Options, Target
from duq.plugins import ops
from duq.runtime.executors.cpu import INT8_WEIGHTS, PLAN_FILE, graph_entry
from duq.runtime.plan import PlanWriter

INLINE_BYTES = 1024  # smaller initializers (shapes, scalars) stay inside the graph


def emit(graphs: Graphs, writer: PlanWriter, progress: Progress, options: Options, keep: Path | None) -> dict:
    """Writes weights and graphs into the plan; returns the manifest's section about the graphs."""
    stored: dict[str, ir.ExternalTensor] = {}
    task = progress.add_task("Writing the plan", total=sum(_weight_bytes(model) for _, model in graphs.items()))
    for _, model in graphs.items():
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor.nbytes >= INLINE_BYTES:
                if value.name not in stored:
                    stored[value.name] = _store(writer, value.name, tensor)
                value.const_value = stored[value.name]
                progress.advance(task, tensor.nbytes)
    section = {}
    for name, model in graphs.items():
        section[name] = _describe(model)
        has_int8 = any(node.op_type == INT8_WEIGHTS for node in model.graph)
        for unsigned_weights in (False, True) if has_int8 else (False,):
            ops.add_functions(model, unsigned=True, unsigned_weights=unsigned_weights)
            writer.write(graph_entry(name, unsigned_weights), ir.to_proto(model).SerializeToString())
    return section


def _weight_bytes(model: ir.Model) -> int:
    sizes = (value.const_value.nbytes for value in model.graph.initializers.values())
    return sum(size for size in sizes if size >= INLINE_BYTES)


def _store(writer: PlanWriter, name: str, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
    packed = tensor.dtype == ir.DataType.INT4 or tensor.dtype == ir.DataType.BFLOAT16
    offset = writer.write(f"weights/{name}", tensor.tobytes() if packed else tensor.numpy())
    shape = ir.Shape(tensor.shape.numpy())
    return ir.ExternalTensor(PLAN_FILE, offset, tensor.nbytes, tensor.dtype, shape=shape, name=name, base_dir="")


def _describe(model: ir.Model) -> dict:
    def signature(values) -> dict:
        return {v.name: {"dtype": v.dtype.name.lower() if v.dtype else "float", "shape": _shape(v)} for v in values}

    return {
        "inputs": signature(model.graph.inputs),
        "outputs": signature(model.graph.outputs),
        "ops": dict(Counter(f"{node.domain}::{node.op_type}".removeprefix("::") for node in model.graph).most_common()),
        "weight_bytes": _weight_bytes(model),
    }


def _shape(value: ir.Value) -> list | None:
    return None if value.shape is None else [dim if isinstance(dim, int) else str(dim) for dim in value.shape]


TARGET = Target("cpu", Options, emit)
