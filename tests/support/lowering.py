"""The launches of a `cuda` plan for any GPU, with no weights computed and no code compiled; and that they keep its limits."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir.passes.common as common
import torch

from duq.compiler.checkpoint.shapes import expected_shapes
from duq.compiler.graph.export import Graphs, export
from duq.compiler.phases import passes_of
from duq.compiler.pipeline import PHASES, TARGETS
from duq.compiler.quant import load_recipe
from duq.compiler.quant.linears import select_linears
from duq.compiler.quant.pack import LinearPack
from duq.compiler.targets.cuda.bind import bind
from duq.compiler.targets.cuda.choose import choose
from duq.compiler.targets.cuda.gemm import from_table
from duq.compiler.targets.cuda.launches import Launch, Program, Streams
from duq.compiler.targets.cuda.plan import plan_streams
from duq.compiler.targets.cuda.specialize import Size, specialize
from duq.compiler.targets.cuda.weights import Weights
from duq.compiler.targets.fuse import fuse
from duq.plugins.gpu import Gpu
from duq.runtime.config import ModelConfig

BLOCK = 64  # of the Hadamard rotations of made packs


def rewritten(config: ModelConfig, quant: str, num_steps: int = 2) -> Graphs:
    """The graphs of a policy of zeros as the `cuda` target gets them; `quant` is a preset, whose linears are packs of zeros."""
    weights = {name: torch.zeros(1).expand(shape) for name, shape in expected_shapes(config).items()}
    bits = select_linears(load_recipe(quant, environment={}), config)
    packs = {name: _pack(name, weights[f"{name}.weight"].shape, each) for name, each in bits.items()}
    graphs = export(config, weights, num_steps, packs)
    for each in passes_of((*PHASES, *TARGETS["cuda"].phases)):
        each.run(graphs)
    for _, model in graphs.items():
        common.ShapeInferencePass()(model)
    return graphs


def _pack(name: str, shape: tuple[int, ...], bits: int) -> LinearPack:
    rows, columns = shape
    integers = np.zeros((rows, columns // 2), np.uint8) if bits == 4 else np.zeros((rows, columns), np.int8)
    block = next(each for each in (BLOCK, 16, 0) if each == 0 or columns % each == 0)
    return LinearPack(
        name=name, weight_q=integers, weight_bits=bits, weight_scale=np.ones(rows, np.float32),
        rotation="hadamard" if block else None, block_size=block,
    )  # fmt: skip


def lowered(graphs: Graphs, gpu: Gpu, cameras: int, prompt: int) -> tuple[Program, Streams]:
    """The launches of one size for a GPU."""
    size, bound = Size(cameras, prompt), {}
    for name, model in graphs.items():
        sized = specialize(fuse(model), model, size, graphs.config)
        bound[name] = model, sized, choose(sized, gpu, from_table(gpu))
    program = bind(bound, graphs.config, size, gpu, Weights(), "unsigned char")
    return program, plan_streams(program, gpu)


def check_limits(launches: Iterable[Launch], streams: Streams, gpu: Gpu) -> None:
    """A GPU runs the launches: thread blocks of a size that it has, and no feature that its row does not have."""
    for launch in launches:
        if launch.instance.kernel.is_library:
            continue
        shape, name = launch.instance.shape, f"{launch.name} on SM {gpu.sm}: {launch.instance.expression}"
        assert shape.shared_bytes <= gpu.block_shared_bytes, name
        assert shape.threads <= 1024 and shape.threads % 32 == 0, name
        assert all(0 < x <= most for x, most in zip(shape.grid, (2**31 - 1, 65535, 65535), strict=True)), name
        assert gpu.has_clusters or shape.cluster == (1, 1, 1), name
        assert gpu.has_wgmma or "wgmma" not in launch.instance.source, name
        blocks = shape.grid[0] * shape.grid[1] * shape.grid[2]
        assert not shape.a_multiprocessor or blocks <= shape.a_multiprocessor * gpu.multiprocessors, name
    assert gpu.has_pdl or not streams.overlaps
