"""Forms of checkpoints other than the plain ones: names of every generation, adapters, places, other folders."""

from __future__ import annotations

import enum
import itertools
import json
import math
import os
import pathlib
import pickle
import re
import shutil
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from duq.compiler.checkpoint import check_finite, load_checkpoint
from duq.compiler.checkpoint.locate import HubLocation, fetch, parse_location
from duq.compiler.checkpoint.metadata import Stub, read_metadata
from duq.compiler.checkpoint.names import current_name
from duq.compiler.checkpoint.synthetic import make_checkpoint
from duq.compiler.errors import CheckpointError

SIZES = dict(depth=2, vision_depth=1)
PALIGEMMA = "paligemma_with_expert.paligemma."
HEAD = PALIGEMMA + "lm_head.weight"
EXPERT = "paligemma_with_expert.gemma_expert.model."


@pytest.fixture(scope="module")
def lerobot(tmp_path_factory):
    """A small LeRobot pi0. Read only."""
    return make_checkpoint(tmp_path_factory.mktemp("forms") / "lerobot", layout="lerobot", robot="libero", **SIZES)


@pytest.fixture(scope="module")
def openpi(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("forms") / "openpi", robot="libero", **SIZES)


@pytest.fixture
def edit(tmp_path):
    """edit(source, f): a copy of a checkpoint whose tensors went through f (dict -> dict)."""

    def run(source: Path, change) -> Path:
        copy = shutil.copytree(source, tmp_path / "edited")
        weights = change(load_file(copy / "model.safetensors"))
        save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, copy / "model.safetensors")
        return copy

    return run


def fails(path, *patterns, **arguments):
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path, **arguments)
    for pattern in patterns:
        assert re.search(pattern, str(error.value)), f"{pattern!r} not in:\n{error.value}"


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# --- names of every generation


def before_4_52(name: str) -> str:
    """The names of transformers before 4.52, by rules written the other way round."""
    prefix, _, rest = name.rpartition(PALIGEMMA)
    if not _:
        return name
    rest = re.sub(r"^lm_head", "language_model.lm_head", rest)
    rest = re.sub(r"^model\.language_model", "language_model.model", rest)
    return prefix + PALIGEMMA + re.sub(r"^model\.(vision_tower|multi_modal_projector)", r"\1", rest)


def in_5(name: str) -> str:
    return name.replace("vision_tower.vision_model.", "vision_tower.")


GENERATIONS = {"before 4.52": before_4_52, "5": in_5, "both": lambda name: in_5(before_4_52(name))}


@pytest.mark.parametrize("layout", ["lerobot", "openpi"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_names_of_every_transformers(request, edit, layout, generation):
    source = request.getfixturevalue(layout)
    renamed = edit(source, lambda weights: {GENERATIONS[generation](name): tensor for name, tensor in weights.items()})
    stored = load_file(renamed / "model.safetensors")
    assert stored.keys() != load_file(source / "model.safetensors").keys()
    found = load_checkpoint(renamed)
    assert same(found.weights, load_checkpoint(source).weights) and found.layout == layout


WRAPPERS = ["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]


@given(st.lists(st.tuples(st.sampled_from(WRAPPERS), st.integers(0, 8)), max_size=5), st.sampled_from(sorted(GENERATIONS)))
def test_wrappers_anywhere_in_a_name(wrappers, generation):
    name = f"model.{PALIGEMMA}model.vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight"
    parts = GENERATIONS[generation](name).split(".")
    for wrapper, place in wrappers:
        parts.insert(min(place, len(parts) - 1), wrapper)
    assert current_name(".".join(parts)) == name


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.model.", "model._orig_mod."]
)
def test_checkpoints_of_wrapped_models(openpi, lerobot, edit, prefix):
    source = lerobot if "model" in prefix.split(".") else openpi
    path = edit(source, lambda weights: {prefix + name.removeprefix("model."): tensor for name, tensor in weights.items()})
    assert same(load_checkpoint(path).weights, load_checkpoint(source).weights)


def test_a_tensor_under_two_names_that_mean_the_same(openpi, edit):
    fails(
        edit(openpi, lambda w: w | {"module.state_proj.bias": w["state_proj.bias"]}),
        "stored twice.*\n.*a second state_proj.bias",
    )


def test_unused_tensors_are_dropped_knowingly(lerobot, edit):
    unused = {
        f"model.{EXPERT}embed_tokens.weight": torch.zeros(4, 4),
        "model.paligemma_with_expert.gemma_expert.lm_head.weight": torch.zeros(4, 4),
        f"model.{EXPERT}layers.1.self_attn.rotary_emb.inv_freq": torch.zeros(4),
        f"model.{PALIGEMMA}model.language_model.rotary_emb.inv_freq": torch.zeros(4),
        f"model.{PALIGEMMA}model.vision_tower.vision_model.embeddings.position_ids": torch.arange(4)[None],
        f"model.{PALIGEMMA}model.vision_tower.vision_model.head.probe": torch.zeros(4),
    }
    assert same(load_checkpoint(edit(lerobot, lambda w: w | unused)).weights, load_checkpoint(lerobot).weights)


def test_other_tensors_are_not(lerobot, edit):
    fails(
        edit(lerobot, lambda w: w | {f"model.{EXPERT}embed_positions.weight": torch.zeros(4)}),
        r"extra +expert\.embed_positions",
    )


def test_embedding_and_head_that_differ(openpi, edit):
    embedding = PALIGEMMA + "model.language_model.embed_tokens.weight"
    fails(edit(openpi, lambda w: w | {embedding: w[HEAD] + 1}), "lm_head.*embed_tokens.*differ")


def test_statistics_of_lerobot_0_3(lerobot, edit):
    buffers = {
        "normalize_inputs.buffer_observation_state.mean": torch.arange(8.0),
        "normalize_inputs.buffer_observation_state.std": torch.ones(8),
        "normalize_inputs.buffer_observation_images_top.mean": torch.full((3, 1, 1), torch.inf),
        "normalize_targets.buffer_action.mean": torch.zeros(7),
        "unnormalize_outputs.buffer_action.mean": torch.full((7,), 3.0),
        "unnormalize_outputs.buffer_action.std": torch.full((7,), 2.0),
    }
    path = edit(lerobot, lambda w: {before_4_52(name): tensor for name, tensor in w.items()} | buffers)
    fails(path, "statistics among its weights, as LeRobot 0.3, and in policy_preprocessor.json")
    for pipeline in ("policy_preprocessor.json", "policy_postprocessor.json"):
        (path / pipeline).unlink()
    found = load_checkpoint(path)
    assert found.norm_stats["state"]["mean"] == list(range(8)) and found.norm_stats["state"]["std"] == [1.0] * 8
    assert found.norm_stats["actions"]["mean"] == [3.0] * 7 and found.norm_stats["actions"]["std"] == [2.0] * 7
    assert same(found.weights, load_checkpoint(lerobot).weights) and found.form == "LeRobot 0.3, bfloat16"
    assert load_checkpoint(lerobot).norm_stats["rule"] == "lerobot" and found.norm_stats["rule"] == "lerobot-0.3"


# --- metadata.pt


class Kind(enum.Enum):
    ONE = 1


class Node:
    def __init__(self):
        self.left = [1]


def test_metadata_as_torch_saves_it(tmp_path):
    shared = {"action_horizon": 10, "dtype": "bfloat16", "pi05": True, "discrete_state_input": None, "lr": 2.5e-5}
    config = {
        "name": "pi05_libero", "model": shared, "again": shared, "tuple": (1, (2.0, "x")), "set": {3},
        "path": pathlib.Path("/data/assets"), "relative": pathlib.PurePosixPath("a/b"), "ordered": OrderedDict(a=1),
        "kind": Kind.ONE, "node": Node(), "array": np.arange(3), "tensor": torch.zeros(2), "function": math.sqrt,
    }  # fmt: skip
    torch.save({"global_step": 7, "config": config, "timestamp": 1.5}, tmp_path / "metadata.pt")
    found = read_metadata(tmp_path / "metadata.pt")
    plain = ("name", "model", "again", "tuple", "set", "ordered")
    assert (found["global_step"], found["timestamp"]) == (7, 1.5)
    assert {key: found["config"][key] for key in plain} == {key: config[key] for key in plain}
    assert (found["config"]["path"], found["config"]["relative"]) == ("/data/assets", "a/b")
    kind = found["config"]["kind"]
    assert isinstance(kind, Stub) and kind.qualified_name.endswith("Kind") and kind.arguments == (1,)
    assert isinstance(found["config"]["node"], Stub) and isinstance(found["config"]["tensor"], Stub)


def write_pickle(file: Path, data: bytes) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", data)
    return file


class Hostile:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


def test_a_hostile_pickle_does_nothing(tmp_path, monkeypatch):
    marker, module = tmp_path / "marker", tmp_path / "never_imported_before.py"
    module.write_text(f"open({str(marker)!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    calls = [(os.system, (f"touch {marker}",)), (eval, (f"open({str(marker)!r}, 'w')",)), (os.mkdir, (str(marker),))]
    for protocol, call in itertools.product((0, 2, 4), calls):
        file = write_pickle(tmp_path / "metadata.pt", pickle.dumps({"config": Hostile(call)}, protocol))
        assert isinstance(read_metadata(file)["config"], Stub)
    file = write_pickle(tmp_path / "metadata.pt", b"\x80\x02}U\x01acnever_imported_before\nThing\n)Rs.")
    assert isinstance(read_metadata(file)["a"], Stub)
    assert not marker.exists() and "never_imported_before" not in sys.modules


@settings(max_examples=40)
@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    for file in (write_pickle(folder / "zipped.pt", data), folder / "bare.pt"):
        file.exists() or file.write_bytes(data)
        try:
            assert isinstance(read_metadata(file), dict)
        except CheckpointError as error:
            assert str(file) in str(error)


def test_the_trainer_s_folder_has_its_config(openpi, tmp_path):
    path = shutil.copytree(openpi, tmp_path / "run" / "30000")
    (path / "config.json").unlink()
    torch.save({"global_step": 1, "config": {"name": "pi0_libero"}}, path / "metadata.pt")
    found = load_checkpoint(tmp_path / "run")
    assert found.settings.config == "pi0_libero" and found.path == path and found.form == "openpi PyTorch, bfloat16"
    assert same(found.weights, load_checkpoint(openpi).weights) and load_checkpoint(openpi).settings.config is None
    (path / "metadata.pt").write_bytes(b"PK")
    fails(path, "metadata.pt: is damaged")


# --- adapters

TARGETS = (
    r"(.*\.gemma_expert\..*\.self_attn\.(q|v)_proj|model\."
    r"(state_proj|action_in_proj|action_out_proj|action_time_mlp_in|action_time_mlp_out))"
)  # LeRobot's default
Q = f"model.{EXPERT}layers.1.self_attn.q_proj"


def make_adapter(folder: Path, base: Path, rank=lambda module: 4, targets=TARGETS, also=None, **config) -> Path:
    """A folder as PEFT writes it: `rank(module)` and random tensors for every linear that matches `targets`."""
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if tensor.ndim == 2 and re.fullmatch(targets, module):
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(
                rank(module), tensor.shape[1], generator=random
            )
            tensors[f"base_model.model.{module}.lora_B.weight"] = (
                torch.randn(tensor.shape[0], rank(module), generator=random) / 50
            )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors | (also or {}), folder / "adapter_model.safetensors")
    defaults = dict(peft_type="LORA", r=4, lora_alpha=8, target_modules=targets, bias="none", init_lora_weights=True)
    defaults |= dict(base_model_name_or_path=str(base), loftq_config={}, megatron_core="megatron.core", inference_mode=True)
    (folder / "adapter_config.json").write_text(json.dumps(defaults | config))
    return folder


def product(folder: Path, module: str) -> np.ndarray:
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{module}.lora_{letter}.weight"].double().numpy() for letter in "AB")
    return b @ a


CANONICAL = {Q: "expert.layers.1.self_attn.q_proj.weight", "model.state_proj": "state_proj.weight"}
CANONICAL[Q.replace("q_proj", "v_proj")] = "expert.layers.1.self_attn.v_proj.weight"


@pytest.mark.parametrize(
    "config, rank, scales",
    [
        ({}, lambda module: 4, (2.0, 2.0, 2.0)),
        ({"use_rslora": True}, lambda module: 4, (4.0, 4.0, 4.0)),
        ({"alpha_pattern": {"state_proj": 2, r"layers\.1\..*v_proj": 12}}, lambda module: 4, (2.0, 0.5, 3.0)),
        ({"rank_pattern": {"q_proj": 2}}, lambda module: 2 if module.endswith("q_proj") else 4, (4.0, 2.0, 2.0)),
        ({"rank_pattern": {"proj": 9}}, lambda module: 4, (2.0, 2.0, 2.0)),  # the whole last part of the name has to match
    ],
)
def test_adapters_are_merged(lerobot, tmp_path, config, rank, scales):
    folder = make_adapter(tmp_path / "adapter", lerobot, rank, **config)
    base, merged = load_checkpoint(lerobot), load_checkpoint(folder)
    for (module, name), scale in zip(CANONICAL.items(), scales, strict=True):
        expected = base.weights[name].double().numpy() + scale * product(folder, module)
        assert merged.weights[name].dtype == torch.float32
        np.testing.assert_allclose(merged.weights[name].numpy(), expected, atol=1e-6)
    changed = {name for name, tensor in merged.weights.items() if not torch.equal(tensor, base.weights[name])}
    assert len(changed) == 2 * 2 + 5 and {"action_time_mlp_in.weight", "expert.layers.0.self_attn.v_proj.weight"} <= changed
    assert merged.form.startswith("LoRA adapter (PEFT, rank") and merged.form.endswith("merged into LeRobot, bfloat16")
    assert (merged.config, merged.norm_stats, merged.tokenizer) == (base.config, base.norm_stats, base.tokenizer)
    assert merged.path == folder and merged.fingerprint != base.fingerprint and "9 tensors" in merged.notes[-1]
    check_finite(merged.weights)


@pytest.mark.parametrize("infix", ["", ".modules_to_save", ".modules_to_save.default"])
def test_modules_saved_whole(lerobot, tmp_path, infix):
    whole = {f"base_model.model.model.state_proj{infix}.{leaf}": torch.ones(*size) for leaf, size in
             (("weight", (256, 32)), ("bias", (256,)))}  # fmt: skip
    folder = make_adapter(tmp_path / "adapter", lerobot, targets=r".*\.q_proj", also=whole, modules_to_save=["state_proj"])
    weights = load_checkpoint(folder).weights
    assert torch.equal(weights["state_proj.weight"], torch.ones(256, 32))
    assert torch.equal(weights["state_proj.bias"], torch.ones(256))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_were_trained(lerobot, tmp_path, bias):
    own = {"base_model.model.model.state_proj.base_layer.bias": torch.full((256,), 3.0)}
    folder = make_adapter(tmp_path / "adapter", lerobot, also=own, bias=bias)
    assert torch.equal(load_checkpoint(folder).weights["state_proj.bias"], torch.full((256,), 3.0))
    make_adapter(tmp_path / "adapter", lerobot, also=own)
    fails(folder, r"state_proj\.base_layer\.bias \[256\] is of no kind")


def test_the_base_may_be_given_and_has_any_form(lerobot, openpi, tmp_path):
    folder = make_adapter(tmp_path / "adapter", lerobot, base_model_name_or_path="gone/away/far")
    fails(folder, "its base gone/away/far is not on this machine; give its folder")
    given = load_checkpoint(folder, base=lerobot)
    assert given.weights[CANONICAL[Q]].dtype == torch.float32
    assert load_checkpoint(folder, base=openpi).layout == "openpi"
    fails(lerobot, "is no adapter, so it takes no base", base=openpi)
    again = make_adapter(tmp_path / "again", lerobot, base_model_name_or_path=str(folder))
    (folder / "adapter_config.json").write_text(
        json.dumps(json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(lerobot)})
    )
    twice, once, base = (load_checkpoint(path).weights[CANONICAL[Q]].double() for path in (again, folder, lerobot))
    torch.testing.assert_close(twice - once, once - base, atol=1e-5, rtol=0)


def test_files_beside_the_adapter_come_before_the_base_s(lerobot, tmp_path):
    folder = make_adapter(tmp_path / "adapter", lerobot)
    config = json.loads((lerobot / "config.json").read_text()) | {"chunk_size": 7, "use_peft": True}
    (folder / "config.json").write_text(json.dumps(config))
    found = load_checkpoint(folder)
    assert found.config.action_horizon == 7 and found.norm_stats == load_checkpoint(lerobot).norm_stats
    shutil.copy(lerobot / "policy_preprocessor.json", folder)
    state_file = json.loads((folder / "policy_preprocessor.json").read_text())["steps"][0]["state_file"]
    statistics = load_file(lerobot / state_file)
    save_file({name: values + 1 for name, values in statistics.items()}, folder / state_file)
    assert load_checkpoint(folder).norm_stats["state"]["mean"] == (statistics["observation.state.mean"] + 1).tolist()


@pytest.mark.parametrize(
    "config, message",
    [
        ({"use_dora": True}, "use_dora True, which cannot be merged here"),
        ({"peft_type": "ADALORA"}, "peft_type 'ADALORA'"),
        ({"peft_type": None}, "peft_type None"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"lora_bias": True}, "lora_bias True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"some_new_scale": 2}, "some_new_scale 2"),
        ({"bias": "some"}, "bias 'some'"),
        ({"r": 3}, "are not of rank 3"),
        ({"target_modules": rf"{TARGETS}|.*\.k_proj"}, "k_proj is a target in adapter_config.json, but has no tensors"),
        ({"target_modules": ["q_proj", "v_proj", "fc1"]}, "mlp.fc1 is a target"),
    ],
)
def test_adapters_that_cannot_be_merged(lerobot, tmp_path, config, message):
    folder = make_adapter(tmp_path / "adapter", lerobot)
    changed = json.loads((folder / "adapter_config.json").read_text()) | config
    (folder / "adapter_config.json").write_text(json.dumps(changed))
    fails(folder, message)


@pytest.mark.parametrize(
    "config", [{"some_new_scale": None}, {"some_new_list": []}, {"lora_dropout": 0.1, "task_type": "x"}]
)
def test_settings_that_change_nothing(lerobot, tmp_path, config):
    assert load_checkpoint(make_adapter(tmp_path / "adapter", lerobot, **config)).weights


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(f"base_model.model.{Q}.lora_B.weight"), "q_proj: lora_B is missing"),
        (
            lambda t: t.update({"base_model.model.model.unknown.lora_A.weight": torch.zeros(4, 4)}),
            "unknown: the base has no such tensor",
        ),
        (lambda t: t.update({f"base_model.model.{Q}.lora_magnitude_vector.weight": torch.zeros(4)}), "is DoRA"),
        (
            lambda t: t.update({"base_model.model.model.state_proj.weight": torch.zeros(4)}),
            r"state_proj\.weight \[4\] is of no kind",
        ),
        (lambda t: t.update({f"base_model.model.{Q}.lora_A.weight": torch.zeros(4, 7)}), r"A \[4, 7\] and B .* do not fit"),
        (lambda t: [t.pop(name) for name in list(t) if Q in name], "q_proj is a target .* has no tensors"),
    ],
)
def test_adapter_tensors_that_do_not_fit(lerobot, tmp_path, change, message):
    folder = make_adapter(tmp_path / "adapter", lerobot)
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    fails(folder, message)


def test_folders_that_are_half_an_adapter(lerobot, tmp_path):
    beside = shutil.copytree(lerobot, tmp_path / "beside")
    (beside / "adapter_config.json").write_text("{}")
    fails(beside, "no adapter_model.safetensors.*if model.safetensors has it merged, remove adapter_config.json")
    make_adapter(beside, lerobot)
    fails(beside, "holds a whole policy .* and an adapter .* not clear")
    assert load_checkpoint(beside, base=lerobot).form.startswith("LoRA")
    settings_file = beside / "config.json"
    settings_file.write_text(json.dumps(json.loads(settings_file.read_text()) | {"use_peft": True}))
    assert load_checkpoint(beside).form.startswith("LoRA")
    folder = make_adapter(tmp_path / "adapter", lerobot)
    (folder / "adapter_config.json").unlink()
    fails(folder, "adapter_model.safetensors but no adapter_config.json")
    folder = make_adapter(tmp_path / "adapter", lerobot)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    fails(folder, "adapter_model.bin is pickled")
    itself = make_adapter(tmp_path / "itself", lerobot, base_model_name_or_path=str(tmp_path / "itself"))
    fails(itself, "its base .* give its folder")


def test_openpi_s_lm_heads_in_an_adapter_change_nothing(lerobot, tmp_path):
    also = {
        f"base_model.model.model.{HEAD.removesuffix('.weight')}.lora_{letter}.weight": torch.ones(4, 4) for letter in "AB"
    }
    folder = make_adapter(tmp_path / "adapter", lerobot, also=also)
    name = "llm.embed_tokens.weight"
    assert torch.equal(load_checkpoint(folder).weights[name], load_checkpoint(lerobot).weights[name])


# --- places


@pytest.mark.parametrize(
    "text, expected",
    [
        ("folder/x", Path("folder/x")),
        ("/a/b", Path("/a/b")),
        ("file:///a/b", Path("/a/b")),
        ("hf://lerobot/pi0_base", HubLocation("lerobot/pi0_base")),
        (Path("hf://lerobot/pi0_base"), HubLocation("lerobot/pi0_base")),
        ("hf:/a/b@main/c/d/", HubLocation("a/b", "main", "c/d")),
        ("hf://a/b.c-d@refs/pr/3/sub", HubLocation("a/b.c-d", "refs/pr/3", "sub")),
    ],
)
def test_locations(text, expected):
    assert parse_location(text) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "gs://openpi-assets/checkpoints/pi05_base",
            r"gsutil -m cp -r gs://openpi-assets/checkpoints/pi05_base .*pass pi05",
        ),
        (Path("gs://openpi-assets/checkpoints/pi05_base/"), "gsutil -m cp -r gs://openpi-assets/checkpoints/pi05_base"),
        ("s3://bucket/x", "aws s3 cp --recursive s3://bucket/x"),
        ("https://host/x", "cannot be read: download it"),
        ("hf://only", "expected hf://owner/name"),
    ],
)
def test_places_that_are_not_read(text, message):
    fails(text, message)


@pytest.fixture
def hub_cache(lerobot, tmp_path, monkeypatch):
    """The Hub's cache with `lerobot` as owner/name, and no network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--name"
    for folder in ("", "sub"):
        shutil.copytree(lerobot, repository / "snapshots" / revision / folder, dirs_exist_ok=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return repository / "snapshots" / revision


def test_the_hub_s_cache_is_used_offline(hub_cache, lerobot, tmp_path):
    expected = load_checkpoint(lerobot)
    for text in (
        "hf://owner/name",
        Path("hf://owner/name"),
        "hf://owner/name@main",
        f"hf://owner/name@{hub_cache.name}/sub",
    ):
        found = load_checkpoint(text)
        assert same(found.weights, expected.weights) and found.fingerprint == expected.fingerprint
    assert found.path == hub_cache / "sub" and fetch(parse_location("hf://owner/name")) == hub_cache
    fails("hf://owner/other", "hf://owner/other cannot be downloaded")
    fails("hf://owner/name/nowhere", "has no folder nowhere")
    adapter = make_adapter(tmp_path / "adapter", lerobot, base_model_name_or_path="owner/name")
    assert load_checkpoint(adapter).weights[CANONICAL[Q]].dtype == torch.float32


def test_missing_huggingface_hub_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    fails("hf://owner/name", r"pip install '\.\[hub\]'")


# --- what else a folder may be


def touch(*names):
    def write(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("{}")

    return write


@pytest.mark.parametrize(
    "write, message",
    [
        (touch(), "is empty, so not a checkpoint"),
        (touch("readme.md"), "is not a checkpoint: it has no model.safetensors"),
        (touch("pytorch_model.bin", "config.json"), "pickled weights .pytorch_model.bin.*safetensors"),
        (touch("policy.ckpt"), "pickled weights .policy.ckpt"),
        (touch("pi0.gguf"), "llama.cpp"),
        (touch("model-00001-of-00002.safetensors"), "has shards .* but no model.safetensors.index.json"),
        (touch("train_config.json"), "no model.safetensors, only settings; copy the weights as well"),
        (touch("optimizer.pt", "metadata.pt"), "openpi's trainer writes beside the weights"),
        (touch("training_step.json", "optimizer_state.safetensors"), "state of a training; pass .*pretrained_model"),
        (touch("training_state/training_step.json"), "only the state of a training .training_state"),
        (touch("train_state/_METADATA"), "only the state of a training .train_state"),
        (touch("robot/norm_stats.json", "norm_stats.json"), "only normalization statistics"),
        (touch("100.orbax-checkpoint-tmp-3/x"), "saving did not finish .100.orbax-checkpoint-tmp-3"),
        (touch("10/params/d/1", "10/train_state/x"), "run's folder, and no step in it is complete"),
        (touch("snapshots/"), "Hub's cache with nothing in it"),
    ],
)
def test_folders_without_a_policy(tmp_path, write, message):
    folder = tmp_path / "folder"
    folder.mkdir()
    if message.startswith("Hub"):
        (folder / "snapshots").mkdir()
    else:
        write(folder)
    fails(folder, message)


@pytest.mark.parametrize(
    "place, passed, expected",
    [
        ("pretrained_model", "", "pretrained_model"),
        ("checkpoints/000100/pretrained_model", "", "checkpoints/000100/pretrained_model"),
        ("checkpoints/000100/pretrained_model", "checkpoints", "checkpoints/000100/pretrained_model"),
        ("checkpoints/000100/pretrained_model", "checkpoints/000100", "checkpoints/000100/pretrained_model"),
        ("inner", "", "inner"),
        ("experiment/9000", "", "experiment/9000"),
        ("policy", "policy/assets", "policy"),
        ("policy", "policy/assets/physical-intelligence/libero", "policy"),
        ("models--a--b/snapshots/12ab34", "models--a--b", "models--a--b/snapshots/12ab34"),
        ("models--a--b/snapshots/12ab34", "models--a--b/snapshots", "models--a--b/snapshots/12ab34"),
    ],
)
def test_folders_one_level_off(openpi, tmp_path, place, passed, expected):
    shutil.copytree(openpi, tmp_path / place)
    if "000100" in place:
        shutil.copytree(openpi, tmp_path / place.replace("000100", "000020"))
    fails(tmp_path / passed, f"pass {re.escape(str(tmp_path / expected))}$")


def test_files_in_place_of_folders(openpi, tmp_path):
    fails(openpi / "model.safetensors", f"is a file: pass its directory {re.escape(str(openpi))}$")
    for name, message in (
        ("x.pt", "pickled tensors"),
        ("x.gguf", "GGUF"),
        ("x.bin", "pickled"),
        ("notes.txt", "is a file"),
    ):
        (tmp_path / name).write_text("x")
        fails(tmp_path / name, message)
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid")
    fails(tmp_path / "pointer.safetensors", "Git LFS pointer.*git lfs pull")
    (tmp_path / "last").symlink_to("000100")
    fails(tmp_path / "last", "is a link to 000100, which does not exist")


def test_lfs_pointer_in_a_folder(openpi, tmp_path):
    path = shutil.copytree(openpi, tmp_path / "clone")
    (path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n")
    fails(path, "model.safetensors is a Git LFS pointer.*git lfs pull")


@pytest.mark.parametrize("policy", ["smolvla", "pi0_fast", "act", "diffusion", "groot"])
def test_other_policies_of_lerobot(lerobot, tmp_path, policy):
    path = shutil.copytree(lerobot, tmp_path / "other")
    (path / "config.json").write_text(json.dumps({"type": policy}))
    save_file({"model.vlm.weight": torch.zeros(2)}, path / "model.safetensors")
    fails(path, f"policy \"type\" is '{policy}'; only pi0 and pi05")


@pytest.mark.parametrize(
    "names, config, message",
    [
        (["model.vlm_with_expert.vlm.model.x.weight"], {}, "SmolVLA"),
        ([f"{PALIGEMMA}model.language_model.norm.weight"], {}, "pi0-FAST"),
        (["language_model.model.norm.weight", "vision_tower.x"], {}, "PaliGemma itself"),
        (["language_model.model.norm.weight"], {"model_type": "paligemma"}, "'paligemma' model; only"),
        ([f"{Q}.base_layer.weight", f"{Q}.lora_A.default.weight"], {}, r"LoRA that is not merged.*merge_and_unload"),
        ([f"{Q}.lora_magnitude_vector.default.weight", f"{Q}.lora_A.default.weight"], {}, "DoRA"),
    ],
)
def test_tensors_of_other_models(tmp_path, names, config, message):
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    fails(tmp_path, message)
