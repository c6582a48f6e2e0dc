"""Whole policies on the GPU, stage by stage, against the CPU engine on the same INT8 activations."""

from __future__ import annotations

from pathlib import Path

import pytest

from duq.compiler.accuracy.metrics import difference
from duq.runtime.config import ModelConfig
from duq.runtime.plan import Plan
from tests.gpu.test_whole_policy import make_inputs, policy
from tests.support.recording import Recording
from tests.support.same_integers import run_given


@pytest.mark.parametrize("quant", ["llm+expert-mlp", "all"])
@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_stages_of_the_same_integers(name, quant, directory):
    check_stages(*policy(name, quant, directory))


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_stages_of_the_program_of_another_gpu(name, program, directory):
    check_stages(*policy(name, "llm+expert-mlp", directory, program=program))


def check_stages(config: ModelConfig, plans: dict[str, Path]) -> None:
    inputs, noise = make_inputs(config, 2, 33)  # two images, and a prompt that is padded
    found, runs = Recording(Plan(plans["cuda"])).record(inputs, noise)
    expected, roundings = run_given(plans["cpu"], *runs, inputs, noise)
    cosines = {f"{stage}": difference(expected[stage], found[stage]).cosine for stage in expected}
    assert min(cosines.values()) >= 0.9999, cosines
    assert 0 < roundings.count and roundings.farthest <= 2 and roundings.different < 0.1 * roundings.count, roundings
