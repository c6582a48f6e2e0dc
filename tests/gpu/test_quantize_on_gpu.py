"""The quantizer on the GPU against itself on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rich.progress import Progress

from duq.compiler.accuracy.synthetic import synthetic_observations
from duq.compiler.checkpoint import load_checkpoint
from duq.compiler.checkpoint.synthetic import make_checkpoint
from duq.compiler.pipeline import quantize_checkpoint
from duq.compiler.quant import load_recipe
from duq.runtime.preprocess import Preprocessor

SETTINGS = [{}, {"scheme": "duquant"}, {"compensate": True, "activation_scale": "per-tensor"}]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    checkpoint = load_checkpoint(make_checkpoint(tmp_path_factory.mktemp("policy") / "tiny", depth=2, vision_depth=2))
    preprocessor = Preprocessor(checkpoint.config)
    return checkpoint, [
        preprocessor.model_inputs(each) for each in synthetic_observations(checkpoint.config, cameras=2, count=2)
    ]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_quantizes_as_on_the_cpu(policy, settings):
    """Sums are rounded otherwise, so that some weights fall on the other side of a tie, and permutations may differ."""
    recipe = load_recipe("llm+expert-mlp", settings, environment={})
    checkpoint, inputs = policy
    on_cpu, on_gpu = (
        quantize_checkpoint(checkpoint, recipe, inputs, Progress(disable=True), device=device) for device in ("cpu", "cuda")
    )
    assert on_gpu.packs.keys() == on_cpu.packs.keys() and on_gpu.float_weights.keys() == on_cpu.float_weights.keys()
    for name, pack in on_gpu.packs.items():
        assert abs(pack.sqnr_db - on_cpu.packs[name].sqnr_db) < 1, name
        if not settings:
            assert np.mean(pack.weight() == on_cpu.packs[name].weight()) > 0.99, name
    assert all(tensor.device.type == "cpu" for tensor in on_gpu.float_weights.values())
    assert torch.backends.cudnn.allow_tf32  # PyTorch's own default, back in place
