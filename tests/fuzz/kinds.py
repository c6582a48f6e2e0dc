"""The kinds of files that duq reads, with what makes, edits and reads one; and what has to hold however it is edited.

folder = KINDS["recipe"].make(tmp_path)
check("recipe", folder, seed=7)     # one edit: it is read, or refused by a DuqError in one line, quickly, in little memory
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from duq.compiler.checkpoint import Checkpoint, check_finite, load_checkpoint
from duq.compiler.checkpoint.names import openpi_name
from duq.compiler.checkpoint.synthetic import make_checkpoint
from duq.compiler.checkpoint.synthetic.files import TOKENIZER_SIZE, train_tokenizer
from duq.compiler.data import load_calibration
from duq.compiler.quant import Quantization, Recipe, load_recipe, save_quantization
from duq.compiler.quant.linears import check_selection, select_linears
from duq.compiler.quant.pack import LinearPack, pack_weight
from duq.compiler.quant.store import load_quantization
from duq.compiler.quant.transforms import LinearTransform
from duq.compiler.settings import Choices, settle
from duq.runtime.observations import save_observations
from duq.runtime.robots import load_robot
from duq.runtime.tokenizer import Tokenizer
from tests.fuzz.judge import judged
from tests.fuzz.mutate import Mutation, damage, edit_json, edit_lines, edit_npz, edit_safetensors, edit_zip
from tests.support.dataset_writer import Recorded, write_v2, write_v3
from tests.support.quant_policy import SILENT, tiny_checkpoint, tiny_config

SIZES: dict[str, Any] = dict(depth=1, vision_depth=1, vocab_size=TOKENIZER_SIZE, action_horizon=8)


@dataclass(frozen=True)
class Kind:
    """make: writes intact files into a folder. files: patterns of those that are edited. read: reads the folder.

    read raises AssertionError for numbers that were accepted and cannot be right.
    """

    make: Callable[[Path], Any]
    files: tuple[str, ...]
    mutate: Mutation
    read: Callable[[Path], Any]


def check(name: str, folder: Path, seed: int) -> str | None:
    """Reads the folder with one file of it edited, and leaves it as it was. Returns the error's text; None: it was read.

    Raises Failure that names kind and seed where an edit ends otherwise than in a result or a DuqError.
    """
    kind, random = KINDS[name], Random(f"{name} {seed}")
    file = random.choice(sorted(file for pattern in kind.files for file in folder.glob(pattern)))
    with _edited(file, kind.mutate, random):
        error = judged(f"{name}, seed {seed}, {file.relative_to(folder)}", lambda: kind.read(folder))
    return None if error is None else str(error)


@contextmanager
def _edited(file: Path, mutate: Mutation, random: Random) -> Iterator[None]:
    original = file.read_bytes()
    file.write_bytes(mutate(original, random))
    try:
        yield
    finally:
        file.write_bytes(original)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def _small_torch(folder: Path) -> None:
    """A policy of a few thousand weights in openpi's PyTorch layout."""
    weights = {openpi_name(name): tensor.contiguous() for name, tensor in tiny_checkpoint().weights.items()}
    save_file(weights, folder / "model.safetensors")
    settings = {"action_dim": 8, "action_horizon": 5, "max_token_len": 6, "precision": "bfloat16", "vision": {"heads": 2}}
    (folder / "config.json").write_text(json.dumps(settings | {"paligemma_variant": None}))


def _made(**options: Any) -> Callable[[Path], None]:
    return lambda folder: (folder.rmdir(), make_checkpoint(folder, **SIZES, **options))[0]


def _with_metadata(folder: Path) -> None:
    _small_torch(folder)
    model = {"action_dim": 8, "action_horizon": 5, "max_token_len": 6, "pi05": False, "discrete_state_input": False}
    data = {"repo_id": "owner/name", "assets": {"asset_id": "x"}, "use_delta_joint_actions": True, "adapt_to_pi": False}
    config = {"name": "pi0_aloha", "model": model, "data": data, "batch_size": 32, "checkpoint_dir": Path("/x"), "seed": 42}
    torch.save({"global_step": 3, "config": config, "timestamp": 1.5}, folder / "metadata.pt")


def _adapter(folder: Path) -> None:
    base = folder / "base"
    make_checkpoint(base, layout="lerobot", robot="libero", **SIZES)
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(base / "model.safetensors").items()}
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith("gemma_expert.model.layers.0.self_attn.q_proj.weight"):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(4, shape[1])
            tensors[f"{module}.lora_B.weight"] = torch.randn(shape[0], 4)
    assert tensors
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": r".*gemma_expert.*\.q_proj", "bias": "none",
        "base_model_name_or_path": "base", "use_rslora": False, "use_dora": False, "modules_to_save": None, "revision": None,
        "alpha_pattern": {"layers.0": 16}, "rank_pattern": {"q_proj": 4}, "init_lora_weights": True, "lora_dropout": 0.1,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _read_checkpoint(folder: Path) -> Checkpoint:
    """As duq-compile does before it quantizes; what it accepts has to give finite inputs and actions."""
    policy = load_checkpoint(folder)
    check_finite(policy.weights)
    choices = Choices(action_horizon=8, lerobot_version="0.5" if policy.layout == "lerobot" else None, state_in_prompt=None)
    policy, settings = settle(policy, choices)
    preprocessor = settings.preprocessor(policy)
    assert 1 <= policy.config.action_horizon <= 1000 and 1 <= policy.config.max_prompt_tokens <= 4096
    assert 1 <= settings.num_steps <= 1000
    for normalizer in (preprocessor._state_norm, preprocessor._action_norm):
        _check_normalizer(normalizer)
    return policy


def _check_normalizer(normalizer: Any) -> None:
    size = getattr(normalizer, "low", np.zeros(0)).size
    if size:
        for value in (normalizer.normalize(normalizer.low + 0.5), normalizer.unnormalize(np.full(size, 0.5))):
            assert np.isfinite(value).all(), "norm stats that give numbers that are not finite were accepted"


# --- recipes and packs ------------------------------------------------------------------------------------------------

RECIPE = """\
preset: llm
scheme: duquant
weight-bits: 4
layer_bits: ['layers.0:8', 'down_proj:4']
activation_bits: 8
block_size: 64
permute: true
row_rotation: restore
activation_percentile: 99.9
calibration_steps: 4
compensate: true
damping: 1.0
exclude: 'vision'
"""
NAME = "llm.layers.0.mlp.down_proj"
_policy_of_packs = functools.cache(tiny_checkpoint)


def _read_recipe(folder: Path) -> None:
    recipe = load_recipe(str(folder / "recipe.yaml"), environment={})
    for value in (recipe.damping, recipe.activation_percentile, recipe.auto_bits):
        assert math.isfinite(value)
    check_selection(recipe, tiny_config())
    assert set(select_linears(recipe, tiny_config()).values()) <= {4, 8}


def _packs(folder: Path) -> None:
    random, (rows, columns) = np.random.default_rng(0), tiny_checkpoint().weights[f"{NAME}.weight"].shape
    pack = LinearPack(
        name=NAME, weight_q=pack_weight(random.integers(-8, 8, (rows, columns), np.int8), 4), weight_bits=4,
        weight_scale=random.random(rows, np.float32) + 0.1, permutation=random.permutation(columns), sqnr_db=20.0,
        rotation=np.tile(np.eye(16, dtype=np.float32), (columns // 16, 1, 1)), block_size=16,
        input_scale=np.ones(columns, np.float32),
    )  # fmt: skip
    floats = {"llm.layers.0.self_attn.v_proj.weight": torch.randn(32, 64)}
    values = {2: LinearTransform(input_scale=np.ones(32, np.float32), rotation="hadamard", block_size=16)}
    save_quantization(Quantization(Recipe(), {NAME: pack}, floats, values), folder / "packs", "tiny0", SILENT)


def _read_packs(folder: Path) -> None:
    for pack in load_quantization(folder / "packs", _policy_of_packs()).packs.values():
        assert pack.shape == (64, 128) and np.isfinite(pack.weight_scale).all()


# --- observations, robots, tokenizers -----------------------------------------------------------------------------------


def _observations(folder: Path) -> None:
    random = np.random.default_rng(0)
    rows = [
        {
            "image": {"base_0_rgb": random.integers(0, 256, (8, 8, 3), np.uint8)},
            "state": random.random(3, np.float32),
            "prompt": f"push {index}",
        }
        for index in range(3)
    ]
    save_observations(folder / "observations.npz", rows)


def _read_calibration(folder: Path) -> None:
    found = load_calibration(folder, 2)
    assert len(found.observations) == len(found.labels) <= 2


ROBOT = (Path(__file__).parents[2] / "runtime" / "robots" / "aloha.toml").read_text()


def _read_robot(folder: Path) -> None:
    robot = load_robot(str(folder / "robot.toml"))
    assert robot is not None
    state = np.full(robot.state_dim, 0.25)
    assert np.isfinite(robot.state_to_model(state, True)).all()
    assert np.isfinite(robot.actions_to_robot(np.full((2, robot.action_dim), 0.25), True)).all()
    assert type(robot).from_json(json.loads(json.dumps(robot.to_json()))) == robot


def _read_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer((folder / "tokenizer.model").read_bytes())
    for prompt in ("pick up the cup", "", "öffne die Tür \U0001f600", "x" * 500):
        assert all(each >= 0 for each in tokenizer.encode(prompt) + tokenizer.encode_task(prompt))


def _dataset(write: Callable[..., Path]) -> Callable[[Path], Any]:
    return lambda folder: write(folder, [Recorded(6), Recorded(5, "open the door")])


KINDS: dict[str, Kind] = {
    "safetensors": Kind(_small_torch, ("model.safetensors",), edit_safetensors, lambda folder: _read_small(folder)),
    "config.json": Kind(_made(robot="libero"), ("config.json",), edit_json, _read_checkpoint),
    "norm_stats.json": Kind(_made(robot="libero"), ("assets/**/norm_stats.json",), edit_json, _read_checkpoint),
    "lerobot config.json": Kind(_made(layout="lerobot", robot="libero"), ("config.json",), edit_json, _read_checkpoint),
    "processors": Kind(
        _made(layout="lerobot", robot="libero", pi05=True), ("policy_p*processor.json",), edit_json, _read_checkpoint
    ),
    "statistics": Kind(
        _made(layout="lerobot", robot="libero"), ("policy_*.safetensors",), edit_safetensors, _read_checkpoint
    ),
    "metadata.pt": Kind(_with_metadata, ("metadata.pt",), edit_zip, lambda folder: _read_small(folder)),
    "orbax": Kind(_made(layout="jax", robot="libero"), ("params/_METADATA",), edit_json, _read_checkpoint),
    "ocdbt": Kind(
        _made(layout="jax", robot="libero"), ("params/manifest.ocdbt", "params/**/d/*"), damage, _read_checkpoint
    ),
    "adapter": Kind(_adapter, ("adapter_config.json",), edit_json, _read_checkpoint),
    "adapter tensors": Kind(_adapter, ("adapter_model.safetensors",), edit_safetensors, _read_checkpoint),
    "recipe": Kind(lambda folder: (folder / "recipe.yaml").write_text(RECIPE), ("recipe.yaml",), edit_lines, _read_recipe),
    "packs": Kind(_packs, ("packs/*.npz",), edit_npz, _read_packs),
    "packs' recipe": Kind(_packs, ("packs/recipe.json",), edit_json, _read_packs),
    "packs' floats": Kind(_packs, ("packs/*.safetensors",), edit_safetensors, _read_packs),
    "observations": Kind(_observations, ("observations.npz",), edit_npz, _read_calibration),
    "dataset info": Kind(_dataset(write_v3), ("meta/info.json",), edit_json, _read_calibration),
    "dataset lines": Kind(_dataset(write_v2), ("meta/*.jsonl",), edit_lines, _read_calibration),
    "parquet": Kind(_dataset(write_v3), ("**/*.parquet",), damage, _read_calibration),
    "video": Kind(_dataset(write_v3), ("**/*.mp4",), damage, _read_calibration),
    "robot": Kind(lambda folder: (folder / "robot.toml").write_text(ROBOT), ("robot.toml",), edit_lines, _read_robot),
    "tokenizer": Kind(
        lambda folder: (folder / "tokenizer.model").write_bytes(train_tokenizer()),
        ("tokenizer.model",),
        damage,
        _read_tokenizer,
    ),
}


def _read_small(folder: Path) -> None:
    policy = load_checkpoint(folder, statistics=False)
    check_finite(policy.weights)
    assert policy.settings.action_horizon is None or 1 <= policy.settings.action_horizon <= 1000
