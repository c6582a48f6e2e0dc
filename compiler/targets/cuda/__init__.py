"""The `cuda` target: cubins and PTX, weights as the kernels read them, and for each GPU architecture a schedule.

    fuse          graph -> ops: an anchor with the norm in front of it and the element-wise nodes behind it
    specialize    ops at one size of the observation: rows, and which kind of kernel computes each linear
    choose        a tactic for every GEMM and attention, from a table or by timing
    bind          ops -> launches: kernels with their arguments by name, over buffers
    with_chains   launches of a step that are made at once
    plan_streams  what launches wait for, and which overlap
    plan_memory   the place of every buffer in one arena
    emit          launches -> a schedule, as data in the plan

Buffers exist only once tactics are chosen (slabs, accumulators, workspaces), and a buffer's life is that of the launches that
touch it: so launches are bound first and planned then. Each phase is a function over data, and prints itself (--keep-phases).
The executor only follows the schedule (runtime/executors/cuda.py), and `duq-inspect` prints it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir.passes.common as common
from rich.progress import Progress

from duq.compiler.graph.export import Graphs
from duq.compiler.parallel import in_order, thread_pool
from duq.compiler.targets import GpuOptions, Target
from duq.compiler.targets import ops as fused
from duq.compiler.targets.cuda import timing
from duq.compiler.targets.cuda.bind import bind
from duq.compiler.targets.cuda.chains import with_chains
from duq.compiler.targets.cuda.choose import choose, gemms_of
from duq.compiler.targets.cuda.emit import Planned, emit_schedule
from duq.compiler.targets.cuda.gemm import from_table
from duq.compiler.targets.cuda.launches import ALIGNMENT
from duq.compiler.targets.cuda.plan import plan_memory, plan_streams
from duq.compiler.targets.cuda.report import Report
from duq.compiler.targets.cuda.specialize import Size, specialize
from duq.compiler.targets.cuda.weights import Weights, to_bf16
from duq.compiler.targets.fuse import check_covered, fuse
from duq.compiler.targets.gpu import GPU_PHASES
from duq.compiler.targets.ops import Prompt
from duq.compiler.targets.values import array_of
from duq.plugins.gpu import GPUS, Gpu, gpu_named, gpu_of, runs_code_of, runs_ptx_of, stand_in
from duq.plugins.nvrtc import check_supported, nvrtc_version
from duq.runtime.executors.schedule import Context, check_schedule
from duq.runtime.plan import PlanWriter

ARCHITECTURES = tuple(sorted(GPUS))
IN_FLIGHT_BYTES = 1 << 30  # of the weights computed at a time; their float32 forms take several times that
PROMPT_STEP = 32  # prompts are padded to a multiple of this: a CUDA graph has fixed sizes


@dataclass(frozen=True, kw_only=True)
class CudaOptions(GpuOptions):
    """The options of the `cuda` target.

    Attributes:
        timing: beside a GPU of one of the `sm`, choose tactics by timing; without, equal inputs give equal plans.
            Tactics that are not timed are chosen for the multiprocessors of the SM's card.
        ptx: carry PTX of a program, so that the plan runs on later GPUs too.
    """

    target: ClassVar[str] = "cuda"
    timing: bool = True
    ptx: bool = True

    @property
    def ptx_sms(self) -> tuple[int, ...]:
        """The SMs whose programs are carried as PTX: the lowest that later GPUs run, and each higher one for a GPU with less
        shared memory, since a program may need all that its own GPU has."""
        carried: list[Gpu] = []
        for gpu in map(gpu_of, sorted(self.sm)):
            needs_less = all(gpu.block_shared_bytes < each.block_shared_bytes for each in carried)
            if self.ptx and gpu.ptx_architecture and needs_less:
                carried.append(gpu)
        return tuple(gpu.sm for gpu in carried)

    @property
    def coverage(self) -> str:
        made_for = f"runs on SM {', '.join(map(str, self.sm))}"
        if not self.ptx:
            return f"{made_for}; carries no PTX for later GPUs (--no-ptx)"
        if not self.ptx_sms:
            architectures = ", ".join(gpu_of(sm).architecture for sm in self.sm)
            return (
                f"{made_for}; carries no PTX, as that of {architectures} runs on no other GPU: add --sm 86 for later ones"
            )
        of = " and ".join(map(str, self.ptx_sms))
        shared = gpu_of(self.ptx_sms[-1]).block_shared_bytes
        least = shared <= min(gpu.block_shared_bytes for gpu in GPUS.values())
        more = "" if least else f"; add --sm 86 for those with less than {shared >> 10} KB of shared memory a thread block"
        return f"{made_for}; on later GPUs from PTX of its program for SM {of}, which the driver compiles{more}"


@dataclass(frozen=True, kw_only=True)
class StandInOptions(CudaOptions):
    """For a plan of one program: the schedule of the card `gpu`, as machine code for the one GPU of `sm` (plugins/gpu.py,
    `stand_in`). It is a program for `sm` like any other, and slower than that GPU's own. Tests and duq-bench make such
    plans, duq-compile does not."""

    timing: bool = False
    ptx: bool = False

    def __post_init__(self) -> None:
        """Raises KernelError where the GPU of `sm` has less than the card: before any work."""
        assert self.cards

    @property
    def cards(self) -> dict[int, Gpu]:
        (sm,), (name,) = self.sm, self.gpu
        return {sm: stand_in(gpu_named(name), sm)}


def options_of_program(program: int, here: int, **options: Any) -> CudaOptions:
    """For a plan whose program is that of an SM, and which a GPU of compute capability `here` runs: as machine code or as
    PTX where it can, else with a stand-in. Raises KernelError where it can do neither."""
    if runs_code_of(here, program) or runs_ptx_of(here, program):
        return CudaOptions(sm=(program,), **options)
    return StandInOptions(sm=(here,), gpu=(gpu_of(program).name,), **options)


def check(options: CudaOptions) -> None:
    """Raises KernelError where NVRTC is missing, or compiles for no such SM: before any work."""
    for sm in options.sm:
        check_supported(gpu_of(sm))


def emit(graphs: Graphs, writer: PlanWriter, progress: Progress, options: CudaOptions, keep: Path | None) -> dict[str, Any]:
    """Writes cubins, PTX, weights, the token table and the schedules into the plan; returns the manifest's section."""
    report = Report(keep)
    ops = {}
    for name, model in graphs.items():
        common.ShapeInferencePass()(model)
        ops[name] = fuse(model)
        check_covered(model, ops[name])
        report(f"fuse-{name}", fused.describe(ops[name]))
    weights, schedules = Weights(), {}
    sections: dict[str, Any] = {"ptx": list(options.ptx_sms), "nvrtc": str(nvrtc_version())}
    for sm in options.sm:
        gpu, timed = _gpu_for(sm, options)
        planned = plan_for(gpu, timed, graphs, ops, weights, progress, options, report)
        schedules[sm] = emit_schedule(planned, gpu, _pixel(options), sm in options.ptx_sms, writer, progress)
        sections[f"sm{sm}"] = _summary(planned, schedules[sm], gpu, timed)
    offsets = _write_weights(weights, writer, progress)
    (table,) = [op.table for op in ops["prefix"] if isinstance(op, Prompt)]
    writer.write("embedding", to_bf16(array_of(table)))
    context = Context(graphs.config.to_json(), graphs.num_steps, options.cameras, writer.sizes)
    for sm, data in schedules.items():
        schedule = json.dumps(data | {"weights": offsets}).encode()
        check_schedule(json.loads(schedule), context)
        writer.write(f"schedule/sm{sm}.json", schedule)
    return sections


def _gpu_for(sm: int, options: CudaOptions) -> tuple[Gpu, bool]:
    """The card that tactics are chosen for, and whether by timing on it: on this machine's GPU, unless another is named."""
    named, here = options.cards.get(sm), timing.gpu_at_hand(sm) if options.timing else None
    if here is None or (named is not None and named.multiprocessors != here.multiprocessors):
        return named or gpu_of(sm), False
    return here, True


def plan_for(
    gpu: Gpu,
    timed: bool,
    graphs: Graphs,
    ops: dict[str, list[fused.Op]],
    weights: Weights,
    progress: Progress,
    options: CudaOptions,
    report: Report,
) -> list[Planned]:
    """The planned programs of every size for a GPU; `timed`: which is at hand to time tactics on. ops: of each graph, fused."""
    config = graphs.config
    sizes = [Size(c, p) for c in range(1, options.cameras + 1) for p in prompt_sizes(config.max_prompt_tokens)]
    models = dict(graphs.items())
    sized = [{name: specialize(ops[name], models[name], size, config) for name in models} for size in sizes]
    every = [each for graph in sized for each in graph.values()]
    tuner = timing.by_timing(gemms_of(every), gpu, progress) if timed else from_table(gpu)
    programs = []
    for size, graph in progress.track(list(zip(sizes, sized, strict=True)), description=f"Lowering for SM {gpu.sm}"):
        chosen = {name: choose(each, gpu, tuner) for name, each in graph.items()}
        bound = {name: (models[name], graph[name], chosen[name]) for name in models}
        programs.append(bind(bound, config, size, gpu, weights, _pixel(options)))
        report.tactics(gpu, size, chosen)
    if timed:
        programs = timing.with_timed_algorithms(programs, progress)
    programs = [with_chains(program, gpu) for program in programs]
    planned = [(program, plan_streams(program, gpu), plan_memory(program)) for program in programs]
    report.programs(gpu, planned)
    return planned


def prompt_sizes(max_tokens: int) -> list[int]:
    return [*range(PROMPT_STEP, max_tokens, PROMPT_STEP), max_tokens]


def _pixel(options: CudaOptions) -> str:
    return "float" if options.float_images else "unsigned char"


def _write_weights(weights: Weights, writer: PlanWriter, progress: Progress) -> dict[str, list[int]]:
    """Each weight as an entry; its [offset, bytes] in the device's block of weights."""
    offsets, end = {}, 0
    task = progress.add_task("Writing the weights", total=sum(weights.bytes.values()))
    with thread_pool() as pool:
        tasks = ((compute, weights.bytes[name]) for name, compute in weights.sources.items())
        arrays = in_order(pool, tasks, IN_FLIGHT_BYTES)
        for name, array in zip(weights.sources, arrays, strict=True):
            assert array.nbytes == weights.bytes[name], name
            writer.write(f"weights/{name}", array)
            offsets[name] = [end, array.nbytes]
            end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
            progress.advance(task, array.nbytes)
    return offsets


def _summary(planned: list[Planned], schedule: dict[str, Any], gpu: Gpu, timed: bool) -> dict[str, Any]:
    largest = planned[-1][0]
    return {
        "gpu": f"{gpu.name}, {gpu.multiprocessors} multiprocessors",
        "launches": {"prefix": len(largest.prefix), "step": len(largest.step)},
        "sizes": [f"{program.cameras} cameras, {program.prompt} prompt tokens" for program, _, _ in planned],
        "kernels": len(schedule["kernels"]),
        "tactics": "timed on a GPU" if timed else "not timed here: by the table of an H100, or by rule",
        "library": f"cuBLASLt, {'algorithms timed on a GPU' if timed else 'its own choice of algorithms'}",
        "arena_bytes": schedule["arena_bytes"],
    }


TARGET = Target("cuda", CudaOptions, emit, GPU_PHASES, ARCHITECTURES, check)
