"""Observations of every form, and the dimensions of a policy that takes them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from duq.runtime.config import IMAGE_SLOTS, GemmaConfig, ModelConfig, VisionConfig

CONFIG = ModelConfig(
    pi05=False,
    vision=VisionConfig(32, 1, 64, 2, image_size=28),
    llm=GemmaConfig(32, 1, 64, 2, 1, 16),
    expert=GemmaConfig(32, 1, 64, 2, 1, 16),
    vocab_size=300,
)


PI05 = replace(CONFIG, pi05=True, max_prompt_tokens=200)


def bare_observation(**changes) -> dict:
    rng = np.random.default_rng(0)
    observation = {
        "image": {slot: rng.integers(0, 256, (28, 28, 3), np.uint8) for slot in IMAGE_SLOTS},
        "image_mask": {slot: True for slot in IMAGE_SLOTS},
        "state": rng.standard_normal(32).astype(np.float32),
        "tokenized_prompt": np.arange(5, dtype=np.int32),
        "tokenized_prompt_mask": np.ones(5, bool),
    }
    return {key: value for key, value in (observation | changes).items() if value is not None}


TOKENS = {"tokenized_prompt": np.arange(4), "tokenized_prompt_mask": np.ones(4, bool)}


def image(seed: int, shape=(28, 28, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def aloha() -> dict:
    state = np.linspace(-0.6, 0.7, 14)
    state[[6, 13]] = 0.25, 0.9
    cameras = ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")
    return {"state": state, "images": {name: image(i, (3, 28, 28)) for i, name in enumerate(cameras)}, **TOKENS}


def droid() -> dict:
    return {
        "observation/exterior_image_1_left": image(0),
        "observation/wrist_image_left": image(1),
        "observation/joint_position": np.linspace(-1, 1, 7),
        "observation/gripper_position": np.array([0.5]),
        **TOKENS,
    }


def libero() -> dict:
    return {
        "observation/image": image(0),
        "observation/wrist_image": image(1),
        "observation/state": np.linspace(-1, 1, 8).astype(np.float32),
        **TOKENS,
    }


OBSERVATIONS = {"aloha": aloha, "droid": droid, "libero": libero}


ACTION_DIMS = {"aloha": 14, "droid": 8, "libero": 7}
