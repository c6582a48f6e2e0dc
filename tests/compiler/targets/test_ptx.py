"""PTX in cuda plans: what a plan carries, and that every kernel has it on every SM whose PTX later GPUs run."""

from __future__ import annotations

import json

import pytest
from rich.progress import Progress

from duq.compiler.checkpoint import load_checkpoint
from duq.compiler.pipeline import compile_policy
from duq.compiler.quant import Quantization, load_recipe
from duq.compiler.quant.recipe import DEFAULT_PRESET
from duq.compiler.targets.cuda import CudaOptions, cubins
from duq.plugins.gpu import gpu_of
from duq.plugins.kernel import Code
from duq.plugins.nvrtc import Cubin
from duq.runtime.inspect import main as inspect_main
from duq.runtime.plan import Plan

SILENT = Progress(disable=True)


def kernels_of(plan: Plan, sm: int) -> list[dict]:
    return json.loads(bytes(plan.read(f"schedule/sm{sm}.json")))["kernels"]


@pytest.mark.parametrize("policy", ["pi0", "pi05"])
@pytest.mark.parametrize("preset", ["none", DEFAULT_PRESET])
def test_the_lowest_program_has_ptx_beside_its_cubins(policy, preset, tiny_plans):
    plan = Plan(tiny_plans(policy, preset, "cuda").plan)
    assert plan.manifest["graphs"]["ptx"] == [86] and plan.manifest["sm"] == [86, 90]
    for each in kernels_of(plan, 86):
        assert each["ptx"] == each["cubin"].replace("cubin/sm86/", "ptx/sm86/")
        image = bytes(plan.read(each["ptx"]))
        assert b".target sm_86\n" in image and f".entry {each['symbol']}(".encode() in image and image.endswith(b"\0")
    assert not any("ptx" in each for each in kernels_of(plan, 90))
    carried = [name for name in plan.names if name.startswith("ptx/")]
    assert carried == [each["ptx"] for each in kernels_of(plan, 86)]


@pytest.mark.parametrize(
    ("sm", "every_instance"),  # 86 is in the plans
    [(sm, False) for sm in (80, 87, 89)] + [pytest.param(sm, True, marks=pytest.mark.slow) for sm in (80, 87, 89)],
)
def test_every_kernel_compiles_to_ptx(sm, every_instance, tiny_plans):
    codes, kernels = {}, set()
    for policy in ("pi0", "pi05"):
        for each in kernels_of(Plan(tiny_plans(policy, DEFAULT_PRESET, "cuda").plan), 86):
            source = each["cubin"].partition(".")[2] + ".cu"
            kernel = each["expression"].partition("<")[0]
            if every_instance or kernel not in kernels:
                codes[Code(source, each["expression"])] = each["symbol"]
            kernels.add(kernel)
    assert len(codes) > 20 if every_instance else len(codes) == len(kernels) > 5
    for code, ptx in cubins.compile_each(codes, gpu_of(sm), ptx=True):
        text = ptx.image.decode("ascii")
        assert f".target sm_{sm}\n" in text and f".entry {codes[code]}(" in text, code


@pytest.mark.parametrize(("sm", "ptx", "carried"), [((86,), False, []), ((90,), True, []), ((90, 89), True, [89])])
def test_what_a_plan_carries(sm, ptx, carried, tiny_plans, tmp_path, monkeypatch):
    """--no-ptx; an SM whose PTX runs nowhere else; the lowest, in whatever order they are given."""
    for name, image in (("compile_cubin", b"\x7fELF"), ("compile_ptx", b"PTX\0")):
        monkeypatch.setattr(cubins, name, lambda s, sm, kernels, h, image=image: Cubin(image, {k: "s" for k in kernels}))
    checkpoint, out = load_checkpoint(tiny_plans("pi0", "none").checkpoint), tmp_path / "engine.plan"
    options = CudaOptions(sm=sm, ptx=ptx, timing=False, num_steps=4, cameras=1)
    compile_policy(checkpoint, Quantization(load_recipe("none", environment={})), out, options, SILENT)
    plan = Plan(out)
    assert plan.manifest["graphs"]["ptx"] == carried and plan.manifest["sm"] == sorted(sm)
    folders = {name.rpartition("/")[0] for name in plan.names if name.startswith("ptx/")}
    assert folders == {f"ptx/sm{each}" for each in carried}
    for each in sm:
        assert all(("ptx" in kernel) == (each in carried) for kernel in kernels_of(plan, each))


def test_inspect_says_which_gpus_run_a_plan(tiny_plans, command_line):
    path = tiny_plans("pi0", DEFAULT_PRESET, "cuda").plan
    rows = [
        " ".join(line.replace("\u2502", " ").split()) for line in command_line(inspect_main, path, "--all").out.splitlines()
    ]
    assert any(row.startswith("SM 86 cubin SM 86, 89 ") for row in rows)
    assert any(row.startswith("SM 86 ptx SM 86 and later ") for row in rows)
    assert any(row.startswith("SM 90 cubin SM 90 ") for row in rows)
    found = json.loads(command_line(inspect_main, path, "--json").out)
    assert [(each["sm"], each["image"], each["runs_on"]) for each in found["programs"]] == [
        (86, "cubin", "SM 86, 89"), (86, "ptx", "SM 86 and later"), (90, "cubin", "SM 90"),
    ]  # fmt: skip
    assert all(0 < each["block_shared_bytes"] <= gpu_of(each["sm"]).block_shared_bytes for each in found["programs"])
    assert found["graphs"]["ptx"] == [86]


def test_inspect_of_other_targets_has_no_programs(tiny_plans, command_line):
    path = tiny_plans("pi0", "none").plan
    assert "programs" not in json.loads(command_line(inspect_main, path, "--json").out)
    assert "Programs" not in command_line(inspect_main, path, "--all").out
