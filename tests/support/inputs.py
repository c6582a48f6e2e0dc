"""Inputs of a policy from a seed, what the reference model in PyTorch makes of them, and measures of the difference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from duq.runtime.preprocess import ModelInputs


def make_inputs(config, cameras=(True, True, False), prompt=9, seed=0) -> ModelInputs:
    rng = np.random.default_rng(seed)
    slots = np.arange(config.max_prompt_tokens)
    return ModelInputs(
        images=rng.uniform(0, 256, (3, config.vision.image_size, config.vision.image_size, 3)).astype(np.uint8),
        image_mask=np.array(cameras),
        tokens=rng.integers(0, config.vocab_size, config.max_prompt_tokens),
        token_mask=slots < prompt,
        state=rng.standard_normal(config.action_dim).astype(np.float32),
    )


def reference(model, inputs: ModelInputs, noise: np.ndarray, num_steps: int = 10) -> np.ndarray:
    fields = (inputs.pixels(), inputs.image_mask, inputs.tokens, inputs.token_mask, inputs.state, noise)
    return model.sample_actions(*(torch.from_numpy(field)[None] for field in fields), num_steps=num_steps)[0].numpy()


def make_noise(config) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((config.action_horizon, config.action_dim), np.float32)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b)))


def with_float_images(inputs: ModelInputs, seed: int = 0) -> ModelInputs:
    """Values that no byte stands for, and padding as LeRobot 0.4 has it."""
    images = np.random.default_rng(seed).uniform(-1, 1, inputs.images.shape).astype(np.float32)
    images[:, :5] = -3
    return replace(inputs, images=images)
