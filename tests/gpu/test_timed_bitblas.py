"""Tactics timed on the GPU at hand, whose results have to agree in every bit: ours, and BitBLAS's with epilogue.cu."""

from __future__ import annotations

import pytest

from duq.compiler.targets.cuda.cubins import compile_each
from duq.compiler.targets.cuda.gemm import Gemm
from duq.compiler.targets.cuda.timing import time_each
from duq.plugins.driver import load
from duq.plugins.gpu import gpu_of
from duq.plugins.kernels import bitblas
from tests.support import launch

GENERATED_FOR = 86  # what runs on newer GPUs too
PROBLEMS = [
    Gemm(306, 2560, 2048, 4, "Bf16", "NONE"),
    Gemm(306, 2048, 2048, 4, "float", "NONE"),
    Gemm(306, 32768, 2048, 4, "Bf16", "GEGLU"),
    Gemm(816, 2048, 16384, 4, "int", "NONE"),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_bitblas_kernels_compute_the_same(problem):
    gpu = gpu_of(launch.compute_capability())
    generated = bitblas.offered(problem.m, problem.n, problem.k, gpu_of(GENERATED_FOR))
    if not generated:
        pytest.skip("needs BitBLAS, or the source that it made in $DUQ_CACHE")
    tactics = [problem.best(gpu), *problem.candidates(gpu)[:2], *generated]
    wanted = [instance.code for tactic in tactics for instance in problem.instances(tactic)]
    kernels = {code: load(cubin)[code.expression] for code, cubin in compile_each(wanted, gpu)}
    times = time_each(problem, tactics, kernels, gpu)  # raises KernelError where they do not agree
    print({repr(tactic): round(time, 3) for tactic, time in zip(tactics, times, strict=True)})
    assert all(time > 0 for time in times)
