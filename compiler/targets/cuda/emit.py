"""Emit: programs as data in the plan, a JSON schedule an SM, with the machine code of their kernels beside it, and perhaps PTX.

A schedule names its kernels' parameters and types, and every launch its arguments by these names:

    {"version": ..., "arena_bytes": ..., "pixel": type of the images, "weights": {name: [offset, bytes]},
     "kernels": [{"cubin": entry, "ptx"?: entry, "symbol", "expression", "parameters": [[name, type], ...]}],
     "calls": {"cublaslt": [[name, type], ...]},
     "variants": [{"cameras", "prompt", "inputs": {name: [offset, bytes]}, "zeroed": [[offset, bytes]],
                   "outputs": {name: {"after", "offset", "rows", "columns", "stride", "type"}},
                   "prefix": [launch], "step": [launch], "chains"?: [chain]}]}
    launch: {"name", "kernel": index | "call": library, "grid", "threads", "shared", "cluster"?, "branch"?, "wait_for"?,
             "overlap"?, "args": {name: argument}, "work", "moved"}
    chain: {"first", "last": of the launches of a step that it makes at once, "kernel", "grid", "threads", "shared",
            "args": {"links", "stale_links"}}, whose kernel takes the arguments of those launches and then its own
    argument: ["a", offset in the arena], ["w", weight, bytes a step, offset], ["f", float], an int, or null
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.progress import Progress

from duq.compiler.targets.cuda.cubins import compile_each
from duq.compiler.targets.cuda.launches import (
    BYTES,
    Argument,
    Chain,
    Launch,
    Matrix,
    Memory,
    Pointer,
    Program,
    Streams,
    Weight,
)
from duq.plugins.gpu import Gpu
from duq.plugins.kernel import Code, Instance
from duq.runtime.executors.schedule import SCHEDULE_VERSION
from duq.runtime.plan import PlanWriter

Planned = tuple[Program, Streams, Memory]


def emit_schedule(
    planned: Sequence[Planned], gpu: Gpu, pixel: str, ptx: bool, writer: PlanWriter, progress: Progress
) -> dict[str, Any]:
    """The schedule, without the places of the weights; writes the cubins, and with `ptx` the PTX, into the plan."""
    wanted = {each.code: each for program, _, _ in planned for each in program.kernels}
    kernels = _write_cubins(wanted, gpu, writer, progress)
    if ptx:
        _write_ptx(kernels, gpu, writer, progress)
    return schedule_of(planned, kernels, pixel)


def schedule_of(planned: Sequence[Planned], kernels: Mapping[Code, dict[str, Any]], pixel: str) -> dict[str, Any]:
    """The same, of kernels that are described already, by what is compiled for them."""
    launches = [launch for program, _, _ in planned for launch in program.launches]
    number = {code: index for index, code in enumerate(kernels)}
    calls = {each.instance.source: _parameters(each.instance) for each in launches if each.instance.kernel.is_library}
    return {
        "version": SCHEDULE_VERSION,
        "arena_bytes": max(memory.arena_bytes for _, _, memory in planned),
        "pixel": pixel,
        "kernels": list(kernels.values()),
        "calls": calls,
        "variants": [_variant(*each, number) for each in planned],
    }


def _write_cubins(
    wanted: Mapping[Code, Instance], gpu: Gpu, writer: PlanWriter, progress: Progress
) -> dict[Code, dict[str, Any]]:
    """Compiles each instance of a kernel by itself; by it what the schedule says of it."""
    cubins = compile_each(wanted, gpu)
    description = f"Compiling the kernels for SM {gpu.sm}"
    kernels: dict[Code, dict[str, Any]] = {}
    for code, cubin in progress.track(cubins, total=len(wanted), description=description):
        entry = f"cubin/sm{gpu.sm}/{len(kernels)}.{code.source.removesuffix('.cu')}"
        writer.write(entry, cubin.image)
        symbol = cubin.symbols[code.expression]
        kernels[code] = {"cubin": entry, "symbol": symbol, "expression": code.expression,
                         "parameters": _parameters(wanted[code])}  # fmt: skip
    return kernels


def _write_ptx(kernels: Mapping[Code, dict[str, Any]], gpu: Gpu, writer: PlanWriter, progress: Progress) -> None:
    """Compiles each kernel again, to PTX, and names it beside its cubin."""
    images = compile_each(kernels, gpu, ptx=True)
    for code, image in progress.track(images, total=len(kernels), description=f"PTX of the kernels for SM {gpu.sm}"):
        row = kernels[code]
        row["ptx"] = row["cubin"].replace("cubin/", "ptx/", 1)
        assert image.symbols[code.expression] == row["symbol"], code
        writer.write(row["ptx"], image.image)


def _parameters(instance: Instance) -> list[list[str]]:
    return [[name, instance.type_of(name)] for name in instance.kernel.parameters]


def _variant(program: Program, streams: Streams, memory: Memory, number: Mapping[Code, int]) -> dict[str, Any]:
    def output(matrix: Matrix, after: int) -> dict[str, Any]:
        offset = memory.offsets[matrix.buffer] + matrix.offset * BYTES[matrix.type]
        size = {"rows": matrix.rows, "columns": matrix.columns, "stride": matrix.stride}
        return {"after": after, "offset": offset, **size, "type": matrix.type}

    placed = {each.name: [memory.offsets[each], each.bytes] for each in program.inputs if each in memory.offsets}
    return {
        "cameras": program.cameras,
        "prompt": program.prompt,
        "inputs": placed,
        "zeroed": [[memory.offsets[each], each.bytes] for each in program.zeroed],
        "outputs": {name: output(*found) for name, found in program.outputs.items()},
        "prefix": [_launch(each, streams, memory, number) for each in program.prefix],
        "step": [_launch(each, streams, memory, number) for each in program.step],
        **({"chains": [_chain(each, memory, number) for each in program.chains]} if program.chains else {}),
    }


def _chain(chain: Chain, memory: Memory, number: Mapping[Code, int]) -> dict[str, Any]:
    links = {name: _argument(getattr(chain, name), "int*", memory) for name in ("links", "stale_links")}
    return {"first": chain.first, "last": chain.last, **_shape(chain.instance, number), "args": links}


def _shape(instance: Instance, number: Mapping[Code, int]) -> dict[str, Any]:
    shape = instance.shape
    return {
        "kernel": number[instance.code],
        "grid": list(shape.grid),
        "threads": shape.threads,
        "shared": shape.shared_bytes,
    }


def _launch(launch: Launch, streams: Streams, memory: Memory, number: Mapping[Code, int]) -> dict[str, Any]:
    instance = launch.instance
    arguments = {name: _argument(value, instance.type_of(name), memory) for name, value in launch.arguments.items()}
    data: dict[str, Any] = {"name": launch.name, "args": arguments}
    if instance.kernel.is_library:
        data["call"] = instance.source
    else:
        data |= _shape(instance, number)
        if instance.shape.cluster != (1, 1, 1):
            data["cluster"] = list(instance.shape.cluster)
    if launch.branch:
        data["branch"] = True
    if waits := streams.waits.get(launch):
        data["wait_for"] = waits
    if launch in streams.overlaps:
        data["overlap"] = True
    return data | {"work": launch.work, "moved": launch.moved}


def _argument(value: Argument, kind: str, memory: Memory) -> list[Any] | int | float | None:
    match value:
        case Pointer():
            return ["a", memory.offsets[value.buffer] + value.offset]
        case Weight():
            return ["w", value.name, value.step_bytes, 0]
    return ["f", value] if kind == "float" else value
