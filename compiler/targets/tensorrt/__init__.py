"""The `tensorrt` target: engines whose quantized linears are our plugins, running kernels that BitBLAS generated.

    prepare     the ONNX graphs: the token table becomes an input; ops are found (compiler/targets/fuse.py)
    network     the graphs in onnx-graphsurgeon, without their weights; `unroll`
    plugins     quantizers and integer linears become plugin nodes
    precision   one float type throughout
    builder     network -> engine
    engines     all of it, into the plan

For each SM the plan holds, under engine/sm<SM>: the engine `policy` (--loop unrolled: prefix and all denoising steps in one
network) or `prefix` and `step` (--loop graph: the executor repeats the step), TensorRT's log, kernels.json, which says what
each quantized linear runs and where the kernels are that the plugins ask for by name; and under cubin/sm<SM> these
kernels. Beside them lies the token table, `embedding`, in the engines' float type. An engine is
for one SM, one flavor and version of TensorRT; the manifest says which. Nothing of TensorRT is needed to read what a plan
holds.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from rich.progress import Progress

from duq.compiler.graph.export import Graphs
from duq.compiler.targets import Target
from duq.compiler.targets.gpu import GPU_PHASES
from duq.compiler.targets.tensorrt.options import FLOAT_TYPES, LOOPS, TensorRTOptions
from duq.plugins import bitblas, trt
from duq.plugins.errors import DuqError, KernelError
from duq.runtime.plan import PlanWriter

ARCHITECTURES = bitblas.SMS


def check(options: TensorRTOptions) -> None:
    """Raises DuqError where an option is unknown or an extra is missing: before any work."""
    if options.loop not in LOOPS:
        raise DuqError(f"--loop {options.loop}: unknown, one of {', '.join(LOOPS)}")
    if options.float_type not in FLOAT_TYPES:
        raise DuqError(f"--float-type {options.float_type}: unknown, one of {', '.join(FLOAT_TYPES)}")
    trt.library()
    bitblas.check_installed()
    if importlib.util.find_spec("onnx_graphsurgeon") is None:
        raise KernelError(
            "--target tensorrt needs onnx-graphsurgeon: pip install 'duq-vla[tensorrt]' or 'duq-vla[tensorrt-rtx]'"
        )


def emit(
    graphs: Graphs, writer: PlanWriter, progress: Progress, options: TensorRTOptions, keep: Path | None
) -> dict[str, Any]:
    """Builds the engines for every SM and writes them into the plan; returns the manifest's section.

    Raises KernelError without TensorRT or BitBLAS, GraphError where the network cannot be built.
    """
    from duq.compiler.targets.tensorrt.engines import write_engines  # imports what only the extras install

    return write_engines(graphs, writer, progress, options, keep)


TARGET = Target("tensorrt", TensorRTOptions, emit, GPU_PHASES, ARCHITECTURES, check)
