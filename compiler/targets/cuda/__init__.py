"""The `cuda` target: cubins, weights as the kernels read them, and for each architecture a schedule.

A schedule is data (JSON): for every number of cameras and every prompt size the launches of the prefix and of one
denoising step, with their kernels, grids and arguments, and one arena in which all activations have fixed places. The
executor only follows it (runtime/executors/cuda.py), and `duq-inspect` prints it.
"""
from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx_ir.passes.common as common
from rich.progress import Progress

from compiler.graph.export import Graphs
from compiler.targets.cuda.arena import place, schedule
from compiler.targets.cuda.lower import Lowering, Variant
from compiler.targets.cuda.program import ALIGNMENT, BYTES, Launch, to_json
from compiler.targets.cuda.weights import Weights, to_bf16
from plugins.kernels import ARCHITECTURES as _ARCHITECTURES
from plugins.kernels import Cubin, compile_cubin
from runtime.plan import PlanWriter

ARCHITECTURES = tuple(_ARCHITECTURES)
PROMPT_STEP = 32  # prompts are padded to a multiple of this: a CUDA graph has fixed sizes


def emit(graphs: Graphs, writer: PlanWriter, progress: Progress, options) -> dict:
    """Writes cubins, weights, the token table and the schedules into the plan; returns the manifest's section."""
    for _, model in graphs.items():
        common.ShapeInferencePass()(model)
    weights, schedules, sections = Weights(), {}, {}
    sizes = [(c, p) for c in range(1, options.cameras + 1) for p in prompt_sizes(graphs.config.max_prompt_tokens)]
    for sm in options.sm:
        variants, arena_bytes = [], 0
        for cameras, prompt in progress.track(sizes, description=f"Lowering for SM {sm}"):
            lowering = Lowering(graphs, sm, cameras, prompt, weights)
            variant = lowering.run()
            for launches in (variant.prefix, variant.step):
                schedule(launches)
            arena_bytes = max(arena_bytes, place(variant.inputs, [variant.prefix, variant.step]))
            variants.append(variant)
        kernels = _write_cubins(sm, variants, writer, progress)
        schedules[sm] = {"arena_bytes": arena_bytes, **_schedule(variants, kernels)}
        sections[f"sm{sm}"] = _summary(variants, arena_bytes, len(kernels))

    offsets = _write_weights(weights, writer, progress)
    table = lowering.embedding_table
    writer.write("embedding", to_bf16(np.float32(table.const_value.numpy())))
    for sm, data in schedules.items():
        writer.write(f"schedule/sm{sm}.json", json.dumps(data | {"weights": offsets}).encode())
    return sections


def prompt_sizes(max_tokens: int) -> list[int]:
    return [*range(PROMPT_STEP, max_tokens, PROMPT_STEP), max_tokens]


def _write_cubins(sm: int, variants: list[Variant], writer: PlanWriter, progress: Progress) -> dict:
    """Compiles what the launches need, each source with all its instances; (source, headers, expression) -> index."""
    wanted: dict[tuple, dict[str, None]] = {}
    for launch in _launches(variants):
        if launch.shape is not None:
            wanted.setdefault((launch.source, tuple(launch.headers.items())), {})[launch.expression] = None

    def build(item: tuple) -> Cubin:
        (source, headers), expressions = item
        return compile_cubin(source, sm, list(expressions), dict(headers))

    index = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        cubins = pool.map(build, wanted.items())
        task = progress.add_task(f"Compiling the kernels for SM {sm}", total=len(wanted))
        for number, ((key, expressions), cubin) in enumerate(zip(wanted.items(), cubins)):
            entry = f"cubin/sm{sm}/{number}.{key[0].removesuffix('.cu')}"
            writer.write(entry, cubin.image)
            for expression in expressions:
                index[*key, expression] = {"cubin": entry, "symbol": cubin.symbols[expression], "expression": expression}
            progress.advance(task)
    return index


def _write_weights(weights: Weights, writer: PlanWriter, progress: Progress) -> dict[str, list[int]]:
    """Each weight as an entry; its [offset, bytes] in the device's block of weights."""
    offsets, end = {}, 0
    task = progress.add_task("Writing the weights", total=sum(weights.bytes.values()))
    for name, compute in weights.sources.items():
        array = compute()
        assert array.nbytes == weights.bytes[name], name
        writer.write(f"weights/{name}", array)
        offsets[name] = [end, array.nbytes]
        end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        progress.advance(task, array.nbytes)
    return offsets


def _schedule(variants: list[Variant], kernels: dict) -> dict:
    number = {key: index for index, key in enumerate(kernels)}

    def launches(program: list[Launch]) -> list[dict]:
        keys = [(each.source, tuple(each.headers.items()), each.expression) for each in program]
        return [to_json(each, number.get(key)) for each, key in zip(program, keys)]

    def output(matrix, launch: int) -> dict:
        offset = matrix.buffer.offset + matrix.offset * BYTES[matrix.type]
        size = {"rows": matrix.rows, "columns": matrix.columns, "stride": matrix.stride}
        return {"after": launch, "offset": offset, **size, "type": matrix.type}

    return {
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


def _summary(variants: list[Variant], arena_bytes: int, kernels: int) -> dict:
    largest = variants[-1]
    return {
        "launches": {"prefix": len(largest.prefix), "step": len(largest.step)},
        "sizes": [f"{variant.cameras} cameras, {variant.prompt} prompt tokens" for variant in variants],
        "kernels": kernels,
        "arena_bytes": arena_bytes,
    }
