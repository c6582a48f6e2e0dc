"""The `tensorrt` target: engines whose quantized linears are our plugins, running kernels that BitBLAS generated.

For each SM the plan holds, under engine/sm<SM>: the engine `policy` (--loop unrolled: prefix and all denoising steps in one
network) or `prefix` and `step` (--loop graph: the executor repeats the step), TensorRT's log, kernels.json, which says what
each quantized linear runs and where the kernels are that the plugins ask for by name; and under cubin/sm<SM> these
kernels. Beside them lies the token table, `embedding`, in the engines' float type. An engine is
for one SM, one flavor and version of TensorRT; the manifest says which. Nothing of TensorRT is needed to read what a plan
holds.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir
from rich.progress import Progress

from duq.compiler.graph.export import Graphs
from duq.compiler.targets import GpuOptions, Target
from duq.compiler.targets.gpu import GPU_PHASES
from duq.compiler.targets.tensorrt.builder import Engine, Profile, build
from duq.compiler.targets.tensorrt.network import FLOAT_TYPES, Plugin, adapt, take_embeddings, unroll
from duq.plugins import bitblas, trt
from duq.plugins.errors import DuqError
from duq.plugins.nodes import KernelName
from duq.plugins.nvrtc import Cubin, compile_cubin
from duq.runtime.config import ModelConfig
from duq.runtime.executors.tensorrt import PLUGINS_VERSION
from duq.runtime.plan import PlanWriter

ARCHITECTURES = bitblas.SMS
LOOPS = ("unrolled", "graph")


@dataclass(frozen=True, kw_only=True)
class TensorRTOptions(GpuOptions):
    """What the engines look like.

    Attributes:
        loop: "unrolled" into one network, or "graph": the executor repeats the step's engine.
        float_type: of what is not quantized, "bf16" or "fp16".
    """

    target: ClassVar[str] = "tensorrt"
    loop: str = "graph"
    float_type: str = "bf16"


def check(options: TensorRTOptions) -> None:
    """Raises DuqError where an option is unknown or an extra is missing: before any work."""
    if options.loop not in LOOPS:
        raise DuqError(f"--loop {options.loop}: unknown, one of {', '.join(LOOPS)}")
    if options.float_type not in FLOAT_TYPES:
        raise DuqError(f"--float-type {options.float_type}: unknown, one of {', '.join(FLOAT_TYPES)}")
    trt.library()
    bitblas.check_installed()


def emit(graphs: Graphs, writer: PlanWriter, progress: Progress, options: TensorRTOptions, keep: Path | None) -> dict:
    """Builds the engines for every SM and writes them into the plan; returns the manifest's section.

    Raises KernelError without TensorRT or BitBLAS, GraphError where the network cannot be built.
    """
    trt.register()
    sections = {}
    table = take_embeddings(graphs.prefix).const_value
    writer.write("embedding", table.numpy().astype(FLOAT_TYPES[options.float_type][1]))
    for sm in options.sm:
        copies = replace(graphs, prefix=graphs.prefix.clone(), step=graphs.step.clone())
        sections |= _emit(copies, sm, writer, progress, options)
    return sections


def _emit(graphs: Graphs, sm: int, writer: PlanWriter, progress: Progress, options: TensorRTOptions) -> dict:
    config = graphs.config
    tokens = options.cameras * config.vision.tokens + config.max_prompt_tokens
    plugins = adapt(graphs, options.float_type, sm, tokens)
    kernels = _write_kernels(_kernels(plugins), sm, writer, progress)
    linears = {
        f"{graph}/{name}": plugin.kernels[0].expression  # pi0's state token runs linears of the step in the prefix as well
        for graph, found in plugins.items()
        for name, plugin in found.items()
        if plugin.problem
    }
    writer.write(f"engine/sm{sm}/kernels.json", json.dumps({"kernels": kernels, "linears": linears}, indent=1).encode())
    counts = {name: len(found) for name, found in plugins.items()}
    models = dict(graphs.items())
    if options.loop == "unrolled":
        models = {"policy": unroll(graphs)}
        counts = {"policy": counts["prefix"] + graphs.num_steps * counts["step"]}
    sizes, engines = profile(config, options.cameras), {}
    for name, model in models.items():
        engine = build(name, model, counts[name], sizes, sm, progress, writer.path.parent)
        writer.write(f"engine/sm{sm}/{name}", engine.data)
        writer.write(f"engine/sm{sm}/{name}.log", "\n".join(engine.log).encode())
        engines[f"sm{sm}/{name}"] = _describe(model, engine)
    return {
        f"sm{sm}": {
            "flavor": trt.flavor(),
            "version": trt.library().__version__,
            "plugins_version": PLUGINS_VERSION,
            "loop": options.loop,
            "float_type": options.float_type,
            "engines": list(models),
            "linears": {re.sub(r"\.\d+\.", ".*.", name): kernel for name, kernel in linears.items()},  # equal in all layers
        },
        **engines,
    }


def profile(config: ModelConfig, cameras: int) -> Profile:
    """The sizes of observations the engines are for: up to `cameras` cameras, any prompt. What is absent is not computed."""
    image, prompt, llm = config.vision.image_size, config.max_prompt_tokens, config.llm
    state = 0 if config.pi05 else 1  # pi0's state token is cached behind the prefix

    def cache(cameras: int, prompt: int) -> tuple[int, ...]:
        return 1, llm.kv_heads, cameras * config.vision.tokens + prompt + state, llm.head_dim

    caches = cache(1, 1), cache(cameras, prompt // 2), cache(cameras, prompt)
    return {
        "images": ((1, 3, image, image), (cameras, 3, image, image), (cameras, 3, image, image)),
        "embeddings": ((1, llm.width), (prompt // 2, llm.width), (prompt, llm.width)),
        **{f"{kind}.{layer}": caches for kind in ("key", "value") for layer in range(llm.depth)},
    }


def _kernels(plugins: dict[str, dict[str, Plugin]]) -> dict[KernelName, bitblas.Problem | None]:
    found = {}
    for plugin in (plugin for each in plugins.values() for plugin in each.values()):
        for name in plugin.kernels:
            found[name] = plugin.problem if name.source == "bitblas" else None
    return found


def _write_kernels(
    kernels: dict[KernelName, bitblas.Problem | None], sm: int, writer: PlanWriter, progress: Progress
) -> list[dict]:
    task = progress.add_task(f"Generating and compiling the kernels for SM {sm}", total=len(kernels))
    problems = [problem for problem in kernels.values() if problem]
    sources = dict(zip(problems, bitblas.sources(problems, sm)))
    written = []
    for number, (name, problem) in enumerate(kernels.items()):
        cubin = (
            bitblas.compile_kernel(sources[problem], sm) if problem else compile_cubin(name.source, sm, [name.expression])
        )
        written.append(_write_kernel(name, cubin, f"cubin/sm{sm}/{number}.{name.source.removesuffix('.cu')}", writer))
        progress.advance(task)
    return written


def _write_kernel(name: KernelName, cubin: Cubin, entry: str, writer: PlanWriter) -> dict:
    writer.write(entry, cubin.image)
    (symbol,) = cubin.symbols.values()
    return {**name._asdict(), "cubin": entry, "symbol": symbol}


def _describe(model: ir.Model, engine: Engine) -> dict:
    return {
        "inputs": _signature(model.graph.inputs),
        "outputs": _signature(model.graph.outputs),
        "ops": dict(Counter(f"{node.domain}::{node.op_type}".removeprefix("::") for node in model.graph).most_common()),
        "layers": engine.layers,
        "plugins": engine.plugins,
        "bytes": engine.data.nbytes,
    }


def _signature(values: Iterable[ir.Value]) -> dict:
    return {
        value.name: {
            "dtype": value.dtype.name.lower(),
            "shape": [size if isinstance(size, int) else str(size) for size in value.shape or ()],
        }
        for value in values
    }


TARGET = Target("tensorrt", TensorRTOptions, emit, GPU_PHASES, ARCHITECTURES, check)
