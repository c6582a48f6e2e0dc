"""openpi's PyTorch directory: model.safetensors, config.json, assets/<asset_id>/norm_stats.json.

openpi's trainer writes no config.json (its converter does), so every key is optional.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch

from duq.compiler.checkpoint.claims import Claim, explicit_claims, variant_claims, whole_number
from duq.compiler.checkpoint.settings import Settings
from duq.compiler.checkpoint.training import settings_of_trainer
from duq.compiler.errors import CheckpointError
from duq.runtime.config import ROTARY, ModelConfig
from duq.runtime.reading import brief, listed

PRECISIONS = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


# Keys of config.json that are applied or known to be harmless; all others are listed to the user.
CONFIG_KEYS = {
    "action_dim", "action_horizon", "max_token_len", "paligemma_variant", "action_expert_variant", "precision", "dtype",
    "pi05", "discrete_state_input", "pytorch_compile_mode", "vision", "llm", "expert", "rotary",
}  # fmt: skip


def read_policy(settings: dict, config: ModelConfig, trainer: Mapping | None) -> Settings:
    """What config.json and the trainer's metadata.pt (its "config") say about the policy around its weights.

    Raises CheckpointError where the two contradict each other.
    """
    said = settings_of_trainer(trainer) if trainer is not None else Settings()
    transforms = dict(said.transforms)
    if isinstance(settings.get("discrete_state_input"), bool):
        transforms["state_in_prompt"] = config.pi05 and settings["discrete_state_input"]
    found = {"action_horizon": action_horizon(settings), "max_prompt_tokens": max_prompt_tokens(settings)}
    for name, value in found.items():
        trained = getattr(said, name)
        if value is not None and trained is not None and value != trained:
            raise CheckpointError(f"config.json has {name} {value}, but metadata.pt {trained}; remove the wrong one")
    return replace(
        said,
        transforms=transforms,
        rotary=_rotary(settings),
        ignored=tuple(f"{key}: {brief(value)}" for key, value in settings.items() if key not in CONFIG_KEYS),
        **cast(dict[str, Any], {name: value for name, value in found.items() if value is not None}),
    )


def _rotary(settings: dict) -> str | None:
    """Our own trainers say how they computed rotary frequencies; openpi's config.json does not."""
    rotary = settings.get("rotary")
    if rotary not in (None, *ROTARY):
        raise CheckpointError(f'config.json: "rotary" is {brief(rotary)}, known are {", ".join(ROTARY)}')
    return rotary


def action_horizon(settings: dict) -> int | None:
    return whole_number(settings, "action_horizon", "action_horizon")


def max_prompt_tokens(settings: dict) -> int | None:
    return whole_number(settings, "max_token_len", "max_prompt_tokens")


def claims(settings: dict) -> list[Claim]:
    """What config.json says about dimensions that the tensors have too."""
    plain = [Claim(key, key, settings[key]) for key in ("action_dim", "pi05") if key in settings]
    return (
        plain
        + [Claim("state_proj", "state_dim", None)]  # as wide as the actions
        + variant_claims("paligemma_variant", "llm", settings)
        + variant_claims("action_expert_variant", "expert", settings)
        + explicit_claims(settings)
    )


def check_precision(settings: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Raises CheckpointError when no tensor is stored in the precision that config.json names.

    Not every tensor has to be: a bfloat16 model keeps its norms and patch embedding in float32 while it is trained.
    """
    precision = settings.get("precision")
    if precision is None:
        return
    if precision not in list(PRECISIONS):
        raise CheckpointError(f'config.json: "precision" is {brief(precision)}, known are {", ".join(PRECISIONS)}')
    stored = {tensor.dtype for tensor in tensors.values()}
    if PRECISIONS[precision] not in stored:
        found = listed(sorted(map(str, stored)))
        raise CheckpointError(f'config.json: "precision" is {precision}, but the tensors are stored in {found}')
