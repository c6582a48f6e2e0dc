"""Choosing by timing, where the machine that compiles has a GPU of the architecture that it compiles for."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from rich.progress import Progress

from compiler.targets.cuda.cubins import Instance, compile_each
from compiler.targets.cuda.operands import FloatOperands, IntegerOperands
from compiler.targets.cuda.problems import Choose, Gemm, Problem
from compiler.targets.cuda.program import LIBRARY, MATMUL, Launch
from plugins.cublas import CublasLt
from plugins.cublas import Problem as Product
from plugins.driver import Kernel, Stream, load, open_device
from plugins.errors import KernelError
from plugins.tactics import FEW_TOKENS, Float, Tactic
from plugins.timing import milliseconds

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
    wanted = dict.fromkeys(instance_of(problem, tactic) for problem, tactics in candidates.items() for tactic in tactics)
    cubins = progress.track(compile_each(wanted, sm), total=len(wanted), description="Compiling the kernels to time")
    kernels = {instance: load(cubin)[instance.expression] for instance, cubin in cubins}
    ranked: dict[Problem, list[Tactic | Float]] = {}  # the fastest first
    task = progress.add_task("Timing", total=len(candidates))
    for problem, tactics in sorted(candidates.items(), key=lambda item: (item[0].n, item[0].k)):  # neighbours share weights
        progress.update(task, description=f"Timing {problem.m} x {problem.n} x {problem.k}")
        loaded = [kernels[instance_of(problem, tactic)] for tactic in tactics]
        times = dict(zip(tactics, time_each(problem, tactics, loaded, sm)))
        times[tactics[0]] /= FASTER_THAN_IN_CHAIN if problem.m <= FEW_TOKENS and sm == 90 else FASTER
        ranked[problem] = sorted(times, key=times.get)
        progress.advance(task)

    def choose(problem: Problem, slab_tokens: int | None = None) -> Tactic | Float:
        fitting = (each for each in ranked[problem] if slab_tokens is None or each.slab_tokens == slab_tokens)
        return next(fitting, None) or problem.best(sm, slab_tokens)

    return choose


def instance_of(problem: Problem, tactic: Tactic | Float) -> Instance:
    how = problem.launch(tactic)
    return Instance(how.source, tuple(tactic.headers().items()), how.expression)


def time_each(problem: Problem, tactics: Sequence[Tactic | Float], kernels: Sequence[Kernel], sm: int) -> list[float]:
    """Milliseconds of each tactic by its kernel, for a number of launches that is the same for all.

    They overlap, as those of a policy do. Raises KernelError for a tactic whose y is not, bit for bit, that of the first.
    """
    clusters = sm >= 90
    operands = IntegerOperands(problem, clusters) if isinstance(problem, Gemm) else FloatOperands(problem)

    def enqueue(tactic: Tactic | Float, kernel: Kernel, copies: int, stream: Stream) -> None:
        shape = problem.launch(tactic).shape
        shape = shape if clusters else replace(shape, cluster=(1, 1, 1))
        for copy in range(copies):
            kernel.launch(shape, operands.arguments(tactic, copy), stream.handle, overlap=clusters)

    works = [partial(enqueue, *each) for each in zip(tactics, kernels, strict=True)]
    expected = None
    for tactic, work in zip(tactics, works):
        y = operands.result(partial(work, 1))
        expected = y if expected is None else expected
        if not np.array_equal(y, expected):
            raise KernelError(f"tactics that compute different results on this GPU: {tactics[0]} and {tactic} for {problem}")
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
