"""A policy of a few thousand weights and observations for it, for the tests of the quantizer."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from rich.progress import Progress

from duq.compiler.checkpoint.settings import Settings
from duq.compiler.model import Pi0
from duq.runtime.config import GemmaConfig, ModelConfig, VisionConfig
from duq.runtime.preprocess import ModelInputs

SILENT = Progress(disable=True)


def tiny_config(pi05: bool = False, depth: int = 3) -> ModelConfig:
    """4 tokens an image, two key/value heads, and widths that blocks of 64 do not divide."""
    return ModelConfig(
        pi05=pi05,
        vision=VisionConfig(width=48, depth=2, mlp_width=80, heads=2, image_size=28),
        llm=GemmaConfig(width=64, depth=depth, mlp_width=128, heads=4, kv_heads=2, head_dim=16),
        expert=GemmaConfig(width=32, depth=depth, mlp_width=96, heads=4, kv_heads=2, head_dim=16),
        vocab_size=50,
        action_dim=8,
        action_horizon=5,
        max_prompt_tokens=6,
    )


def tiny_checkpoint(pi05: bool = False, seed: int = 0, depth: int = 3) -> SimpleNamespace:
    """Weights N(0, 1 / K) with channels of unequal size, so that every factor of a transform differs from 1."""
    torch.manual_seed(seed)
    config = tiny_config(pi05, depth)
    weights = {}
    for name, tensor in Pi0(config).state_dict().items():
        weight = torch.randn(tensor.shape) / max(1, tensor[0].numel()) ** 0.5
        if tensor.dim() == 1:
            weight = (0.3 * weight) + (1.0 if "layer_norm" in name and name.endswith("weight") else 0.0)
        elif tensor.dim() == 2:
            weight = weight * (0.7 * torch.randn(tensor.shape[1])).exp()
        weights[name] = weight.to(torch.bfloat16)
    return SimpleNamespace(
        config=config, weights=weights, path="tiny", fingerprint=f"tiny{seed}", settings=Settings(), form=""
    )


def observation(config: ModelConfig, seed: int, cameras: int = 3) -> ModelInputs:
    random = np.random.default_rng(seed)
    size, length = config.vision.image_size, config.max_prompt_tokens
    present, prompt = np.arange(3) < cameras, np.arange(length) < length - 2
    return ModelInputs(
        images=random.uniform(0, 256, (3, size, size, 3)).astype(np.uint8) * present[:, None, None, None],
        image_mask=present,
        tokens=np.where(prompt, random.integers(1, config.vocab_size, length), 0),
        token_mask=prompt,
        state=random.standard_normal(config.action_dim).astype(np.float32),
    )


def sample_actions(model: torch.nn.Module, inputs: ModelInputs) -> torch.Tensor:
    config = model.config
    noise = torch.randn(1, config.action_horizon, config.action_dim, generator=torch.Generator().manual_seed(9))
    arrays = (inputs.pixels(), inputs.image_mask, inputs.tokens, inputs.token_mask, inputs.state)
    return model.sample_actions(*(torch.as_tensor(array)[None] for array in arrays), noise, num_steps=2)
