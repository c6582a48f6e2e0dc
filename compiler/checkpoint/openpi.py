"""openpi's PyTorch directory: model.safetensors, config.json, assets/<asset_id>/norm_stats.json.

openpi's trainer writes no config.json (its converter does), so every key is optional.
"""
from __future__ import annotations

import torch

from compiler.checkpoint.claims import Claim, explicit_claims, positive_int, variant_claims
from compiler.errors import CheckpointError

PRECISIONS = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


def action_horizon(settings: dict) -> int:
    return positive_int(settings, "action_horizon", 50)


def max_prompt_tokens(settings: dict) -> int | None:
    return positive_int(settings, "max_token_len", None)


def claims(settings: dict) -> list[Claim]:
    """What config.json says about dimensions that the tensors have too."""
    plain = [Claim(key, key, settings[key]) for key in ("action_dim", "pi05") if key in settings]
    return (
        plain
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
    if precision not in PRECISIONS:
        raise CheckpointError(f'config.json: "precision" is {precision!r}, known are {", ".join(PRECISIONS)}')
    stored = {tensor.dtype for tensor in tensors.values()}
    if PRECISIONS[precision] not in stored:
        found = ", ".join(sorted(map(str, stored)))
        raise CheckpointError(f'config.json: "precision" is {precision}, but the tensors are stored in {found}')
