"""Schedules of policies that nobody has the weights of: the launches that the compiler makes for a GPU, from sizes alone.

    schedule = schedule_for(sizes(), gpu_named("rtx4090"))

The compiler decides by sizes, so weights that take no memory (one zero, repeated) give the launches of every policy of these
sizes. A schedule is as in a plan, but has no code of kernels and no places of weights. Tactics are those of a compilation
without a GPU, W4A8 the default recipe.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx_ir.passes.common as common
import torch
from rich.progress import Progress

from duq.compiler.checkpoint.shapes import expected_shapes
from duq.compiler.checkpoint.synthetic import make_config
from duq.compiler.graph.export import Graphs, export
from duq.compiler.phases import passes_of
from duq.compiler.pipeline import PHASES, TARGETS
from duq.compiler.quant import load_recipe
from duq.compiler.quant.linears import select_linears
from duq.compiler.quant.pack import LinearPack
from duq.compiler.targets import ops
from duq.compiler.targets.cuda import CudaOptions, plan_for
from duq.compiler.targets.cuda.emit import schedule_of
from duq.compiler.targets.cuda.report import Report
from duq.compiler.targets.cuda.weights import Weights
from duq.compiler.targets.fuse import fuse
from duq.plugins.gpu import Gpu
from duq.runtime.config import ModelConfig

STEPS = 10


def sizes(pi05: bool = False, depth: int | None = None, vision_depth: int | None = None) -> ModelConfig:
    """Of full-size pi0 or pi0.5, perhaps with fewer layers."""
    return make_config("full", pi05=pi05, depth=depth, vision_depth=vision_depth)


def schedule_for(config: ModelConfig, gpu: Gpu) -> dict[str, Any]:
    """The schedule of a W4A8 policy of these sizes, for up to 3 cameras."""
    graphs, fused = _graphs(config)
    options = CudaOptions(sm=(gpu.sm,), timing=False)
    with Progress(disable=True) as progress:
        planned = plan_for(gpu, False, graphs, fused, Weights(), progress, options, Report(None))
    kernels = {each.code: {"expression": each.expression} for program, _, _ in planned for each in program.kernels}
    return schedule_of(planned, kernels, "unsigned char")


@functools.lru_cache(maxsize=2)
def _graphs(config: ModelConfig) -> tuple[Graphs, dict[str, list[ops.Op]]]:
    """Both graphs after all passes, and their ops."""
    shapes = expected_shapes(config)
    zero = torch.zeros(1, dtype=torch.bfloat16)
    graphs = export(config, {name: zero.expand(shape) for name, shape in shapes.items()}, STEPS, _packs(config))
    for each in passes_of((*PHASES, *TARGETS["cuda"].phases)):
        each.run(graphs)
    for _, model in graphs.items():
        common.ShapeInferencePass()(model)
    return graphs, {name: fuse(model) for name, model in graphs.items()}


def _packs(config: ModelConfig) -> dict[str, LinearPack]:
    """Zeros in the form that the default recipe gives: a Hadamard rotation, which o_proj's input gets from the values."""
    packs, shapes = {}, expected_shapes(config)
    for name, bits in select_linears(load_recipe("llm+expert-mlp", environment={}), config).items():
        n, k = shapes[f"{name}.weight"]
        rotation = {} if name.endswith("o_proj") else {"rotation": "hadamard", "block_size": 64}
        weight = np.broadcast_to(np.zeros(1, np.uint8), (n, k * bits // 8))
        packs[name] = LinearPack(
            name=name, weight_q=weight, weight_bits=bits, weight_scale=np.zeros(n, np.float32), **rotation
        )
    return packs
