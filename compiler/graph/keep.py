"""`--keep-phases`: the graphs between passes, for people and for ONNX's own tools."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from duq.compiler.graph.export import Graphs
from duq.plugins import ops
from duq.runtime.files import writing


def keep_graphs(graphs: Graphs, directory: Path | None, index: int, name: str) -> None:
    """Saves both graphs as they are after pass `index`; they pass onnx.checker and run in ONNX Runtime."""
    if directory is None:
        return
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    for graph, model in graphs.items():
        ops.add_functions(model)
        stem = f"{index:02d}-{name}-{graph}"
        with writing(directory / f"{stem}.onnx"):
            ir.save(model, directory / f"{stem}.onnx", external_data=f"{stem}.weights", size_threshold_bytes=1 << 20)
