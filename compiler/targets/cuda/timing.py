"""Choosing by timing, where the machine that compiles has a GPU of the architecture that it compiles for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from rich.progress import Progress

from duq.compiler.targets.cuda.cubins import compile_each
from duq.compiler.targets.cuda.gemm import AnyGemm, Gemm, Tactic, Tuner
from duq.compiler.targets.cuda.launches import Launch, Program
from duq.compiler.targets.cuda.timing_inputs import FloatInputs, IntegerInputs
from duq.plugins.cublas import CublasLt, Problem
from duq.plugins.driver import Kernel, Stream, device_properties, load, open_device
from duq.plugins.errors import KernelError
from duq.plugins.gpu import Gpu, gpu_of
from duq.plugins.kernel import Code
from duq.plugins.kernels import bitblas
from duq.plugins.tactics import SMALL_M
from duq.plugins.timing import milliseconds

# A tactic takes the place of the table's if it is faster by this factor. Times of one GEMM, repeated, vary by a few per cent.
# The table for small M was made on SM 90 in the chain of a whole layer, which such times predict poorly: alone the expert's
# down is 15 % faster with 8 blocks a cluster, in the chain it was not.
FASTER, FASTER_THAN_IN_CHAIN = 1.05, 1.25


def gpu_at_hand(sm: int) -> Gpu | None:
    """This machine's GPU, with its own name and multiprocessors; None where it has none of the architecture."""
    try:
        if open_device() != sm:
            return None
    except KernelError:
        return None
    name, multiprocessors = device_properties()
    return replace(gpu_of(sm), name=name, multiprocessors=multiprocessors)


def by_timing(gemms: Iterable[AnyGemm], gpu: Gpu, progress: Progress) -> Tuner:
    """Times the candidates of each GEMM. For activations in slabs that none of them takes, the choice is the table's.

    Raises KernelError for candidates whose results differ.
    """
    candidates = {each: list(dict.fromkeys([each.best(gpu), *each.candidates(gpu)])) for each in gemms}
    pairs = [(gemm, tactic) for gemm, tactics in candidates.items() for tactic in tactics]
    bitblas.generate(list({tactic: None for _, tactic in pairs if isinstance(tactic, bitblas.Generated)}))
    wanted = dict.fromkeys(instance.code for gemm, tactic in pairs for instance in gemm.instances(tactic))
    cubins = progress.track(compile_each(wanted, gpu), total=len(wanted), description="Compiling the kernels to time")
    kernels = {code: load(cubin)[code.expression] for code, cubin in cubins}
    ranked: dict[AnyGemm, list[Tactic]] = {}  # the fastest first
    task = progress.add_task("Timing", total=len(candidates))
    for gemm, tactics in sorted(candidates.items(), key=lambda item: (item[0].n, item[0].k)):  # neighbors share weights
        progress.update(task, description=f"Timing {gemm.m} x {gemm.n} x {gemm.k}")
        times = dict(zip(tactics, time_each(gemm, tactics, kernels, gpu), strict=True))
        table_made_in_chain = gemm.m <= SMALL_M and gpu.has_wgmma
        times[tactics[0]] /= FASTER_THAN_IN_CHAIN if table_made_in_chain else FASTER
        ranked[gemm] = sorted(times, key=lambda tactic: times[tactic])
        progress.advance(task)

    def choose(gemm: AnyGemm, slab_tokens: int | None = None) -> Tactic:
        fitting = (each for each in ranked[gemm] if slab_tokens is None or _slab_tokens(each) == slab_tokens)
        return next(fitting, None) or gemm.best(gpu, slab_tokens)

    return choose


def _slab_tokens(tactic: Tactic) -> int:
    return getattr(tactic, "slab_tokens", 0)


def time_each(gemm: AnyGemm, tactics: Sequence[Tactic], kernels: Mapping[Code, Kernel], gpu: Gpu) -> list[float]:
    """Milliseconds of each tactic, for a number of launches that is the same for all.

    They overlap, as those of a policy do. Raises KernelError for a tactic whose y is not, bit for bit, that of the first.
    """
    inputs = IntegerInputs(gemm, gpu) if isinstance(gemm, Gemm) else FloatInputs(gemm, gpu)

    def work_of(tactic: Tactic) -> Callable[[int, Stream], None]:
        instances = [each.on(gpu) for each in gemm.instances(tactic)]
        overlap = gpu.has_pdl and all(each.kernel.waits for each in instances)
        loaded = [kernels[each.code] for each in instances]

        def enqueue(copies: int, stream: Stream) -> None:
            for copy in range(copies):
                arguments = inputs.arguments(tactic, copy)
                for kernel, instance, values in zip(loaded, instances, arguments, strict=True):
                    kernel.launch(instance.shape, instance.scalars(values), stream.handle, overlap)

        return enqueue

    works = [work_of(tactic) for tactic in tactics]
    expected = None
    for tactic, work in zip(tactics, works, strict=True):
        y = inputs.result(partial(work, 1))
        expected = y if expected is None else expected
        if not np.array_equal(y, expected):
            raise KernelError(f"tactics that compute different results on this GPU: {tactics[0]} and {tactic} for {gemm}")
    return milliseconds([partial(work, inputs.copies) for work in works])


def with_timed_algorithms(programs: Sequence[Program], progress: Progress) -> list[Program]:
    """The programs with the fastest of cuBLASLt's algorithms for every GEMM that it computes.

    Raises KernelError where it is not installed, without which the plan could not run here either.
    """
    library = CublasLt()
    launches = [launch for program in programs for launch in program.launches]
    problems = {Problem.of(launch.arguments) for launch in launches if launch.instance.kernel.is_library}
    fastest = {each: library.fastest(each) for each in progress.track(problems, description="Timing cuBLASLt's algorithms")}

    def timed(launch: Launch) -> Launch:
        if not launch.instance.kernel.is_library:
            return launch
        algorithm = fastest[Problem.of(launch.arguments)]
        return replace(launch, arguments={**launch.arguments, "algorithm": algorithm})

    return [replace(each, prefix=list(map(timed, each.prefix)), step=list(map(timed, each.step))) for each in programs]
