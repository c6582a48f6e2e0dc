"""Made-up observations: for trying a comparison, not for judging a policy, which they are nothing like."""

from __future__ import annotations

import numpy as np
from PIL import Image

from duq.runtime.config import IMAGE_SLOTS, ModelConfig


def synthetic_observations(config: ModelConfig, cameras: int, count: int = 3, seed: int = 0) -> list[dict]:
    """Bare model inputs with 1 to `cameras` blurred random images, N(0, 1) states and prompts from short to full."""
    random = np.random.default_rng(seed)
    lengths = np.linspace(config.max_prompt_tokens, 1, count).astype(int)
    return [_observation(config, 1 + index % cameras, length, random) for index, length in enumerate(lengths)]


def _observation(config: ModelConfig, cameras: int, length: int, random: np.random.Generator) -> dict:
    return {
        "image": {slot: _image(config.vision.image_size, random) for slot in IMAGE_SLOTS[:cameras]},
        "state": random.standard_normal(config.state_width).astype(np.float32),
        "tokenized_prompt": random.integers(1, config.vocab_size, length),
        "tokenized_prompt_mask": np.ones(length, bool),
    }


def _image(size: int, random: np.random.Generator) -> np.ndarray:
    coarse = random.integers(0, 256, (8, 8, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))
