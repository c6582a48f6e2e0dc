"""duq-bench --program: what it refuses before it compiles anything, and what the table says."""

from __future__ import annotations

import pytest

from duq.runtime.executors.programs import Program
from duq.tools import bench, bench_gpu


@pytest.mark.parametrize(
    ("gpu", "arguments", "says"),
    [
        (90, ("--program", "86"), "--program 86: is for --suite gpu; leave it out for cpu"),
        (90, ("--suite", "gpu", "--program", "75"), "no kernels for SM 75"),
        (100, ("--suite", "gpu", "--program", "90"), "this machine's GPU, SM 100, runs no program made for SM 90"),
        (80, ("--suite", "gpu", "--program", "86"), "this machine's GPU, SM 80, runs no program made for SM 86"),
    ],
)
def test_a_program_that_cannot_run_is_refused(gpu, arguments, says, command_line, monkeypatch):
    monkeypatch.setattr(bench, "open_device", lambda: gpu)
    ran = command_line(bench.main, *arguments)
    assert ran.code == 2 and says in ran.err and ran.err.count("\n") == 1


@pytest.mark.parametrize(
    ("program", "gpu", "says"),
    [
        (Program(86, "ptx"), 90, "; foreign program: made for SM 86, run as PTX on SM 90"),
        (Program(86, "cubin"), 89, "; foreign program: made for SM 86, run as machine code on SM 89"),
        (Program(90, "cubin"), 90, ""),
    ],
)
def test_a_foreign_program_is_said_to_be_one(program, gpu, says):
    assert bench_gpu._foreign(program, gpu) == says
