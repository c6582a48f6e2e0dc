"""A small pi0 and pi0.5, and the observations on which this project's model is compared with LeRobot's.

Both sides import this file, in different environments, so it needs nothing but NumPy, and all numbers come from
`RandomState`, whose stream NumPy has frozen. The head sizes are the real ones: 72 in SigLIP, 8 query heads of 256 on
one key/value head in both Gemmas.
"""

from __future__ import annotations

import zlib

import numpy as np

VISION = dict(width=144, depth=2, mlp_width=4304, heads=2)
LLM = dict(width=96, depth=3, mlp_width=128, heads=8, kv_heads=1, head_dim=256)
EXPERT = dict(width=64, depth=3, mlp_width=96, heads=8, kv_heads=1, head_dim=256)
VOCAB_SIZE = 512
ACTION_DIM = 32
ACTION_HORIZON = 10
NUM_STEPS = 10
PROMPT_SLOTS = {"pi0": 48, "pi05": 200}

# One batch element each: which cameras are there, and how many prompt tokens (None fills every slot).
CASES = {
    "one camera, short prompt": ((True, False, False), 5),
    "two cameras, short prompt": ((True, True, False), 9),
    "masked camera between two others": ((True, False, True), 12),
    "three cameras, full prompt": ((True, True, True), None),
}


def weight(openpi_name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 tensor of that name: unit gain for matrices, noticeable gains, biases and modulations elsewhere."""
    if len(shape) == 1:
        scale = 0.2
    elif "position_embedding" in openpi_name:
        scale = 0.5
    elif ".dense." in openpi_name:  # adaptive norms: scale, shift and gate
        scale = 0.5 / shape[1] ** 0.5
    else:
        scale = 1.0 / np.prod(shape[1:]) ** 0.5
    random = np.random.RandomState(zlib.crc32(openpi_name.encode()))
    return (random.standard_normal(shape) * scale).astype(np.float32)


def observations(variant: str) -> dict[str, np.ndarray]:
    """All CASES as one batch, with noise. Masked cameras and padding hold garbage, which must not matter."""
    batch, slots = len(CASES), PROMPT_SLOTS[variant]
    random = np.random.RandomState(7)
    lengths = [slots if length is None else length for _, length in CASES.values()]
    return {
        "images": random.uniform(-1, 1, (batch, 3, 3, 224, 224)).astype(np.float32),
        "image_mask": np.array([cameras for cameras, _ in CASES.values()]),
        "tokens": random.randint(0, VOCAB_SIZE, (batch, slots)).astype(np.int64),
        "token_mask": np.arange(slots) < np.array(lengths)[:, None],
        "state": random.standard_normal((batch, ACTION_DIM)).astype(np.float32),
        "noise": random.standard_normal((batch, ACTION_HORIZON, ACTION_DIM)).astype(np.float32),
    }
