"""The cuda target with no GPU: its schedules, executed by tests/support/emulate.py, against the CPU engine's actions."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from rich.progress import Progress

from duq.compiler.checkpoint import load_checkpoint, synthetic
from duq.compiler.errors import GraphError
from duq.compiler.pipeline import compile_policy, quantize_checkpoint
from duq.compiler.quant import load_recipe
from duq.compiler.quant.recipe import DEFAULT_PRESET
from duq.compiler.targets import Options
from duq.compiler.targets.cuda import CudaOptions, cubins
from duq.compiler.targets.cuda.launches import ALIGNMENT
from duq.compiler.targets.fuse import check_covered
from duq.plugins.errors import DuqError
from duq.plugins.kernels import KERNELS
from duq.plugins.kernels.library import MATMUL
from duq.plugins.nvrtc import Cubin
from duq.runtime.config import GemmaConfig, ModelConfig, VisionConfig
from duq.runtime.executors.cpu import CpuExecutor
from duq.runtime.inspect import main as inspect_main
from duq.runtime.plan import Plan
from tests.support import emulate
from tests.support.inputs import cosine, make_inputs, make_noise, with_float_images
from tests.support.quant_policy import observation

POLICIES = ["pi0", "pi05"]
PRESETS = ["none", DEFAULT_PRESET]
ARCHITECTURES = [86, 90]
FULL = 0
CASES = {  # cameras and prompt tokens, of which a variant has 32, 64, ... or as many as the policy takes
    "1 camera, 1 token": ((True, False, False), 1),
    "2 cameras, full prompt": ((True, False, True), FULL),
    "3 cameras, 37 tokens": ((True, True, True), 37),
}
# Relative to the CPU engine's float32. bf16 alone costs 2^-9 = 0.2 % a rounding, of which a value here has a few behind
# it; and where it moves an activation past a tie, the INT8 that results differs by a step, 1 / 127 of the largest.
BOUNDS = {"image_features": 0.002, "none": 0.006, DEFAULT_PRESET: 0.015}
SILENT = Progress(disable=True)


def case(plan: Plan, name: str):
    config = ModelConfig.from_json(plan.manifest["model"])
    cameras, prompt = CASES[name]
    return make_inputs(config, cameras, prompt or config.max_prompt_tokens, seed=prompt), make_noise(config)


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("policy", POLICIES)
def test_schedules_compute_the_policy(policy, preset, sm, name, tiny_plans):
    plan = Plan(tiny_plans(policy, preset, "cuda").plan)
    inputs, noise = case(plan, name)
    expected, traced = {}, {}
    actions, _ = CpuExecutor(Plan(tiny_plans(policy, preset).plan), threads=1).run(inputs, noise, expected)
    assert cosine(emulate.run(plan, sm, inputs, noise, traced), actions) > 0.9999
    assert traced.keys() == expected.keys()
    for stage, value in traced.items():
        assert value.shape == expected[stage].shape
        assert relative_error(value, expected[stage]) < BOUNDS.get(stage, BOUNDS[preset]), stage


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_float_images(sm, name, tiny_plans):
    plan = Plan(tiny_plans("pi0", "none", "cuda", float_images=True).plan)
    inputs, noise = case(plan, name)
    inputs, expected, traced = with_float_images(inputs), {}, {}
    CpuExecutor(Plan(tiny_plans("pi0", "none").plan), threads=1).run(inputs, noise, expected)
    emulate.run(plan, sm, inputs, noise, traced)
    assert traced.keys() == expected.keys()
    for stage, value in traced.items():
        assert relative_error(value, expected[stage]) < BOUNDS.get(stage, BOUNDS["none"]), stage


def test_float_images_change_one_launch(tiny_plans):
    """Its kernel, and where everything lies behind images of four times the size."""
    kinds_of = []
    for float_images in (False, True):
        plan = Plan(tiny_plans("pi0", "none", "cuda", float_images).plan)
        schedule = json.loads(bytes(plan.read("schedule/sm90.json")))
        assert plan.manifest["float_images"] == float_images and schedule["pixel"] == (
            "float" if float_images else "unsigned char"
        )
        kinds_of.append([kernel["expression"] for kernel in schedule["kernels"]])
        for variant in schedule["variants"]:
            size = plan.manifest["model"]["vision"]["image_size"]
            assert variant["inputs"]["images"][1] == variant["cameras"] * size * size * 3 * (4 if float_images else 1)
    assert kinds_of[1] == [each.replace("patches", "float_patches") for each in kinds_of[0]] != kinds_of[0]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("policy", POLICIES)
def test_no_norm_of_a_step_is_a_launch(policy, preset, tiny_plans):
    """Whoever writes the residual stream leaves sums of squares, or the quantizer computes the norm."""
    schedule = json.loads(bytes(Plan(tiny_plans(policy, preset, "cuda").plan).read("schedule/sm90.json")))
    for variant in schedule["variants"]:
        assert not [launch["name"] for launch in variant["step"] if launch["name"] == "norm"]


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("policy", POLICIES)
def test_other_streams_may_run_at_any_time(policy, preset, sm, tiny_plans):
    """pi0's state token and the first step: all is the same as early as possible and as late as possible."""
    plan = Plan(tiny_plans(policy, preset, "cuda").plan)
    inputs, noise = case(plan, "1 camera, 1 token")
    early, late = {}, {}
    emulate.run(plan, sm, inputs, noise, early, order=emulate.others_first)
    emulate.run(plan, sm, inputs, noise, late, order=emulate.others_last)
    for stage, value in early.items():
        np.testing.assert_array_equal(value, late[stage], err_msg=stage)
    variant = json.loads(bytes(plan.read(f"schedule/sm{sm}.json")))["variants"][0]
    prefix, step = variant["prefix"], variant["step"]
    order = emulate.others_first(prefix, step)
    last_of_prefix = max(order.index(index) for index, launch in enumerate(prefix) if not launch.get("branch"))
    ran_before = sum(index >= len(prefix) for index in order[:last_of_prefix])
    assert ran_before > len(step) / 3  # tiny policies have few layers, and the last one's launches follow the prefix


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize("policy", POLICIES)
def test_padding_of_the_prompt_changes_nothing(policy, sm, tiny_plans):
    """It is NaN here. A larger variant sums in another order, no more."""
    plan = Plan(tiny_plans(policy, "none", "cuda").plan)
    inputs, noise = case(plan, "1 camera, 1 token")
    variants = json.loads(bytes(plan.read(f"schedule/sm{sm}.json")))["variants"]
    sizes = sorted({variant["prompt"] for variant in variants})
    assert len(sizes) > 1
    smallest, largest = (emulate.run(plan, sm, inputs, noise, prompt=size) for size in (sizes[0], sizes[-1]))
    assert relative_error(largest, smallest) < 1e-3


RECIPES = {
    "everything of the expert": {"include": r"^llm\.|^expert\."},
    "permuted, dense rotations": {"scheme": "duquant", "row_rotation": "0"},
    "output rotations": {"scheme": "duquant"},
    "output rotations of the whole expert": {"scheme": "duquant", "include": r"^expert\."},
    "everything": {"preset": "all"},
    "everything, output rotations": {"preset": "all", "scheme": "duquant"},
    "W4A16": {"activation_bits": 0, "include": r"^llm\.|^expert\."},
    "W4A16, everything": {"activation_bits": 0, "preset": "all"},
    "W8A8 per tensor": {"weight_bits": 8, "activation_scale": "per-tensor"},
}


@pytest.fixture
def compiled(tiny_plans, tmp_path, monkeypatch):
    """(policy or its checkpoint, settings of a recipe, targets) -> plans, without machine code: none is run here."""
    monkeypatch.setattr(
        cubins, "compile_cubin", lambda source, sm, kernels, headers: Cubin(b"", {each: each for each in kernels})
    )

    def compile(policy: str | Path, settings: dict, *targets: str) -> list:
        checkpoint = load_checkpoint(tiny_plans(policy, "none").checkpoint if isinstance(policy, str) else policy)
        inputs = [observation(checkpoint.config, seed, cameras=3 - seed) for seed in range(2)]
        settings = dict(settings)
        recipe = load_recipe(settings.pop("preset", None), settings, environment={})
        quantization = quantize_checkpoint(checkpoint, recipe, inputs, SILENT)
        for target in targets:
            common = dict(num_steps=4, cameras=1)
            options = CudaOptions(sm=tuple(ARCHITECTURES), ptx=False, **common) if target == "cuda" else Options(**common)
            compile_policy(checkpoint, quantization, tmp_path / f"{target}.plan", options, SILENT)
        return [Plan(tmp_path / f"{target}.plan") for target in targets]

    return compile


WITH_ADAPTIVE_NORMS = "everything of the expert", "everything, output rotations", "W4A16, everything"
# "everything of the expert" is test_widths_that_only_64_divides.
OF_PI0 = [each for each in RECIPES if each != "everything of the expert"]
QUICK = ("everything of the expert", "everything", "output rotations", "W8A8 per tensor")


@pytest.mark.parametrize(
    ("policy", "recipe"),
    [
        pytest.param(policy, each, marks=[] if each in QUICK else pytest.mark.slow)
        for policy, recipes in (("pi0", OF_PI0), ("pi05", WITH_ADAPTIVE_NORMS))
        for each in recipes
    ],
)
def test_other_recipes(policy, recipe, compiled):
    # With duquant's, as much as the CPU engine's own values move when pixels and noise do by 0.1 %.
    bound = 0.01 if RECIPES[recipe].get("activation_bits") == 0 else 0.03
    check_stages(*compiled(policy, RECIPES[recipe], "cpu", "cuda"), bound)


@pytest.mark.slow
@pytest.mark.parametrize(("horizon", "quant"), [(64, "llm+expert-mlp"), (100, "all")])
def test_more_actions_than_the_small_tiles_take(horizon, quant, compiled, tmp_path):
    """With the state token 65 rows; and masks of more elements than other constants have."""
    checkpoint = synthetic.make_checkpoint(tmp_path / "checkpoint", "tiny", robot="none", action_horizon=horizon)
    check_stages(*compiled(checkpoint, {"preset": quant}, "cpu", "cuda"), 0.03)


@pytest.mark.parametrize(("llm", "expert"), [(320, 192)])
def test_widths_that_only_64_divides(llm, expert, compiled, tmp_path, monkeypatch):
    heads = dict(depth=2, heads=2, kv_heads=1, head_dim=256)
    gemmas = (GemmaConfig(width=width, mlp_width=3 * width, **heads) for width in (llm, expert))
    vision = VisionConfig(width=72, depth=1, mlp_width=144, heads=1)
    monkeypatch.setitem(synthetic.VARIANTS, "narrow", (vision, *gemmas, 512))
    checkpoint = synthetic.make_checkpoint(tmp_path / "checkpoint", "narrow", robot="none", action_horizon=8)
    check_stages(*compiled(checkpoint, RECIPES["everything of the expert"], "cpu", "cuda"), 0.03)


def check_stages(on_cpu: Plan, on_gpu: Plan, bound: float) -> None:
    inputs, noise = case(on_gpu, "1 camera, 1 token")
    expected, traced = {}, {}
    CpuExecutor(on_cpu, threads=1).run(inputs, noise, expected)
    for sm in ARCHITECTURES:
        emulate.run(on_gpu, sm, inputs, noise, traced)
        for stage, value in traced.items():
            assert relative_error(value, expected[stage]) < bound, (sm, stage)


UNSUPPORTED = {
    "float activations, INT8 weights": ({"activation_bits": 0, "weight_bits": 8}, GraphError, "no kernel for W8A16Linear;"),
    "float activations, output rotations": (
        {"activation_bits": 0, "scheme": "duquant"},
        GraphError,
        "no kernel for W4A16Linear with an output rotation",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_has_no_kernel(name, compiled, tmp_path):
    settings, kind, words = UNSUPPORTED[name]
    with pytest.raises(DuqError) as error:
        compiled("pi0", settings, "cuda")
    assert type(error.value) is kind and words in str(error.value) and "\n" not in str(error.value)
    assert re.search(r"(llm|vision\.encoder)\.layers\.0\.", str(error.value)), error.value
    assert not list(tmp_path.iterdir())


def test_a_node_that_nothing_covers_is_named():
    node = ir.node("Tanh", [ir.Value(name="x")], outputs=[ir.Value(name="y")])
    with pytest.raises(GraphError, match="no kernel for onnx::Tanh, computing y"):
        check_covered(ir.Model(ir.Graph(node.inputs, node.outputs, nodes=[node]), ir_version=10), [])


@pytest.mark.parametrize("preset", PRESETS)
def test_the_plan_has_all_that_its_schedules_name(preset, tiny_plans):
    plan = Plan(tiny_plans("pi05", preset, "cuda").plan)
    for sm in ARCHITECTURES:
        schedule = json.loads(bytes(plan.read(f"schedule/sm{sm}.json")))
        launches = [each for variant in schedule["variants"] for part in ("prefix", "step") for each in variant[part]]
        end = 0
        for name, (offset, size) in schedule["weights"].items():  # one behind the other on the device
            assert offset % ALIGNMENT == 0 and offset >= end and len(plan.read(f"weights/{name}")) == size
            end = offset + size
        for kernel in schedule["kernels"]:
            assert kernel["symbol"].encode() in bytes(plan.read(kernel["cubin"]))
        named = {
            argument[1]
            for each in launches
            for argument in each["args"].values()
            if isinstance(argument, list) and argument[0] == "w"
        }
        assert named <= set(schedule["weights"])
        used = {each["kernel"] for each in launches if "kernel" in each}
        assert used == set(range(len(schedule["kernels"])))


@pytest.mark.parametrize(("preset", "float_images"), [*((preset, False) for preset in PRESETS), ("none", True)])
def test_arguments_are_those_of_the_kernels(preset, float_images, tiny_plans):
    """By name, in order, and of the kind of each parameter's type."""
    plan = Plan(tiny_plans("pi0", preset, "cuda", float_images).plan)
    checked = set()
    for sm in ARCHITECTURES:
        schedule = json.loads(bytes(plan.read(f"schedule/sm{sm}.json")))
        for launch in [*schedule["variants"][0]["prefix"], *schedule["variants"][0]["step"]]:
            if "call" in launch:
                name, parameters = MATMUL.name, schedule["calls"][launch["call"]]
            else:
                kernel = schedule["kernels"][launch["kernel"]]
                name, parameters = kernel["expression"].partition("<")[0], kernel["parameters"]
            assert list(KERNELS[name].parameters) == list(launch["args"]) == [each for each, _ in parameters]
            assert all(is_of(kind, launch["args"][each]) for each, kind in parameters), launch["name"]
            checked.add(name)
    assert {"float_patches" if float_images else "patches", "attention", "attention_split", "gemm_float"} <= checked


def is_of(kind: str, argument: list | int | None) -> bool:
    """Whether an argument of the schedule is one of a C++ type."""
    if kind.endswith("*"):
        return argument is None or (isinstance(argument, list) and argument[0] in ("a", "w"))
    return isinstance(argument, int) if kind == "int" else isinstance(argument, list) and argument[0] == "f"


@pytest.mark.parametrize(("sm", "overlaps"), [(86, False), (90, True)])
def test_launches_overlap_only_where_the_gpu_and_both_kernels_can(sm, overlaps, tiny_plans):
    plan = Plan(tiny_plans("pi0", DEFAULT_PRESET, "cuda").plan)
    schedule = json.loads(bytes(plan.read(f"schedule/sm{sm}.json")))
    launches = schedule["variants"][0]["step"]
    assert any("overlap" in each for each in launches) == overlaps
    assert not any("overlap" in each for each in launches if "call" in each)


@pytest.mark.parametrize("preset", PRESETS)
def test_caches_are_read_early_only_where_no_launch_writes_them(preset, tiny_plans):
    plan = Plan(tiny_plans("pi0", preset, "cuda").plan)
    schedule = json.loads(bytes(plan.read("schedule/sm90.json")))
    for program, early in (("prefix", 0), ("step", 1)):
        kernels = [
            (schedule["kernels"][each["kernel"]]["expression"], each)
            for each in schedule["variants"][0][program]
            if "kernel" in each
        ]
        attentions = [each for expression, each in kernels if expression.startswith("attention")]
        assert attentions and all(each["args"]["cache_ready"] == early for each in attentions)


def test_inspect_names_the_integer_kernels(tiny_plans, command_line):
    printed = command_line(inspect_main, tiny_plans("pi0", DEFAULT_PRESET, "cuda").plan, "--layers").out
    assert "schedule/sm86.json: 3 cameras, 48 prompt tokens" in printed and "schedule/sm90.json" in printed
    for linear in ("llm.layers.0.mlp.down_proj", "expert.layers.1.mlp.gate_proj+up_proj"):
        rows = [row for row in table_rows(printed) if row[1] == linear]
        assert rows and all(row[2].startswith("gemm_") and row[4] == "int4" for row in rows), rows


def table_rows(printed: str) -> list[list[str]]:
    """The cells of every row of the printed tables, whose long cells go over several lines."""
    rows: list[list[str]] = []
    for line in printed.splitlines():
        cells = [cell.strip() for cell in line.strip("\u2502").split("\u2502")]
        if len(cells) != 6:
            continue
        if cells[0]:
            rows.append(cells)
        elif rows:
            rows[-1] = [above + below for above, below in zip(rows[-1], cells, strict=True)]
    return rows
