"""Which output projections are computed with their attention; what such schedules compute is in test_cuda.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from duq.compiler.checkpoint.synthetic import make_config
from duq.compiler.quant.recipe import DEFAULT_PRESET
from duq.compiler.targets.cuda.launches import Launch
from duq.plugins.gpu import gpu_of
from tests.support.lowering import lowered, rewritten

SIZES = dict(depth=2, vision_depth=1)


@pytest.fixture(scope="module")
def launches(trace_once):
    """(preset, settings of the policy, SM) -> the launches of prefix and step."""
    graphs = {}

    def of(quant: str, sm: int = 90, **settings) -> tuple[list[Launch], list[Launch]]:
        key = quant, *settings.items()
        if key not in graphs:
            config = make_config(**{"variant": "tiny", "action_horizon": 8, **SIZES, **settings})
            graphs[key] = rewritten(replace(config, rotary="bfloat16"), quant)
        program, _ = lowered(graphs[key], gpu_of(sm), 1, 32)
        return program.prefix, program.step

    return of


def kernels_of(launches: list[Launch]) -> list[str]:
    return [each.instance.kernel.name for each in launches]


@pytest.mark.parametrize("pi05", [False, True])
def test_by_default_a_layer_of_a_step_is_six_launches(pi05, launches):
    _, step = launches(DEFAULT_PRESET, pi05=pi05)
    names = [each.name for each in step if each.name.startswith("expert.layers.0.")]
    of_layer = (
        "q_proj+k_proj+v_proj",
        "attention+o_proj",
        "gate_proj+up_proj (quantize)",
        "gate_proj+up_proj",
        "down_proj (quantize)",
    )
    assert [name.split(".", 4)[-1] for name in names] == [*of_layer, "down_proj"]
    for layer in range(SIZES["depth"]):
        (attention,) = [each for each in step if each.name == f"expert.layers.{layer}.self_attn.attention+o_proj"]
        (quantize,) = [each for each in step if each.name == f"expert.layers.{layer}.mlp.gate_proj+up_proj (quantize)"]
        (down,) = [each for each in step if each.name == f"expert.layers.{layer}.mlp.down_proj"]
        assert quantize.arguments["parts"] == attention.arguments["out"] and attention.writes[0] in quantize.reads
        assert down.arguments["residual"] == quantize.arguments["y"] and quantize.writes[0] in down.reads
        assert quantize.arguments["x"] not in (None, quantize.arguments["y"])
        assert (quantize.arguments["gate"] is not None) == pi05 == (quantize.arguments["shift"] is not None)


def test_the_state_token_runs_as_before(launches):
    prefix, _ = launches(DEFAULT_PRESET)
    names = [each.name for each in prefix if each.branch]
    assert "expert.layers.0.self_attn.attention" in names and "expert.layers.0.self_attn.o_proj" in names
    assert "residual_quantize" not in kernels_of(prefix)


@pytest.mark.parametrize("quant", ["llm", "all", "none"])
def test_projections_that_are_quantized_or_that_a_norm_reads_are_launches(quant, launches):
    _, step = launches(quant)
    assert "residual_quantize" not in kernels_of(step)
    assert [each.name for each in step if each.name.endswith("o_proj") and "attention" not in each.name]


@pytest.mark.parametrize("sm", [80, 86, 100])
def test_gpus_without_wgmma_run_as_before(sm, launches):
    _, step = launches(DEFAULT_PRESET, sm)
    assert "residual_quantize" not in kernels_of(step)
    assert "expert.layers.0.self_attn.o_proj" in [each.name for each in step]
