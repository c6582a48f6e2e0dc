"""Rotary frequencies, exact or rounded to bfloat16: model, export, engine and comparison follow the config."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from rich.progress import Progress

import duq.compiler.accuracy.compare
from duq.compiler.accuracy.compare import check_match, compare
from duq.compiler.checkpoint import load_checkpoint
from duq.compiler.model import build_model
from duq.compiler.model.gemma import rotary_embedding
from duq.compiler.pipeline import compile_policy
from duq.compiler.quant import Quantization, load_recipe
from duq.compiler.targets import Options
from duq.runtime import Policy
from duq.runtime.config import ModelConfig
from duq.runtime.errors import PlanError
from duq.runtime.plan import Plan
from duq.runtime.preprocess import Preprocessor
from tests.support.comparison import run_here, two_observations
from tests.support.quant_policy import tiny_checkpoint

FLOAT = load_recipe("none", environment={})


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounded to the nearest bfloat16, ties to even, by the bits of float32."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def frequencies(head_dim: int, precision: str) -> np.ndarray:
    exact = (10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
    return bfloat16(exact) if precision == "bfloat16" else exact


@pytest.mark.parametrize("head_dim", [16, 32, 256])
@pytest.mark.parametrize("precision", ["exact", "bfloat16"])
def test_angles_are_those_of_a_transformers_model_in_that_type(head_dim, precision):
    """model.to(bfloat16) rounds inv_freq and nothing else of the angles."""
    # Seconds, which every process of pytest-xdist would spend to collect.
    from transformers import GemmaConfig as PeerConfig
    from transformers.models.gemma.modeling_gemma import GemmaModel

    sizes = dict(vocab_size=8, hidden_size=32, num_hidden_layers=1, intermediate_size=16, num_attention_heads=1)
    peer = GemmaModel(PeerConfig(**sizes, num_key_value_heads=1, head_dim=head_dim))
    peer = peer.to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    positions = torch.tensor([[0, 1, 2, 47, 768, 1067]])
    for ours, theirs in zip(
        rotary_embedding(positions, head_dim, precision), peer.rotary_emb(torch.zeros(1), positions), strict=True
    ):
        # float32 gives frequencies to 1.2e-7, so angles of 1067 to 1.3e-4; bfloat16 has rounded that away
        tolerance = 0 if precision == "bfloat16" else 1.5e-4
        torch.testing.assert_close(ours[:, 0], theirs[..., : head_dim // 2], rtol=0, atol=tolerance)


def test_the_published_example():
    cos, _ = rotary_embedding(torch.tensor([[1]]), 256, "bfloat16")
    assert cos[0, 0, 0, 1] == np.cos(np.float32(0.9296875))
    cos, _ = rotary_embedding(torch.tensor([[1]]), 256)
    assert abs(float(cos[0, 0, 0, 1]) - np.cos(0.930572)) < 1e-6


def test_plans_from_before_are_exact_and_others_say_it():
    config = tiny_checkpoint().config
    old = config.to_json()
    del old["rotary"]
    assert ModelConfig.from_json(json.loads(json.dumps(old))) == config and config.rotary == "exact"
    rounded = replace(config, rotary="bfloat16")
    assert ModelConfig.from_json(rounded.to_json()) == rounded != config
    for wrong in ("float16", "", None, 1, "BFLOAT16"):
        with pytest.raises(PlanError, match="rotary is .*expected exact or bfloat16"):
            replace(config, rotary=wrong)


@pytest.fixture(scope="module")
def rounded(tiny_plans, tmp_path_factory):
    """A checkpoint with rounded frequencies, its float plan, and the directory of the graphs after each pass."""
    directory = tmp_path_factory.mktemp("rotary")
    checkpoint = load_checkpoint(tiny_plans("pi0", "none").checkpoint)
    checkpoint = replace(checkpoint, config=replace(checkpoint.config, rotary="bfloat16"))
    path, graphs = directory / "engine.plan", directory / "graphs"
    with Progress(disable=True) as progress:
        compile_policy(checkpoint, Quantization(FLOAT), path, Options(robot="libero", num_steps=4), progress, graphs)
    return checkpoint, path, graphs


def test_tables_of_both_graphs_hold_the_frequencies(rounded):
    """From the pass that makes them through all others to what the target gets."""
    checkpoint, _, graphs = rounded
    expected = frequencies(checkpoint.config.llm.head_dim, "bfloat16")
    found = 0
    for file in sorted(graphs.glob("*.onnx")):
        tables = _tables(file)
        assert bool(tables) == (file.name >= "06"), file  # the sixth pass makes them
        for key, table in tables.items():
            angles = (np.arange(len(table), dtype=np.float32)[:, None] * expected).astype(np.float64)
            np.testing.assert_allclose(table, (np.cos if "cos" in key else np.sin)(angles), rtol=0, atol=3e-6)
            found += 1
    assert found >= 4 * 10  # two graphs of ten phases, cosines and sines


def _tables(file) -> dict[str, np.ndarray]:
    values = ir.load(file).graph.initializers.items()
    return {name: value.const_value.numpy() for name, value in values if name.startswith("rotary.")}


def test_the_engine_is_the_reference_and_not_the_other_one(rounded):
    checkpoint, path, _ = rounded
    observation = two_observations(checkpoint.config)[0]
    noise = np.random.default_rng(0).standard_normal((8, 32), np.float32)
    inputs = Preprocessor(checkpoint.config).model_inputs(observation)
    arrays = vars(inputs) | {"images": inputs.pixels()}
    tensors = [torch.from_numpy(array)[None] for array in arrays.values()]
    exact = replace(checkpoint, config=replace(checkpoint.config, rotary="exact"))
    expected, other = (
        build_model(each).sample_actions(*tensors, torch.from_numpy(noise)[None], num_steps=4)[0].numpy()
        for each in (checkpoint, exact)
    )
    found = Policy(path, threads=1).infer(observation, noise)["actions"]
    assert np.abs(found - expected).max() < 1e-3
    assert np.abs(other - expected).max() > 20 * np.abs(found - expected).max()


def test_a_comparison_follows_the_plan(rounded, tiny_plans, monkeypatch):
    """Rotary precision is chosen when compiling: the reference takes the plan's, and the summary says it."""
    _, path, _ = rounded
    source = load_checkpoint(tiny_plans("pi0", "none").checkpoint)
    assert source.config.rotary == "bfloat16"  # by its origin
    source = replace(source, config=replace(source.config, rotary="exact"))
    check_match(source, Plan(path), any_checkpoint=False)
    monkeypatch.setattr(duq.compiler.accuracy.compare, "run_worker", run_here)
    with Progress(disable=True) as progress:
        summary = compare(source, Plan(path), two_observations(source.config)[:1], progress, threads=1).summary
    assert summary["plan"]["rotary"] == "bfloat16" and summary["stages"]["keys"]["sqnr_db"] > 90
    assert summary["stages"]["actions"]["sqnr_db"] > 90
