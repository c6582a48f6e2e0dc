"""Observations that nobody saw, of any plan: to time it, or to compare two. They say nothing about how well a policy does."""

from __future__ import annotations

from typing import Any

import numpy as np

from duq.runtime.config import IMAGE_SLOTS, ModelConfig
from duq.runtime.plan import Plan
from duq.runtime.robots import Robot

Observation = dict[str, Any]


def bare_observation(config: ModelConfig, cameras: int, prompt_tokens: int, seed: int = 0) -> Observation:
    """Bare model inputs of these sizes, on which alone the time depends: random images, state and tokens."""
    random, size = np.random.default_rng(seed), config.vision.image_size
    return {
        "image": {slot: random.integers(0, 256, (size, size, 3), np.uint8) for slot in IMAGE_SLOTS[:cameras]},
        "state": random.standard_normal(config.state_width).astype(np.float32),
        **_prompt(config, prompt_tokens, random),
    }


def robot_observations(plan: Plan, count: int, seed: int = 0) -> list[Observation]:
    """Observations as the plan's robot makes them, with states as its statistics have them and prompts from full to short.

    Bare model inputs, with all its cameras, of a plan without a robot.
    """
    config, random = ModelConfig.from_json(plan.manifest["model"]), np.random.default_rng(seed)
    lengths = np.linspace(config.max_prompt_tokens, 1, count).astype(int)
    described = plan.manifest.get("robot_description")
    if not described:
        return [
            bare_observation(config, plan.manifest["cameras"], int(length), seed + index)
            for index, length in enumerate(lengths)
        ]
    robot, stats = Robot.from_json(described), (plan.manifest.get("norm_stats") or {}).get("state") or {}
    return [_of_robot(robot, stats, config, plan.manifest["cameras"], int(length), random) for length in lengths]


def _of_robot(
    robot: Robot, stats: dict[str, Any], config: ModelConfig, cameras: int, length: int, random: np.random.Generator
) -> Observation:
    observation: Observation = {}
    size = config.vision.image_size
    for camera in robot.cameras[:cameras]:
        image = np.kron(random.integers(0, 256, (size // 8, size // 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        _put(observation, camera.key, image.transpose(2, 0, 1) if camera.layout == "CHW" else image)
    state = _state(robot.state_dim, stats, random)
    for part in robot.state:
        own, state = np.split(state, [len(part.names)])
        _put(observation, part.key, own)
    return observation | _prompt(config, length, random)


def _state(dims: int, stats: dict[str, Any], random: np.random.Generator) -> np.ndarray:
    """float32 [dims], of the mean and standard deviation that the plan was normalized by; 0 and 1 where it says none."""
    mean, std = np.zeros(dims), np.ones(dims)
    for values, found in ((mean, stats.get("mean")), (std, stats.get("std"))):
        if found is not None:
            known = np.asarray(found, np.float64).ravel()[:dims]
            values[: known.size] = known
    return (mean + std * random.uniform(-1, 1, dims)).astype(np.float32)


def _put(observation: Observation, key: tuple[str, ...], value: np.ndarray) -> None:
    *outer, last = key
    for name in outer:
        observation = observation.setdefault(name, {})
    observation[last] = value


def _prompt(config: ModelConfig, length: int, random: np.random.Generator) -> Observation:
    return {
        "tokenized_prompt": random.integers(1, config.vocab_size, length),
        "tokenized_prompt_mask": np.ones(length, bool),
    }
