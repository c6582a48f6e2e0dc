"""Choosing by timing, where the machine that compiles has a GPU of the architecture that it compiles for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
from rich.progress import Progress

from duq.compiler.targets.cuda.cubins import Instance, compile_each
from duq.compiler.targets.cuda.operands import FloatOperands, IntegerOperands
from duq.compiler.targets.cuda.problems import AnyTactic, Choose, Gemm, Problem
from duq.compiler.targets.cuda.program import LIBRARY, MATMUL, Launch
from duq.plugins.cublas import CublasLt
from duq.plugins.cublas import Problem as Product
from duq.plugins.driver import Kernel, Stream, load, open_device
from duq.plugins.errors import KernelError
from duq.plugins.gpu import gpu_of
from duq.plugins.kernels import bitblas
from duq.plugins.tactics import SMALL_M
from duq.plugins.timing import milliseconds

# A tactic takes the place of the table's if it is faster by this factor. Times of one product, repeated, vary by a few per
# cent. Of few tokens the table was made on SM 90 in the chain of a whole layer, which such times predict poorly: alone the
# expert's down is 15 % faster with 8 blocks a cluster, in the chain it was not.
FASTER, FASTER_THAN_IN_CHAIN = 1.05, 1.25


def has_gpu(sm: int) -> bool:
    """Whether this machine's GPU is of the architecture."""
    try:
        return open_device() == sm
    except KernelError:
        return False


def by_timing(problems: Iterable[Problem], sm: int, progress: Progress) -> Choose:
    """Times the candidates of each problem. For activations in slabs that none of them takes, the choice is the table's.

    Raises KernelError for candidates whose results differ.
    """
    candidates = {each: list(dict.fromkeys([each.best(sm), *each.candidates(sm)])) for each in problems}
    pairs = [(problem, tactic) for problem, tactics in candidates.items() for tactic in tactics]
    bitblas.generate(list({tactic: None for _, tactic in pairs if isinstance(tactic, bitblas.Generated)}))
    wanted = dict.fromkeys(instance for pair in pairs for instance in instances_of(*pair))
    cubins = progress.track(compile_each(wanted, sm), total=len(wanted), description="Compiling the kernels to time")
    kernels = {instance: load(cubin)[instance.expression] for instance, cubin in cubins}
    ranked: dict[Problem, list[AnyTactic]] = {}  # the fastest first
    task = progress.add_task("Timing", total=len(candidates))
    for problem, tactics in sorted(candidates.items(), key=lambda item: (item[0].n, item[0].k)):  # neighbors share weights
        progress.update(task, description=f"Timing {problem.m} x {problem.n} x {problem.k}")
        times = dict(zip(tactics, time_each(problem, tactics, kernels, sm)))
        times[tactics[0]] /= FASTER_THAN_IN_CHAIN if problem.m <= SMALL_M and sm == 90 else FASTER
        ranked[problem] = sorted(times, key=times.get)
        progress.advance(task)

    def choose(problem: Problem, slab_tokens: int | None = None) -> AnyTactic:
        fitting = (each for each in ranked[problem] if slab_tokens is None or each.slab_tokens == slab_tokens)
        return next(fitting, None) or problem.best(sm, slab_tokens)

    return choose


def instances_of(problem: Problem, tactic: AnyTactic) -> list[Instance]:
    """Of the tactic's own kernel, and of the one that finishes its sums if there is one."""
    return [each.code for each in problem.launches(tactic)]


def time_each(problem: Problem, tactics: Sequence[AnyTactic], kernels: Mapping[Instance, Kernel], sm: int) -> list[float]:
    """Milliseconds of each tactic, for a number of launches that is the same for all.

    They overlap, as those of a policy do. Raises KernelError for a tactic whose y is not, bit for bit, that of the first.
    """
    gpu = gpu_of(sm)
    clusters = gpu.has_clusters
    operands = IntegerOperands(problem, clusters) if isinstance(problem, Gemm) else FloatOperands(problem)

    def work_of(tactic: AnyTactic) -> Callable[[int, Stream], None]:
        launches = problem.launches(tactic)
        shapes = [each.on(gpu).shape for each in launches]
        overlap = clusters and not isinstance(tactic, bitblas.Generated)
        loaded = [kernels[instance] for instance in instances_of(problem, tactic)]

        def enqueue(copies: int, stream: Stream) -> None:
            for copy in range(copies):
                for kernel, shape, arguments in zip(loaded, shapes, operands.arguments(tactic, copy), strict=True):
                    kernel.launch(shape, arguments, stream.handle, overlap)

        return enqueue

    works = [work_of(tactic) for tactic in tactics]
    expected = None
    for tactic, work in zip(tactics, works):
        y = operands.result(partial(work, 1))
        expected = y if expected is None else expected
        if not np.array_equal(y, expected):
            raise KernelError(
                f"tactics that compute different results on this GPU: {tactics[0]} and {tactic} for {problem}"
            )
    return milliseconds([partial(work, operands.copies) for work in works])


def choose_algorithms(launches: Iterable[Launch], progress: Progress) -> None:
    """Times cuBLASLt's algorithms for every product that it computes.

    Raises KernelError where it is not installed, without which the plan could not run here either.
    """
    calls = [launch for launch in launches if launch.source == LIBRARY]
    library, first = CublasLt(), MATMUL.index("algorithm")

    def problem(arguments: list) -> Product:
        return Product(*arguments[first + 1 :], has_bias=arguments[2] is not None, has_addend=arguments[3] is not None)

    problems = {problem(call.arguments) for call in calls}
    fastest = {each: library.fastest(each) for each in progress.track(problems, description="Timing cuBLASLt's algorithms")}
    for call in calls:
        call.arguments[first] = fastest[problem(call.arguments)]
