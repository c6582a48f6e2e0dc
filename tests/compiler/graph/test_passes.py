"""Passes match as often as a policy's dimensions and packs say, and a pattern that is not there any more is an error."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import pytest
import torch
from rich.progress import Progress

from duq.compiler.errors import GraphError
from duq.compiler.graph.export import Graphs, export
from duq.compiler.graph.passes.fold import fold_output_scales
from duq.compiler.phases import Pass, Phase, check_order, passes_of, rewrite
from duq.compiler.pipeline import PHASES, quantize_checkpoint
from duq.compiler.quant import Quantization, load_recipe
from duq.compiler.targets.gpu import GPU_PHASES
from tests.support.quant_policy import observation, tiny_checkpoint

SILENT = Progress(disable=True)
EVERY_PASS = list(passes_of((*PHASES, *GPU_PHASES)))


@functools.cache
def checkpoint(policy: str, depth: int):
    """Of random weights in bfloat16."""
    found = tiny_checkpoint(pi05=policy == "pi05", depth=depth)
    found.finite = True
    return found


@functools.cache
def quantization(policy: str, depth: int, preset: str, settings: str = "{}") -> Quantization:
    recipe = load_recipe(preset, json.loads(settings), environment={})
    if preset == "none":
        return Quantization(recipe)
    source = checkpoint(policy, depth)
    return quantize_checkpoint(source, recipe, [observation(source.config, 0)], SILENT)


def exported(policy: str, depth: int, preset: str, dtype: torch.dtype = torch.bfloat16, **settings) -> Graphs:
    source, integers = checkpoint(policy, depth), quantization(policy, depth, preset, json.dumps(settings))
    weights = {name: weight.to(dtype) for name, weight in source.weights.items()} | integers.float_weights
    return export(source.config, weights, 2, integers.packs)


def copy(graphs: Graphs) -> Graphs:
    return replace(graphs, prefix=graphs.prefix.clone(), step=graphs.step.clone())


@pytest.mark.parametrize(
    ("preset", "dtype"),
    [
        *((preset, torch.bfloat16) for preset in ("none", "llm+expert-mlp", "all")),
        ("none", torch.float32),  # the token table is another, whatever is quantized
        *(pytest.param(preset, torch.float32, marks=pytest.mark.slow) for preset in ("llm+expert-mlp", "all")),
    ],
)
@pytest.mark.parametrize("depth", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("policy", ["pi0", "pi05"])
def test_passes_match_as_often_as_they_must(policy, depth, preset, dtype):
    rewrite(exported(policy, depth, preset, dtype), (*PHASES, *GPU_PHASES))


@pytest.mark.parametrize(
    "settings",
    [
        {"scheme": "duquant"},
        {"scheme": "duquant", "row_rotation": "restore"},
        {"activation_bits": 0},
        {"activation_scale": "per-tensor"},
        {"exclude": r"\.(k_proj|gate_proj)$"},
        {"layer_bits": {"v_proj": 8}},
    ],
    ids=str,
)
@pytest.mark.parametrize("policy", ["pi0", "pi05"])
def test_passes_match_in_other_recipes(policy, settings):
    """Also where linears that read one tensor are not all quantized, or not alike."""
    rewrite(exported(policy, 2, "all", **settings), (*PHASES, *GPU_PHASES))


@pytest.fixture(scope="module", params=["pi0", "pi05"])
def without_pattern(request):
    """Pass -> the graphs that it has been run on, so that what it looks for is in them no more."""
    graphs, found = exported(request.param, 2, "llm+expert-mlp"), {}
    for each in EVERY_PASS:
        each.run(graphs)
        if each.matches(graphs):
            found[each.name] = copy(graphs)
    return found


@pytest.mark.parametrize("each", EVERY_PASS, ids=lambda each: each.name)
def test_a_pass_that_does_not_match_is_an_error_with_its_name(each, without_pattern):
    if each.name not in without_pattern:
        pytest.skip("this policy has nothing for it")
    with pytest.raises(GraphError, match=f"^pass {each.name} .*(was PyTorch or compiler/model changed|never computes)"):
        each.run(copy(without_pattern[each.name]))


def test_the_error_says_what_was_expected_and_why():
    graphs = exported("pi0", 1, "none")
    for each in EVERY_PASS:
        if each.rewrite is fold_output_scales:
            break
        each.run(graphs)
    for node in graphs.step.graph:  # another exporter may divide instead
        if node.op_type == "Mul":
            node.op_type = "Div"
    with pytest.raises(GraphError) as error:
        each.run(graphs)
    assert "fold_output_scales" in str(error.value) and each.why in str(error.value)
    assert "matched 0 times instead of 1" in str(error.value) and "was PyTorch" in str(error.value)


def one_phase(*passes: Pass) -> tuple[Phase, ...]:
    return (Phase("all", passes),)


@pytest.mark.parametrize(
    ("need", "each"),
    [(need, each) for each in EVERY_PASS for need in each.needs],
    ids=lambda each: getattr(each, "name", getattr(each, "__name__", "")),
)
def test_an_order_against_the_needs_is_refused(need, each):
    before = [replace(other, needs=()) for other in EVERY_PASS if other.rewrite in each.needs]
    check_order(one_phase(*before, each))
    with pytest.raises(ValueError, match=f"pass {each.name} needs {need.__name__} before it"):
        check_order(one_phase(*(other for other in before if other.rewrite is not need), each))


def test_a_pass_comes_once():
    with pytest.raises(ValueError, match=f"pass {EVERY_PASS[0].name} comes twice"):
        check_order(one_phase(*EVERY_PASS, EVERY_PASS[0]))
