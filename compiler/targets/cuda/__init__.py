"""The `cuda` target: cubins, weights as the kernels read them, and for each architecture a schedule.

A schedule is data (JSON): for every number of cameras and every prompt size the launches of the prefix and of one
denoising step, with their kernels, grids and arguments, and one arena in which all activations have fixed places. The
executor only follows it (runtime/executors/cuda.py), and `duq-inspect` prints it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx_ir.passes.common as common
from rich.progress import Progress

from duq.compiler.graph.export import Graphs
from duq.compiler.parallel import in_order, thread_pool
from duq.compiler.targets import GpuOptions, Target
from duq.compiler.targets.cuda import timing
from duq.compiler.targets.cuda.arena import place, schedule
from duq.compiler.targets.cuda.cubins import Instance, compile_each
from duq.compiler.targets.cuda.lower import Variant, lower_variant
from duq.compiler.targets.cuda.problems import AnyTactic, Problem, from_table
from duq.compiler.targets.cuda.program import ALIGNMENT, BYTES, Launch, to_json
from duq.compiler.targets.cuda.weights import Weights, to_bf16
from duq.compiler.targets.gpu import GPU_PHASES
from duq.plugins.nvrtc import ARCHITECTURES as _ARCHITECTURES
from duq.runtime.executors.cuda import SCHEDULE_VERSION
from duq.runtime.plan import PlanWriter

ARCHITECTURES = tuple(_ARCHITECTURES)
IN_FLIGHT_BYTES = 1 << 30  # of the weights computed at a time; their float32 forms take several times that
PROMPT_STEP = 32  # prompts are padded to a multiple of this: a CUDA graph has fixed sizes


@dataclass(frozen=True, kw_only=True)
class CudaOptions(GpuOptions):
    """`timing`: beside a GPU of one of the `sm`, choose kernels by timing; without, equal inputs give equal plans."""

    target: ClassVar[str] = "cuda"
    timing: bool = True


def emit(graphs: Graphs, writer: PlanWriter, progress: Progress, options: CudaOptions, keep: Path | None) -> dict:
    """Writes cubins, weights, the token table and the schedules into the plan; returns the manifest's section."""
    for _, model in graphs.items():
        common.ShapeInferencePass()(model)
    weights, schedules, sections = Weights(), {}, {}
    pixel = "float" if options.float_images else "unsigned char"
    sizes = [(c, p) for c in range(1, options.cameras + 1) for p in prompt_sizes(graphs.config.max_prompt_tokens)]
    for sm in options.sm:
        choose = from_table(sm)
        if timed := options.timing and timing.has_gpu(sm):
            choose = timing.by_timing(_problems(graphs, sm, sizes), sm, progress)
        variants, arena_bytes = [], 0
        for cameras, prompt in progress.track(sizes, description=f"Lowering for SM {sm}"):
            variant = lower_variant(graphs, sm, cameras, prompt, weights, choose, pixel)
            schedule(variant.prefix, variant.step)
            arena_bytes = max(arena_bytes, place(variant.inputs, [variant.prefix, variant.step]))
            variants.append(variant)
        if timed:
            timing.choose_algorithms(_launches(variants), progress)
        kernels = _write_cubins(sm, variants, writer, progress)
        schedules[sm] = {"arena_bytes": arena_bytes, **_schedule(variants, kernels)}
        if options.float_images:
            schedules[sm]["pixel"] = pixel
        sections[f"sm{sm}"] = _summary(variants, arena_bytes, len(kernels), timed)

    offsets = _write_weights(weights, writer, progress)
    writer.write("embedding", to_bf16(variant.embedding_table.const_value.numpy()))
    for sm, data in schedules.items():
        writer.write(f"schedule/sm{sm}.json", json.dumps(data | {"weights": offsets}).encode())
    return sections


def prompt_sizes(max_tokens: int) -> list[int]:
    return [*range(PROMPT_STEP, max_tokens, PROMPT_STEP), max_tokens]


def _problems(graphs: Graphs, sm: int, sizes: list[tuple[int, int]]) -> list[Problem]:
    """What the lowering asks tactics for, which does not depend on the answers."""
    asked: dict[Problem, None] = {}
    table = from_table(sm)

    def choose(problem: Problem, slab_tokens: int | None = None) -> AnyTactic:
        asked[problem] = None
        return table(problem, slab_tokens)

    for size in sizes:
        lower_variant(graphs, sm, *size, Weights(), choose)
    return list(asked)


def _write_cubins(sm: int, variants: list[Variant], writer: PlanWriter, progress: Progress) -> dict[Instance, dict]:
    """Compiles what the launches need, each instance of a kernel for itself; by it what the schedule says of it."""
    wanted = dict.fromkeys(_instance(launch) for launch in _launches(variants) if launch.shape is not None)
    kernels = {}
    cubins = progress.track(compile_each(wanted, sm), total=len(wanted), description=f"Compiling the kernels for SM {sm}")
    for number, (instance, cubin) in enumerate(cubins):
        entry = f"cubin/sm{sm}/{number}.{instance.source.removesuffix('.cu')}"
        writer.write(entry, cubin.image)
        symbol = cubin.symbols[instance.expression]
        kernels[instance] = {"cubin": entry, "symbol": symbol, "expression": instance.expression}
    return kernels


def _instance(launch: Launch) -> Instance:
    return Instance(launch.source, tuple(launch.headers.items()), launch.expression)


def _write_weights(weights: Weights, writer: PlanWriter, progress: Progress) -> dict[str, list[int]]:
    """Each weight as an entry; its [offset, bytes] in the device's block of weights."""
    offsets, end = {}, 0
    task = progress.add_task("Writing the weights", total=sum(weights.bytes.values()))
    with thread_pool() as pool:
        tasks = ((compute, weights.bytes[name]) for name, compute in weights.sources.items())
        for name, array in zip(weights.sources, in_order(pool, tasks, IN_FLIGHT_BYTES)):
            assert array.nbytes == weights.bytes[name], name
            writer.write(f"weights/{name}", array)
            offsets[name] = [end, array.nbytes]
            end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
            progress.advance(task, array.nbytes)
    return offsets


def _schedule(variants: list[Variant], kernels: dict[Instance, dict]) -> dict:
    number = {instance: index for index, instance in enumerate(kernels)}

    def launches(program: list[Launch]) -> list[dict]:
        return [to_json(each, number.get(_instance(each))) for each in program]

    def output(matrix, launch: int) -> dict:
        offset = matrix.buffer.offset + matrix.offset * BYTES[matrix.type]
        size = {"rows": matrix.rows, "columns": matrix.columns, "stride": matrix.stride}
        return {"after": launch, "offset": offset, **size, "type": matrix.type}

    return {
        "version": SCHEDULE_VERSION,
        "kernels": list(kernels.values()),
        "variants": [
            {
                "cameras": variant.cameras,
                "prompt": variant.prompt,
                "inputs": {each.name: [each.offset, each.bytes] for each in variant.inputs if each.offset is not None},
                "zeroed": [[each.offset, each.bytes] for each in variant.zeroed],
                "outputs": {name: output(*found) for name, found in variant.outputs.items()},
                "prefix": launches(variant.prefix),
                "step": launches(variant.step),
            }
            for variant in variants
        ],
    }


def _launches(variants: list[Variant]) -> list[Launch]:
    return [launch for variant in variants for launch in [*variant.prefix, *variant.step]]


def _summary(variants: list[Variant], arena_bytes: int, kernels: int, timed: bool) -> dict:
    largest = variants[-1]
    return {
        "launches": {"prefix": len(largest.prefix), "step": len(largest.step)},
        "sizes": [f"{variant.cameras} cameras, {variant.prompt} prompt tokens" for variant in variants],
        "kernels": kernels,
        "tactics": "timed on a GPU" if timed else "not timed here: by the table of an H100, or by rule",
        "library": f"cuBLASLt, {'algorithms timed on a GPU' if timed else 'its own choice of algorithms'}",
        "arena_bytes": arena_bytes,
    }


TARGET = Target("cuda", CudaOptions, emit, GPU_PHASES, ARCHITECTURES)
