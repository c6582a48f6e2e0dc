"""Which program of a cuda plan a GPU runs, from what the manifest says."""

from __future__ import annotations

import pytest

from duq.plugins.gpu import gpu_of, runs_code_of
from duq.plugins.libraries import Version
from duq.runtime.executors import programs
from duq.runtime.executors.programs import Program, best_first, programs_of, shared_bytes_of, sm_to_compile_for

KB = 1 << 10
CUDA = Version(13, 0)


def manifest(sms: list[int], ptx: list[int] | None) -> dict:
    return {"sm": sms, "graphs": {} if ptx is None else {"ptx": ptx}}


@pytest.mark.parametrize(
    ("sms", "ptx", "gpu", "expected"),
    [
        # made for it: its cubins, whatever else would run
        ([86, 90], [86], 86, "86 cubin"),
        ([86, 90], [86], 90, "90 cubin"),
        ([80, 86, 89], [80], 89, "89 cubin"),
        ([87], [87], 87, "87 cubin"),
        # machine code of a lower minor version, the highest; before PTX of any
        ([80], [80], 86, "80 cubin"),
        ([80, 86], [80], 89, "86 cubin"),
        ([80, 86, 90], [], 89, "86 cubin"),
        # Tegra gives and takes none
        ([80, 86], [80], 87, "80 ptx"),
        ([87], [87], 89, "87 ptx"),
        ([87], [], 89, None),
        ([80, 86], [], 87, None),
        ([80, 87], [80], 89, "80 cubin"),
        # PTX runs on its SM and later ones
        ([86], [86], 90, "86 ptx"),
        ([86, 90], [86], 100, "86 ptx"),
        ([86, 90], [86], 120, "86 ptx"),
        ([80, 86], [80], 120, "80 ptx"),
        ([86, 89], [86, 89], 120, "89 ptx"),
        ([89], [89], 86, None),
        ([89], [89], 80, None),
        # nothing that runs: too new without PTX, too old, wgmma's own
        ([86], [], 90, None),
        ([86], None, 90, None),
        ([90], [], 100, None),
        ([90], [], 120, None),
        ([100, 120], [100, 120], 90, None),
        ([80, 86, 89, 90], [80], 75, None),
        # a plan of before there was PTX
        ([80, 90], None, 86, "80 cubin"),
    ],
)
def test_the_best_program(sms, ptx, gpu, expected):
    best = best_first(programs_of(manifest(sms, ptx)), gpu, CUDA)
    assert (f"{best[0].sm} {best[0].image}" if best else None) == expected


def test_all_that_run_best_first():
    found = best_first(programs_of(manifest([80, 86, 89, 90], [80, 86])), 89, CUDA)
    assert found == [
        Program(89, "cubin"),
        Program(86, "cubin"),
        Program(80, "cubin"),
        Program(86, "ptx"),
        Program(80, "ptx"),
    ]


@pytest.mark.parametrize(
    ("cuda", "images"),
    [
        ((12, 0), {"cubin"}),
        ((12, 6), {"cubin"}),
        ((12, 9), {"cubin", "ptx"}),
        ((13, 0), {"cubin", "ptx"}),
        ((11, 8), set()),
    ],
)
def test_those_that_the_driver_loads(cuda, images):
    made = manifest([86], [86]) | {"graphs": {"ptx": [86], "nvrtc": "12.9"}}
    assert {each.image for each in best_first(programs_of(made), 86, Version(*cuda))} == images


def test_machine_code_goes_up_within_a_major_version():
    known = (80, 86, 87, 89, 90)
    runs = {(gpu, made_for) for gpu in known for made_for in known if runs_code_of(gpu, made_for)}
    assert runs == {(each, each) for each in known} | {(86, 80), (89, 80), (89, 86)}
    assert not runs_code_of(75, 70) and runs_code_of(75, 75)


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (Program(80, "cubin"), "SM 80, 86, 89"),
        (Program(86, "ptx"), "SM 86 and later"),
        (Program(87, "cubin"), "SM 87"),
        (Program(90, "cubin"), "SM 90"),
    ],
)
def test_which_gpus_run_it(program, says):
    assert program.runs_on_text == says


def test_shared_memory_is_that_of_the_largest_launch():
    launches = [{"shared": 5}, {"call": "cublaslt"}, {"shared": 70}]
    variants = [{"prefix": launches[:1], "step": []}, {"prefix": launches[1:], "step": launches[1:2]}]
    assert shared_bytes_of({"variants": variants}) == 70
    assert shared_bytes_of({"variants": [{"prefix": launches[1:2], "step": []}]}) == 0


@pytest.mark.parametrize(
    ("gpu", "shared", "sm"),
    [
        (90, 227 * KB, 90),
        (87, 163 * KB, 87),
        (75, 64 * KB, 75),
        (999, 227 * KB, 89),
        (999, 99 * KB, 89),
        (81, 163 * KB, 80),
    ],
)
def test_what_to_compile_for(gpu, shared, sm, monkeypatch):
    monkeypatch.setattr(programs, "GPUS", {sm: gpu_of(sm) for sm in (80, 86, 87, 89, 90)})
    assert sm_to_compile_for(gpu, shared) == sm
