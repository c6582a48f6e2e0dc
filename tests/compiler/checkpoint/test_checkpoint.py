"""Checkpoints: both layouts read back what was stored, dimensions come from tensors, bad input is named."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from duq.compiler.checkpoint import check_finite, load_checkpoint
from duq.compiler.checkpoint.names import canonical_name, openpi_name
from duq.compiler.checkpoint.shapes import expected_shapes, infer_config
from duq.compiler.checkpoint.synthetic import make_checkpoint, make_config
from duq.compiler.errors import CheckpointError
from duq.runtime.config import GemmaConfig, ModelConfig, VisionConfig

LLM = "paligemma_with_expert.paligemma.model.language_model."
HEAD = "paligemma_with_expert.paligemma.lm_head.weight"
EXPERT_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"
DOWN = LLM + "layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="session")
def lerobot_pi05(tmp_path_factory):
    out = tmp_path_factory.mktemp("checkpoints") / "lerobot"
    return make_checkpoint(out, pi05=True, layout="lerobot", robot="libero", action_horizon=10)


@pytest.fixture
def edit(tmp_path):
    """edit(source, tensors=f, config=g): a copy of a checkpoint whose tensors and config.json went through f and g."""

    def run(source, tensors=None, config=None):
        copy = tmp_path / "copy"
        shutil.copytree(source, copy)
        if tensors:
            weights = load_file(copy / "model.safetensors")
            tensors(weights)
            save_file(weights, copy / "model.safetensors")
        if config:
            data = json.loads((copy / "config.json").read_text())
            config(data)
            (copy / "config.json").write_text(json.dumps(data))
        return copy

    return run


def rounded(config):
    """As PyTorch's bfloat16 trains it, in which these checkpoints are stored."""
    return replace(config, rotary="bfloat16")


def fails(path, *patterns, **arguments):
    """Loading `path` raises one CheckpointError whose message matches every pattern."""
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path, **arguments)
    for pattern in patterns:
        assert re.search(pattern, str(error.value)), f"{pattern!r} not in:\n{error.value}"


# --- round trips


@pytest.mark.parametrize("name", ["tiny_pi0", "tiny_pi05", "lerobot_pi05"])
def test_every_tensor_comes_back(request, name):
    path = request.getfixturevalue(name)
    prefix = "model." if name.startswith("lerobot") else ""
    stored = load_file(path / "model.safetensors")
    checkpoint = load_checkpoint(path)
    assert checkpoint.layout == ("lerobot" if prefix else "openpi")
    assert len(checkpoint.weights) == len(stored)
    for canonical, tensor in checkpoint.weights.items():
        original = HEAD if canonical == "llm.embed_tokens.weight" else openpi_name(canonical)
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, stored[prefix + original])
    assert checkpoint.tokenizer == path / "tokenizer.model"


def test_dimensions_and_settings(tiny_pi0, tiny_pi05, lerobot_pi05):
    assert load_checkpoint(tiny_pi0).config == rounded(make_config("tiny"))
    assert load_checkpoint(tiny_pi05).config == rounded(make_config("tiny", pi05=True))
    assert load_checkpoint(lerobot_pi05).config == rounded(make_config("tiny", pi05=True, action_horizon=10))
    assert load_checkpoint(tiny_pi0).config.max_prompt_tokens == 48
    assert load_checkpoint(tiny_pi05).config.max_prompt_tokens == 200


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mappings")
def test_weights_are_mapped_not_copied(tiny_pi0):
    weights = load_checkpoint(tiny_pi0).weights
    lines = Path("/proc/self/maps").read_text().splitlines()
    file = str(tiny_pi0 / "model.safetensors")
    mapped = [range(*(int(end, 16) for end in line.split()[0].split("-"))) for line in lines if line.endswith(file)]
    assert all(any(tensor.data_ptr() in part for part in mapped) for tensor in weights.values())


def test_stored_dtypes_are_kept(tiny_pi0, edit):
    norm = LLM + "layers.0.input_layernorm.weight"
    path = edit(tiny_pi0, tensors=lambda weights: weights.update({norm: weights[norm].float()}))
    weights = load_checkpoint(path).weights
    assert weights["llm.layers.0.input_layernorm.weight"].dtype == torch.float32
    assert weights["llm.layers.1.input_layernorm.weight"].dtype == torch.bfloat16


def test_shards(tiny_pi0, edit):
    path = edit(tiny_pi0)
    weights = load_file(path / "model.safetensors")
    names = sorted(weights)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: weights[name] for name in part}, path / file)
    (path / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    whole, sharded = load_checkpoint(tiny_pi0), load_checkpoint(path)
    assert sharded.weights.keys() == whole.weights.keys()
    assert all(torch.equal(tensor, whole.weights[name]) for name, tensor in sharded.weights.items())
    (path / "model-00002-of-00002.safetensors").unlink()
    fails(path, r"model-00002-of-00002\.safetensors \(missing\)")


def test_fingerprint_follows_the_weights(tiny_pi0, tiny_pi05, edit):
    same = edit(tiny_pi0, config=lambda data: data.update(note="moved"))
    assert load_checkpoint(same).fingerprint == load_checkpoint(tiny_pi0).fingerprint
    assert load_checkpoint(tiny_pi05).fingerprint != load_checkpoint(tiny_pi0).fingerprint


@pytest.mark.parametrize("kept", ["head", "embedding", "both"])
def test_tied_head(tiny_pi0, edit, kept):
    def tensors(weights):
        head = weights[HEAD]
        if kept != "head":
            weights[LLM + "embed_tokens.weight"] = head.clone()
        if kept == "embedding":
            del weights[HEAD]
        weights[EXPERT_HEAD] = torch.zeros(512, 256, dtype=torch.bfloat16)  # in every real checkpoint, never used

    weights = load_checkpoint(edit(tiny_pi0, tensors)).weights
    assert weights.keys() == load_checkpoint(tiny_pi0).weights.keys()
    assert torch.equal(weights["llm.embed_tokens.weight"], load_file(tiny_pi0 / "model.safetensors")[HEAD])


# --- names and dimensions


@pytest.mark.parametrize("pi05", [False, True])
def test_names_are_one_to_one(pi05):
    names = list(expected_shapes(make_config("tiny", pi05)))
    long = [openpi_name(name) for name in names]
    assert len(set(long)) == len(names)
    assert [canonical_name(name) for name in long] == names
    assert LLM + "layers.0.self_attn.q_proj.weight" in long
    assert "paligemma_with_expert.gemma_expert.model.norm." + ("dense.weight" if pi05 else "weight") in long


@st.composite
def configs(draw):
    head_dim = draw(st.sampled_from([16, 64, 256]))
    kv_heads = draw(st.integers(1, 3)) if head_dim == 256 else 1
    depth, patch, pi05 = draw(st.integers(1, 12)), draw(st.sampled_from([14, 16])), draw(st.booleans())

    def gemma():
        width, mlp_width = draw(st.integers(1, 40)) * 8, draw(st.integers(1, 300))
        return GemmaConfig(width, depth, mlp_width, draw(st.integers(1, 9)), kv_heads, head_dim)

    heads = draw(st.integers(1, 16))
    vision = VisionConfig(72 * heads, draw(st.integers(1, 12)), draw(st.integers(1, 300)), heads, 16 * patch, patch)
    return ModelConfig(pi05, vision, gemma(), gemma(), draw(st.integers(1, 5000)), draw(st.integers(1, 64)), 50, 48)


@settings(max_examples=50, deadline=None)
@given(configs())
def test_dimensions_are_inferred_from_shapes(config):
    assert infer_config(expected_shapes(config), None, 50, 48) == config


@pytest.mark.parametrize("cut", [{"depth": 2}, {"vision_depth": 1}, {"vocab_size": 448}])
def test_cut_checkpoints(tmp_path, cut):
    path = make_checkpoint(tmp_path / "cut", **cut)
    assert load_checkpoint(path).config == rounded(make_config("tiny", **cut))


def test_openpi_dummy_has_heads_of_16(tmp_path):
    path = make_checkpoint(tmp_path / "dummy", variant="dummy", vision_depth=1, vocab_size=512)
    config = load_checkpoint(path).config
    assert (config.llm.heads, config.llm.kv_heads, config.llm.head_dim) == (8, 1, 16)
    assert (config.vision.heads, config.vision.image_size) == (16, 224)


def test_vision_heads_need_config_when_width_is_no_multiple_of_72():
    config = make_config("tiny")
    shapes = expected_shapes(replace(config, vision=replace(config.vision, width=128, heads=4)))
    assert infer_config(shapes, 4, 50, 48).vision.heads == 4
    with pytest.raises(CheckpointError, match='width 128 cannot be inferred.*"heads": N'):
        infer_config(shapes, None, 50, 48)
    with pytest.raises(CheckpointError, match="does not divide"):
        infer_config(shapes, 5, 50, 48)


# --- tensors that do not fit


def test_missing_extra_and_mis_shaped_tensors_are_all_listed(tiny_pi0, edit):
    def tensors(weights):
        del weights[LLM + "layers.2.self_attn.v_proj.weight"]
        weights[DOWN] = weights[DOWN][:, :-8].clone()
        weights["lora_A.weight"] = torch.zeros(2, 3)

    fails(
        edit(tiny_pi0, tensors),
        "3 tensors do not fit",
        r"missing +llm\.layers\.2\.self_attn\.v_proj\.weight \[256, 512\]",
        r"mis-shaped llm\.layers\.1\.mlp\.down_proj\.weight is \[512, 4088\], expected \[512, 4096\]",
        r"extra +lora_A\.weight \[2, 3\]",
    )


def test_one_bad_layer_does_not_blame_the_others(tiny_pi0, edit):
    def tensors(weights):  # layer 0 and a tensor from which the MLP width is read
        name = LLM + "layers.0.mlp.gate_proj.weight"
        weights[name] = weights[name][:-8].clone()

    fails(edit(tiny_pi0, tensors), r"1 tensors do not fit.*\n.*layers\.0\.mlp\.gate_proj.*4088.*4096")


def test_long_lists_are_cut(tiny_pi0, edit):
    fails(edit(tiny_pi0, lambda weights: weights.update({f"x{i}": torch.zeros(1) for i in range(50)})), "and 30 more")


@pytest.mark.parametrize(
    "tensors, message",
    [
        (
            lambda w: [w.pop(n) for n in list(w) if n.startswith(("state_proj", "action_time"))],
            "cannot tell pi0 from pi0.5",
        ),
        (lambda w: w.update({"time_mlp_in.weight": torch.zeros(2)}), "cannot tell .* action_time_mlp_in.*time_mlp_in"),
        (lambda w: w.pop(HEAD), r"no tensor llm\.embed_tokens\.weight"),
        (lambda w: [w.pop(n) for n in list(w) if n.startswith(LLM + "layers.2.")], "depth 2 but the action expert 3"),
        (lambda w: w.update({DOWN: w[DOWN].to(torch.int8)}), r"llm\.layers\.1\.mlp\.down_proj\.weight is torch\.int8"),
        (lambda w: w.clear() or w.update(a=torch.zeros(1)), "cannot tell pi0 from pi0.5.*none of them"),
    ],
)
def test_tensors_of_no_policy(tiny_pi0, edit, tensors, message):
    fails(edit(tiny_pi0, tensors), message)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tiny_pi0, edit, value):
    def tensors(weights):
        weights[DOWN][3, 5:7] = value

    seen = []
    with pytest.raises(CheckpointError, match=r"1 tensors.*\n *llm\.layers\.1\.mlp\.down_proj\.weight: 2 of 2097152"):
        check_finite(load_checkpoint(edit(tiny_pi0, tensors)).weights, lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] and len(seen) == len(expected_shapes(make_config("tiny")))
    check_finite(load_checkpoint(tiny_pi0).weights)


# --- directories and files


def test_not_a_checkpoint(tmp_path, tiny_pi0):
    fails(tmp_path / "nowhere", "nowhere does not exist")
    fails(tiny_pi0 / "model.safetensors", "is a file.*directory")
    fails(tmp_path, "not a checkpoint.*no model.safetensors")
    (tmp_path / "params").mkdir()
    fails(tmp_path, "params has no _METADATA.*download it again")


@pytest.mark.parametrize("size", [0, 5, 1000, 1_000_000, -1])
def test_truncated_safetensors(tiny_pi0, edit, size):
    path = edit(tiny_pi0)
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:size])
    fails(path, r"model\.safetensors \([\d,]+ bytes\) is cut short or damaged")


def test_two_tokenizers(tiny_pi0, edit):
    path = edit(tiny_pi0)
    shutil.copy(path / "tokenizer.model", path / "other.model")
    fails(path, "several tokenizers: other.model, tokenizer.model")
    (path / "other.model").unlink()
    (path / "tokenizer.model").unlink()
    assert load_checkpoint(path).tokenizer is None


# --- config.json


def test_config_json_is_optional(tiny_pi0, edit):
    path = edit(tiny_pi0)
    (path / "config.json").unlink()
    assert load_checkpoint(path).config == rounded(make_config("tiny"))  # action horizon 50


def test_contradictions_are_all_listed(tiny_pi0, edit):
    def config(data):
        data["action_dim"] = 24
        data["vision"]["width"] = 72
        data["paligemma_variant"] = "gemma_2b"

    fails(
        edit(tiny_pi0, config=config),
        "action_dim: action_dim 24, but the tensors have 32",
        "vision.width: vision.width 72, but the tensors have 144",
        "paligemma_variant gemma_2b: llm.width 2048, but the tensors have 512",
        "paligemma_variant gemma_2b: llm.mlp_width 16384, but the tensors have 4096",
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"action_horizon": 0}, '"action_horizon" is 0, expected a whole number from 1 to 1,000'),
        ({"action_horizon": "50"}, "is '50', expected a whole number"),
        ({"action_expert_variant": "gemma_9b"}, '"gemma_9b", known are dummy, gemma_2b, gemma_300m'),
        ({"precision": "float32"}, r"precision.*float32, but.*torch\.bfloat16"),
        ({"precision": "int4"}, "'int4', known are"),
        ({"pi05": True}, "pi05 True, but the tensors have False"),
        ({"vision": 3}, '"vision" must be an object'),
        ({"type": "smolvla"}, "'smolvla'; only pi0 and pi05"),
    ],
)
def test_config_json_that_is_wrong(tiny_pi0, edit, change, message):
    fails(edit(tiny_pi0, config=lambda data: data.update(change)), message)


def test_config_json_that_is_no_json(tiny_pi0, edit):
    path = edit(tiny_pi0)
    (path / "config.json").write_text("{")
    fails(path, r"config\.json: cannot be read as JSON")
    (path / "config.json").write_text("[]")
    fails(path, r"config\.json: must hold a JSON object")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"type": "pi0"}, "type pi0: pi05 False, but the tensors have True"),
        ({"max_action_dim": 16}, "max_action_dim: action_dim 16"),
        ({"image_resolution": [224, 336]}, "vision.image_size 336, but the tensors have 224"),
        ({"adapt_to_pi_aloha": True}, '"adapt_to_pi_aloha" is True .only False can be compiled'),
    ],
)
def test_lerobot_config_that_is_wrong(lerobot_pi05, edit, change, message):
    fails(edit(lerobot_pi05, config=lambda data: data.update(change)), message)


# --- normalization statistics


def test_openpi_statistics(tiny_pi0, edit):
    file = tiny_pi0 / "assets" / "trossen" / "norm_stats.json"
    stored = json.loads(file.read_text())["norm_stats"]
    assert load_checkpoint(tiny_pi0).norm_stats == {"epsilon": 1e-6, **stored}
    assert len(stored["state"]["mean"]) == len(stored["actions"]["q99"]) == 14

    path = edit(tiny_pi0)
    other = path / "assets" / "physical-intelligence" / "libero"
    shutil.copytree(path / "assets" / "trossen", other)
    stored["state"]["q01"] = stored["state"]["q99"] = None
    (other / "norm_stats.json").write_text(json.dumps({"norm_stats": stored}))
    fails(path, "several robots.*physical-intelligence/libero, trossen")
    assert load_checkpoint(path, asset_id="physical-intelligence/libero").norm_stats["state"]["q01"] is None
    fails(path, 'asset id "droid"; found: physical-intelligence/libero, trossen', asset_id="droid")
    shutil.rmtree(path / "assets")
    assert load_checkpoint(path).norm_stats is None


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda stats: stats.pop("actions"), '"actions" needs "mean" and "std"'),
        (lambda stats: stats["state"].update(mean=[0.0, float("nan")]), "state.mean must be a list of finite numbers"),
        (lambda stats: stats["state"]["std"].pop(), "statistics of state differ in length"),
    ],
)
def test_openpi_statistics_that_are_wrong(tiny_pi0, edit, change, message):
    path = edit(tiny_pi0)
    file = path / "assets" / "trossen" / "norm_stats.json"
    data = json.loads(file.read_text())
    change(data["norm_stats"])
    file.write_text(json.dumps(data))
    fails(path, message)
