"""A policy for Meta-World's observations, small enough to train in a test."""

from __future__ import annotations

from dataclasses import replace

from duq.runtime.config import GemmaConfig, VisionConfig
from examples import train_metaworld

SIZE, HORIZON = 28, 4


GEMMA = GemmaConfig(width=32, depth=2, mlp_width=64, heads=2, kv_heads=1, head_dim=16)


TINY = replace(
    train_metaworld.POLICY,
    vision=VisionConfig(width=32, depth=1, mlp_width=32, heads=2, image_size=SIZE),
    llm=GEMMA,
    expert=GEMMA,
    action_dim=8,
    action_horizon=HORIZON,
)
