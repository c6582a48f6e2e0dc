"""The schedules of every GPU that duq has a row for: that each keeps its limits, and what those without clusters compute."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from rich.progress import Progress

from duq.compiler.checkpoint.synthetic import make_config
from duq.compiler.pipeline import compile_policy
from duq.compiler.quant.recipe import DEFAULT_PRESET
from duq.compiler.targets import Options
from duq.compiler.targets.cuda import CudaOptions, StandInOptions, cubins, options_of_program
from duq.plugins.errors import KernelError
from duq.plugins.gpu import CARDS, GPUS, Gpu, gpu_of, stand_in
from duq.plugins.libraries import Version
from duq.plugins.nvrtc import Cubin, compile_cubin
from duq.runtime.executors.cpu import CpuExecutor
from duq.runtime.executors.programs import best_first, programs_of
from duq.runtime.plan import Plan
from tests.support import emulate
from tests.support.inputs import make_inputs, make_noise
from tests.support.lowering import check_limits, lowered, rewritten

SILENT = Progress(disable=True)
SETTINGS = {"num_steps": 4, "cameras": 1}
HERE = 90  # the GPU that the stand-ins run on
OTHERS = [sm for sm in GPUS if sm not in (86, 90)]  # test_cuda.py has those
STAND_INS = [stand_in(gpu_of(sm), HERE) for sm in GPUS if sm > HERE]
SIZES = {  # of the policy's dimensions, and cameras and prompt tokens: the tiny policy's of tests/conftest.py, and pi0's widths
    "tiny": (dict(variant="tiny", depth=2, vision_depth=1, action_horizon=8), [(1, 32), (3, 48)]),
    "full": (dict(variant="full", depth=2, vision_depth=1, vocab_size=512), [(1, 32), (3, 48)]),
}


@pytest.fixture(scope="module")
def graphs(trace_once):
    found = {}

    def of(size: str, quant: str, pi05: bool):
        key = size, quant, pi05
        if key not in found:
            config = replace(make_config(pi05=pi05, **SIZES[size][0]), rotary="bfloat16")
            found[key] = rewritten(config, quant, num_steps=4)
        return found[key]

    return of


@pytest.mark.parametrize("card", [*CARDS, *STAND_INS], ids=lambda card: card.name)
@pytest.mark.parametrize(
    ("size", "quant", "pi05"),
    [
        ("tiny", DEFAULT_PRESET, False),
        pytest.param("tiny", "none", True, marks=pytest.mark.slow),
        ("full", "all", False),
        pytest.param("full", DEFAULT_PRESET, True, marks=pytest.mark.slow),
        pytest.param("full", "none", False, marks=pytest.mark.slow),
    ],
)
def test_a_schedule_keeps_the_limits_of_its_gpu(size, quant, pi05, card, graphs):
    for cameras, prompt in SIZES[size][1]:
        program, streams = lowered(graphs(size, quant, pi05), card, cameras, prompt)
        check_limits(program.launches, streams, card)
        own = {each.instance.source for each in program.launches}
        assert ("attention_wgmma.cu" in own) == card.has_wgmma and bool(streams.overlaps) == card.has_pdl


@pytest.mark.parametrize("limit", ["block_shared_bytes", "has_clusters", "has_wgmma", "has_pdl"])
def test_a_schedule_beyond_the_limits_is_noticed(limit, graphs):
    """An H100's on a GPU that has all that it has but one thing."""
    program, streams = lowered(graphs("tiny", DEFAULT_PRESET, False), gpu_of(90), 3, 48)
    check_limits(program.launches, streams, gpu_of(90))
    less = replace(gpu_of(90), **{limit: getattr(gpu_of(86), limit)})
    with pytest.raises(AssertionError):
        check_limits(program.launches, streams, less)


@pytest.fixture(scope="module")
def uncompiled(quantized_pi0, tmp_path_factory):
    """(options) -> the policy's plan for them, without machine code."""
    directory = tmp_path_factory.mktemp("uncompiled")

    def compile(options: Options, name: str) -> Plan:
        with pytest.MonkeyPatch.context() as patch:
            for each in ("compile_cubin", "compile_ptx"):
                patch.setattr(cubins, each, lambda source, gpu, kernels, headers: Cubin(b"", {k: k for k in kernels}))
            compile_policy(*quantized_pi0, directory / name, options, SILENT)
        return Plan(directory / name)

    return compile


@pytest.fixture(scope="module")
def others(uncompiled) -> Plan:
    return uncompiled(CudaOptions(sm=tuple(OTHERS), timing=False, ptx=False, **SETTINGS), "others.plan")


@pytest.fixture(scope="module")
def expected(quantized_pi0, uncompiled):
    """Inputs, noise, and the CPU engine's stages for them."""
    inputs, noise = make_inputs(quantized_pi0[0].config, (True, False, False), 5), make_noise(quantized_pi0[0].config)
    stages: dict[str, np.ndarray] = {}
    CpuExecutor(uncompiled(Options(**SETTINGS), "cpu.plan"), threads=1).run(inputs, noise, stages)
    return inputs, noise, stages


@pytest.mark.parametrize("sm", OTHERS)
def test_every_schedule_computes_the_policy(sm, others, expected):
    inputs, noise, stages = expected
    found: dict[str, np.ndarray] = {}
    emulate.run(others, sm, inputs, noise, found)
    assert found.keys() == stages.keys()
    for name, value in found.items():
        assert np.linalg.norm(value - stages[name]) < 0.015 * np.linalg.norm(stages[name]), name  # test_cuda.py, BOUNDS


# Stand-ins


@pytest.mark.parametrize("sm", [sm for sm in GPUS if sm > HERE])
def test_a_stand_in_runs_the_schedule_of_its_gpu(sm, others, uncompiled):
    plan = uncompiled(options_of_program(sm, HERE, **SETTINGS), f"stand-in.{sm}.plan")
    assert plan.manifest["sm"] == [HERE] and plan.manifest["gpu"] == [gpu_of(sm).name]
    assert plan.manifest["graphs"][f"sm{HERE}"]["gpu"].startswith(f"SM {HERE} in place of {gpu_of(sm).name}, ")
    found, own = (json.loads(bytes(each.read(f"schedule/sm{of}.json"))) for each, of in ((plan, HERE), (others, sm)))
    for kernel in found["kernels"]:
        kernel["cubin"] = kernel["cubin"].replace(f"/sm{HERE}/", f"/sm{sm}/")
    places = [
        schedule.pop("weights") for schedule in (found, own)
    ]  # of the plan, which has the weights of other programs too
    assert found == own and set(places[0]) <= set(places[1])


def test_a_program_is_stood_in_for_only_where_it_cannot_run():
    for sm in (80, 86, 87, 89):
        assert options_of_program(sm, HERE) == CudaOptions(sm=(sm,))
    assert options_of_program(HERE, HERE) == CudaOptions(sm=(HERE,))
    assert options_of_program(86, 89) == CudaOptions(sm=(86,))  # machine code
    assert options_of_program(120, HERE) == StandInOptions(sm=(HERE,), gpu=("RTX 5090",))
    assert options_of_program(86, 80) == StandInOptions(sm=(80,), gpu=("A40",))


@pytest.mark.parametrize("sm", [sm for sm in GPUS if sm > HERE])
def test_a_plan_for_a_later_gpu_still_does_not_run_here(sm):
    """Neither its machine code nor its PTX: a stand-in is another plan, for this GPU."""
    programs = programs_of({"sm": [sm], "graphs": {"ptx": [sm]}})
    assert best_first(programs, HERE, Version(13, 0)) == [] and len(best_first(programs, sm, Version(13, 0))) == 2


@pytest.mark.parametrize(
    ("sm", "here", "lacks"),
    [
        (90, 120, "wgmma, clusters, programmatic launch, 227 KB of shared memory a thread block"),
        (90, 100, "wgmma, clusters, programmatic launch"),
        (87, 86, "163 KB of shared memory a thread block"),
    ],
)
def test_a_gpu_that_has_less_stands_in_for_none(sm, here, lacks):
    with pytest.raises(KernelError) as error:
        stand_in(gpu_of(sm), here)
    assert str(error.value) == f"SM {here} cannot stand in for {gpu_of(sm).name} (SM {sm}): it lacks {lacks}"
    with pytest.raises(KernelError):
        StandInOptions(sm=(here,), gpu=(gpu_of(sm).name,))


@pytest.mark.parametrize(
    ("gpu", "says"),
    [
        (gpu_of(90), "CLUSTER && !defined(NO_PDL) && defined(__CUDA_ARCH_FEAT_SM90_ALL)"),
        (stand_in(gpu_of(120), 90), "!defined(CLUSTER) && defined(NO_PDL) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)"),
        (stand_in(gpu_of(90), 90), "CLUSTER && !defined(NO_PDL) && defined(__CUDA_ARCH_FEAT_SM90_ALL)"),
    ],
    ids=lambda value: value.name if isinstance(value, Gpu) else None,
)
def test_code_of_a_stand_in_has_the_features_of_its_gpu_alone(gpu, says, tmp_path):
    (tmp_path / "probe.cu").write_text(
        f'#include "common.cuh"\n#if defined(__CUDA_ARCH__) && !(__CUDA_ARCH__ == 900 && {says})\n#error does not hold\n#endif\n'
        "__global__ void nothing() {}"
    )
    assert compile_cubin(str(tmp_path / "probe.cu"), gpu, ["nothing"], cache=tmp_path).image.startswith(b"\x7fELF")
