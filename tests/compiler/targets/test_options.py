"""Each target has its own options; a plan's manifest says those it was made with, under the same keys."""

from __future__ import annotations

from dataclasses import fields

import pytest

from duq.compiler.checkpoint import load_checkpoint
from duq.compiler.cli import _target_options
from duq.compiler.errors import DuqError
from duq.compiler.pipeline import TARGETS
from duq.compiler.targets import Options
from duq.compiler.targets.cuda import CudaOptions
from duq.plugins.gpu import gpu_named
from duq.runtime.plan import Plan

COMMON = {"robot", "num_steps", "solver", "cameras", "settings", "float_images"}


def test_a_target_has_the_common_options_and_its_own():
    own = {name: {field.name for field in fields(target.options)} - COMMON for name, target in TARGETS.items()}
    assert own == {"cpu": set(), "cuda": {"sm", "gpu", "timing", "ptx"}, "tensorrt": {"sm", "gpu", "loop", "float_type"}}
    for name, target in TARGETS.items():
        assert target.name == target.options.target == name and COMMON <= {field.name for field in fields(target.options)}


def test_what_is_given_becomes_the_target_s_options():
    assert _target_options("cpu", None, timing=None, loop=None) == Options()
    assert _target_options("cuda", [90, 80, 90], timing=False, loop=None) == CudaOptions(sm=(80, 90), timing=False)
    assert _target_options("cuda", [90], ["rtx-4090"]) == CudaOptions(sm=(89, 90), gpu=("RTX 4090",))
    assert _target_options("cuda", None, ["gb10", "NVIDIA L40S"]) == CudaOptions(sm=(89, 121), gpu=("GB10", "L40S"))


def test_a_card_brings_its_sm(tiny_plans):
    checkpoint = load_checkpoint(tiny_plans("pi0", "none").checkpoint)
    options = CudaOptions(sm=(90,), gpu=("rtx3090",)).settled(checkpoint)
    assert options.sm == (86, 90) and options.cards == {86: gpu_named("RTX 3090")}


@pytest.mark.parametrize(
    ("target", "sm", "gpu", "says"),
    [
        ("cpu", None, ["a40"], "--gpu a40: --target cpu runs on no GPU; leave --gpu out"),
        ("cuda", None, ["rtx 9090"], "--gpu rtx 9090: unknown; known are A100, A40, RTX A6000, RTX 3090, Jetson AGX"),
        ("cuda", [90], ["a40", "rtx3090"], "--gpu A40 and RTX 3090: both are SM 86, and a plan has one schedule an SM; "
         "compile two plans"),
        ("tensorrt", [86], ["h100"], "--gpu H100: is SM 90, --target tensorrt compiles for 80, 86, 89"),
    ],
)  # fmt: skip
def test_a_card_that_cannot_be_is_refused(target, sm, gpu, says):
    with pytest.raises(DuqError) as error:
        _target_options(target, sm, gpu)
    assert str(error.value).startswith(says)


@pytest.mark.parametrize(
    ("sm", "ptx", "carried", "says"),
    [
        (
            (86, 90),
            True,
            (86,),
            "runs on SM 86, 90; on later GPUs from PTX of its program for SM 86, which the driver compiles",
        ),
        ((86, 89), True, (86,), "later GPUs from PTX of its program for SM 86,"),
        (
            (90, 80),
            True,
            (80,),
            "program for SM 80, which the driver compiles; add --sm 86 for those with less than 163 KB",
        ),
        (
            (89, 87, 86, 80),
            True,
            (80, 86),
            "later GPUs from PTX of its program for SM 80 and 86, which the driver compiles",
        ),
        ((90,), True, (), "runs on SM 90; carries no PTX, as that of sm_90a runs on no other GPU: add --sm 86"),
        ((86, 90), False, (), "runs on SM 86, 90; carries no PTX for later GPUs (--no-ptx)"),
    ],
)
def test_programs_carried_as_ptx(sm, ptx, carried, says):
    options = CudaOptions(sm=sm, ptx=ptx)
    assert options.ptx_sms == carried and says in options.coverage
    assert ("add --sm 86" in options.coverage) == (86 not in sm)


@pytest.mark.parametrize(
    ("target", "given", "says"),
    [
        ("cpu", {"float_type": "fp16"}, "--float-type fp16: is for --target tensorrt; leave it out for cpu"),
        ("cpu", {"timing": True}, "--timing: is for --target cuda; leave it out for cpu"),
        ("tensorrt", {"ptx": False}, "--no-ptx: is for --target cuda; leave it out for tensorrt"),
        ("tensorrt", {"timing": False}, "--no-timing: is for --target cuda; leave it out for tensorrt"),
        ("cuda", {"loop": "graph"}, "--loop graph: is for --target tensorrt; leave it out for cuda"),
    ],
)
def test_an_option_of_another_target_is_refused_by_name(target, given, says):
    with pytest.raises(DuqError) as error:
        _target_options(target, [86], **given)
    assert str(error.value) == says


def test_the_manifest_says_what_the_plan_was_made_for(tiny_plans):
    manifest = Plan(tiny_plans("pi0", "none").plan).manifest
    assert (manifest["target"], manifest["sm"], manifest["cameras"], manifest["num_steps"]) == ("cpu", [], 3, 4)
    assert manifest["robot"] == "libero" and manifest["float_images"] is False and "settings" not in manifest
