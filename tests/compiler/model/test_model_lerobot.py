"""Whole policies against LeRobot's: peers/lerobot_actions.py wrote its answers (see there), this asks ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import duq.compiler.model.pi0
from duq.compiler.checkpoint.names import openpi_name
from duq.compiler.model import Pi0
from duq.runtime.config import GemmaConfig, ModelConfig, VisionConfig
from tests.peers import policy_cases as peer

ANSWERS = np.load(Path(__file__).parents[2] / "data" / "lerobot_actions.npz")


def lerobot_timesteps(num_steps: int) -> list[float]:
    """LeRobot counts 1 - k / n where openpi adds up float32: 1e-7 apart, which the time embedding magnifies 1600-fold."""
    return [float(np.float32(1.0 + k * (-1.0 / num_steps))) for k in range(num_steps)]


def build(variant: str) -> Pi0:
    model = Pi0(
        ModelConfig(
            pi05=variant == "pi05",
            vision=VisionConfig(**peer.VISION),
            llm=GemmaConfig(**peer.LLM),
            expert=GemmaConfig(**peer.EXPERT),
            vocab_size=peer.VOCAB_SIZE,
            action_dim=peer.ACTION_DIM,
            action_horizon=peer.ACTION_HORIZON,
            max_prompt_tokens=peer.PROMPT_SLOTS[variant],
        )
    )
    for name, parameter in model.named_parameters():
        parameter.data = torch.from_numpy(peer.weight(openpi_name(name), tuple(parameter.shape)))
    return model.eval()


def max_error(variant: str) -> dict[str, float]:
    """Of ten-step action chunks, whose values are of order 1, for each case of the batch."""
    batch = {name: torch.from_numpy(value) for name, value in peer.observations(variant).items()}
    actions = build(variant).sample_actions(**batch, num_steps=peer.NUM_STEPS).numpy()
    return dict(zip(peer.CASES, np.abs(actions - ANSWERS[variant]).max(axis=(1, 2)), strict=True))


@pytest.mark.parametrize("variant", ["pi0", "pi05"])
def test_actions_equal_lerobots(variant):
    for case, error in max_error(variant).items():
        assert error < 1e-4, case


@pytest.mark.parametrize("variant", ["pi0", "pi05"])
def test_actions_equal_lerobots_at_its_own_time_steps(variant, monkeypatch):
    monkeypatch.setattr(duq.compiler.model.pi0, "timesteps", lerobot_timesteps)
    for case, error in max_error(variant).items():
        assert error < 5e-6, case
