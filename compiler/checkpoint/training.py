"""openpi's training configs: what a checkpoint of theirs does not say, by name or from a trainer's metadata.pt."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from duq.compiler.checkpoint.metadata import Stub
from duq.compiler.checkpoint.ranges import checked
from duq.compiler.checkpoint.settings import Settings
from duq.compiler.checkpoint.shapes import ACTION_HORIZON, PROMPT_SLOTS
from duq.compiler.errors import CheckpointError
from duq.runtime.robots import ROBOT_NAMES, load_robot

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = Path(__file__).with_name("openpi_configs.toml")
MODELS = {"pi0": False, "pi05": True}  # -> is it pi0.5
JOINT_POSITION = 1  # the value of openpi's DroidActionSpace.JOINT_POSITION


@dataclass(frozen=True)
class TrainingConfig:
    """A published training config. pi05: its model; action_dim: None where it is the model's default."""

    name: str
    pi05: bool
    settings: Settings
    action_dim: int | None = None


@cache
def published() -> dict[str, dict]:
    return tomllib.loads(FILE.read_text(encoding="utf-8"))


def training_config(name: str) -> TrainingConfig:
    """The published config of that name. Raises CheckpointError: unknown, or of a policy that is not compiled."""
    configs = published()
    if name not in configs:
        close = difflib.get_close_matches(name, configs, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(_compiled())}"
        raise CheckpointError(
            f"--config {name}: no published openpi config; {hint} For your own say --robot, --action-horizon, "
            "--max-prompt-tokens, --delta-actions or --no-delta-actions"
        )
    data = configs[name]
    if data["model"] not in MODELS:
        raise CheckpointError(
            f"--config {name}: is a {data['model']} policy, which predicts tokens; only pi0 and pi0.5 compile"
        )
    pi05 = MODELS[data["model"]]
    transforms: dict[str, Any] = {
        "delta_actions": data.get("delta_actions", False),
        "adapt_to_pi": data.get("adapt_to_pi", False),
        "state_in_prompt": pi05 and data.get("state_in_prompt", True),
    }
    if "default_prompt" in data:
        transforms["default_prompt"] = data["default_prompt"]
    said = Settings(
        action_horizon=data.get("action_horizon", ACTION_HORIZON),
        max_prompt_tokens=data.get("max_prompt_tokens", PROMPT_SLOTS[pi05]),
        transforms=transforms,
        robot=load_robot(data["robot"]),
        asset_id=data["asset_id"],
        config=name,
    )
    return TrainingConfig(name, pi05, said, data.get("action_dim"))


def _compiled() -> list[str]:
    return [name for name, data in published().items() if data["model"] in MODELS]


def settings_of_trainer(config: Mapping) -> Settings:
    """What `dataclasses.asdict(TrainConfig)`, as openpi's PyTorch trainer saves it in metadata.pt, says.

    The class of its data config is not saved, but its fields tell which it was. Raises CheckpointError for pi0-FAST.
    """
    model, data, name = _mapping(config, "model"), _mapping(config, "data"), config.get("name")
    if "fast_model_tokenizer" in model:
        raise CheckpointError("metadata.pt: its config is of pi0-FAST, which predicts tokens; only pi0 and pi0.5 compile")
    pi05 = model.get("pi05") is True
    transforms: dict[str, Any] = {}
    if isinstance(model.get("discrete_state_input"), bool):
        transforms["state_in_prompt"] = pi05 and model["discrete_state_input"]
    if isinstance(data.get("default_prompt"), str):
        transforms["default_prompt"] = data["default_prompt"]
    robot: str | None = None
    if {"use_delta_joint_actions", "adapt_to_pi"} <= set(data):
        robot = "aloha"
        transforms |= {"delta_actions": data["use_delta_joint_actions"] is True, "adapt_to_pi": data["adapt_to_pi"] is True}
    elif "extra_delta_transform" in data:
        robot = "libero"
        transforms |= {"delta_actions": data["extra_delta_transform"] is True, "adapt_to_pi": False}
    elif "rlds_data_dir" in data:
        robot = "droid"
        transforms |= {"delta_actions": _value(data.get("action_space")) == JOINT_POSITION, "adapt_to_pi": False}
    elif name in list(_compiled()):  # a data config without fields of its own: that of the published config
        known = training_config(name).settings
        robot, transforms = known.robot.name if known.robot else None, {**known.transforms, **transforms}
    return Settings(
        action_horizon=_number(model, "action_horizon", "action_horizon"),
        max_prompt_tokens=_number(model, "max_token_len", "max_prompt_tokens"),
        transforms=transforms,
        robot=load_robot(robot) if robot in ROBOT_NAMES else None,
        asset_id=_text(_mapping(data, "assets").get("asset_id")) or _text(data.get("repo_id")),
        config=name if isinstance(name, str) else None,
    )


def _mapping(data: Mapping, key: str) -> Mapping:
    value = data.get(key)
    return value if isinstance(value, Mapping) else {}


def _number(data: Mapping, key: str, name: str) -> int | None:
    value = data.get(key)
    return None if value is None else checked(value, name, f"metadata.pt: {key}")


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _value(member: Any) -> Any:
    """The value of an enum's member, which the reader of metadata.pt leaves as a stub with its arguments."""
    return member.arguments[0] if isinstance(member, Stub) and member.arguments else member
