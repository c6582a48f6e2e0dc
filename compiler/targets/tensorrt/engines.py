"""Graphs -> networks -> engines in the plan. Needs onnx-graphsurgeon, TensorRT and BitBLAS."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import onnx_ir as ir
from rich.progress import Progress

from duq.compiler.graph.export import Graphs
from duq.compiler.targets.ops import Op, describe
from duq.compiler.targets.tensorrt.builder import Engine, Profile, build
from duq.compiler.targets.tensorrt.network import Network, expand, unroll
from duq.compiler.targets.tensorrt.options import FLOAT_TYPES, FloatType, TensorRTOptions
from duq.compiler.targets.tensorrt.plugins import Plugin, add_plugins
from duq.compiler.targets.tensorrt.precision import to_float_type
from duq.compiler.targets.tensorrt.prepare import EXPANDED, prepare, take_embeddings
from duq.compiler.targets.values import dtype_of, name_of, tensor_of
from duq.plugins import bitblas, trt
from duq.plugins.nodes import KernelName
from duq.plugins.nvrtc import Cubin, compile_cubin
from duq.runtime.config import ModelConfig
from duq.runtime.executors.tensorrt import PLUGINS_VERSION
from duq.runtime.files import replacing, write_text
from duq.runtime.plan import PlanWriter


class Adapted(NamedTuple):
    """A graph as TensorRT takes it, and its plugins by the names of their nodes."""

    network: Network
    plugins: dict[str, Plugin]


def write_engines(
    graphs: Graphs, writer: PlanWriter, progress: Progress, options: TensorRTOptions, keep: Path | None
) -> dict[str, Any]:
    """Builds the engines for every SM and writes them into the plan; returns the manifest's section.

    keep: a directory for the ops, and for the networks without their weights, or None.
    """
    trt.register()
    table = tensor_of(take_embeddings(graphs.prefix))
    writer.write("embedding", table.numpy().astype(FLOAT_TYPES[options.float_type].numpy))
    ops = {name: prepare(model) for name, model in graphs.items()}
    if keep is not None:
        for name, found in ops.items():
            write_text(keep / f"tensorrt-fuse-{name}.txt", describe(found))
    sections: dict[str, Any] = {}
    for sm in options.sm:
        tokens = options.cameras * graphs.config.vision.tokens + graphs.config.max_prompt_tokens
        adapted = {
            name: adapt(model, ops[name], FLOAT_TYPES[options.float_type], sm, tokens) for name, model in graphs.items()
        }
        sections |= _write_for(sm, adapted, graphs, writer, progress, options, keep)
    return sections


def adapt(model: ir.Model, ops: list[Op], float_type: FloatType, sm: int, prefix_tokens: int) -> Adapted:
    """The network of a prepared model, which stays as it is.

    prefix_tokens: of the largest observation, which the kernels of the prefix are chosen for. Raises KernelError for a
    quantized linear that has no kernel.
    """
    network = Network.of(model)
    plugins = add_plugins(network, ops, float_type.kernels, sm, prefix_tokens)
    to_float_type(network, float_type)
    for op_type in EXPANDED:
        expand(network, op_type)
    return Adapted(network, plugins)


def _write_for(
    sm: int,
    adapted: Mapping[str, Adapted],
    graphs: Graphs,
    writer: PlanWriter,
    progress: Progress,
    options: TensorRTOptions,
    keep: Path | None,
) -> dict[str, Any]:
    kernels = _write_kernels(_kernels(adapted), sm, writer, progress)
    linears = _linears(adapted)
    writer.write(f"engine/sm{sm}/kernels.json", json.dumps({"kernels": kernels, "linears": linears}, indent=1).encode())
    sizes, engines = profile(graphs.config, options.cameras), {}
    for name, (network, count) in _networks(adapted, options.loop, graphs.num_steps).items():
        proto = network.proto()
        if keep is not None:
            with replacing(keep / f"tensorrt-sm{sm}-{name}.onnx") as file:
                file.write(proto.SerializeToString())
        engine = build(name, network, count, sizes, sm, progress, writer.path.parent)
        writer.write(f"engine/sm{sm}/{name}", engine.data)
        writer.write(f"engine/sm{sm}/{name}.log", "\n".join(engine.log).encode())
        engines[name] = _describe(ir.from_proto(proto), engine)
    return {
        f"sm{sm}": {
            "flavor": trt.flavor(),
            "version": trt.library().__version__,
            "plugins_version": PLUGINS_VERSION,
            "loop": options.loop,
            "float_type": options.float_type,
            "engines": list(engines),
            "linears": {re.sub(r"\.\d+\.", ".*.", name): kernel for name, kernel in linears.items()},  # equal in all layers
        },
        **{f"sm{sm}/{name}": engine for name, engine in engines.items()},
    }


def _networks(adapted: Mapping[str, Adapted], loop: str, num_steps: int) -> dict[str, tuple[Network, int]]:
    """The networks that become engines, with their numbers of plugins."""
    counts = {name: len(each.plugins) for name, each in adapted.items()}
    if loop == "graph":
        return {name: (each.network, counts[name]) for name, each in adapted.items()}
    policy = unroll(adapted["prefix"].network, adapted["step"].network, num_steps)
    return {"policy": (policy, counts["prefix"] + num_steps * counts["step"])}


def _linears(adapted: Mapping[str, Adapted]) -> dict[str, str]:
    """Graph and linear -> its kernel: pi0's state token runs linears of the step in the prefix as well."""
    return {
        f"{graph}/{name}": plugin.kernels[0].expression
        for graph, each in adapted.items()
        for name, plugin in each.plugins.items()
        if plugin.problem
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


def _kernels(adapted: Mapping[str, Adapted]) -> dict[KernelName, bitblas.Problem | None]:
    """The kernels of all plugins, those of BitBLAS with their problem."""
    found: dict[KernelName, bitblas.Problem | None] = {}
    for plugin in (plugin for each in adapted.values() for plugin in each.plugins.values()):
        for name in plugin.kernels:
            found[name] = plugin.problem if name.source == "bitblas" else None
    return found


def _write_kernels(
    kernels: dict[KernelName, bitblas.Problem | None], sm: int, writer: PlanWriter, progress: Progress
) -> list[dict[str, str]]:
    task = progress.add_task(f"Generating and compiling the kernels for SM {sm}", total=len(kernels))
    problems = [problem for problem in kernels.values() if problem]
    sources = dict(zip(problems, bitblas.sources(problems, sm), strict=True))
    written = []
    for number, (name, problem) in enumerate(kernels.items()):
        cubin = (
            bitblas.compile_kernel(sources[problem], sm) if problem else compile_cubin(name.source, sm, [name.expression])
        )
        written.append(_write_kernel(name, cubin, f"cubin/sm{sm}/{number}.{name.source.removesuffix('.cu')}", writer))
        progress.advance(task)
    return written


def _write_kernel(name: KernelName, cubin: Cubin, entry: str, writer: PlanWriter) -> dict[str, str]:
    writer.write(entry, cubin.image)
    (symbol,) = cubin.symbols.values()
    return {**name._asdict(), "cubin": entry, "symbol": symbol}


def _describe(model: ir.Model, engine: Engine) -> dict[str, Any]:
    return {
        "inputs": _signature(model.graph.inputs),
        "outputs": _signature(model.graph.outputs),
        "ops": dict(Counter(f"{node.domain}::{node.op_type}".removeprefix("::") for node in model.graph).most_common()),
        "layers": engine.layers,
        "plugins": engine.plugins,
        "bytes": engine.data.nbytes,
    }


def _signature(values: Iterable[ir.Value]) -> dict[str, Any]:
    return {
        name_of(value): {
            "dtype": dtype_of(value).name.lower(),
            "shape": [size if isinstance(size, int) else str(size) for size in value.shape or ()],
        }
        for value in values
    }
