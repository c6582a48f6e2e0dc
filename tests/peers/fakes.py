"""An environment and a robot for LeRobot's commands, registered as `duq_fake`. Nothing in them is random but the images.

Importing this module registers both. A reward is the sum of an action, so that equal rewards are equal actions; the robot
keeps what it was sent.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import gymnasium as gym
import numpy as np
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs import EnvConfig
from lerobot.robots import Robot, RobotConfig

JOINTS = [
    f"{name}.0.pos" for name in ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
]
CAMERAS = ("front", "wrist")
SIDE, TASK, STEPS = 256, "pick up the red block", 7


def image(seed: int) -> np.ndarray:
    """Smooth, uint8 [SIDE, SIDE, 3]."""
    y, x = np.mgrid[:SIDE, :SIDE]
    phases = np.random.default_rng(seed).uniform(0, 6, 3)
    return np.stack([127 + 99 * np.sin(x / 19 + p) * np.cos(y / 17 + p) for p in phases], -1).astype(np.uint8)


class FakeEnv(gym.Env):
    """The state is what the actions before have added up to."""

    metadata = {"render_fps": 10, "render_modes": ["rgb_array"]}
    task = task_description = TASK

    def __init__(self, render_mode: str = "rgb_array"):
        self.render_mode, self._max_episode_steps = render_mode, STEPS
        pixels = gym.spaces.Box(0, 255, (SIDE, SIDE, 3), np.uint8)
        self.observation_space = gym.spaces.Dict(
            {
                "pixels": gym.spaces.Dict(dict.fromkeys(CAMERAS, pixels)),
                "agent_pos": gym.spaces.Box(-np.inf, np.inf, (6,), np.float64),
            }
        )
        self.action_space = gym.spaces.Box(-np.inf, np.inf, (6,), np.float32)

    def reset(self, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self._seed, self._state, self._steps = seed or 0, np.full(6, (seed or 0) % 7 / 10.0), 0
        return self._observation(), {"is_success": False}

    def step(self, action):
        self._state, self._steps = self._state + 0.01 * np.asarray(action, np.float64), self._steps + 1
        done = self._steps == STEPS
        return self._observation(), float(np.sum(action)), done, False, {"is_success": done}

    def render(self):
        return image(self._seed)

    def _observation(self):
        pixels = {name: image(100 * self._seed + 10 * self._steps + index) for index, name in enumerate(CAMERAS)}
        return {"pixels": pixels, "agent_pos": self._state.copy()}


gym.register("gym_duq_fake/Fake-v0", FakeEnv, max_episode_steps=STEPS)


@EnvConfig.register_subclass("duq_fake")
@dataclass
class FakeEnvConfig(EnvConfig):
    task: str | None = "Fake-v0"
    fps: int = 10
    features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {
            "action": PolicyFeature(FeatureType.ACTION, (6,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (6,)),
            **{f"pixels/{name}": PolicyFeature(FeatureType.VISUAL, (SIDE, SIDE, 3)) for name in CAMERAS},
        }
    )
    features_map: dict[str, str] = field(
        default_factory=lambda: {
            "action": "action",
            "agent_pos": "observation.state",
            **{f"pixels/{name}": f"observation.images.{name}" for name in CAMERAS},
        }
    )

    @property
    def gym_kwargs(self) -> dict:
        return {}


@RobotConfig.register_subclass("duq_fake")
@dataclass
class FakeRobotConfig(RobotConfig):
    pass


class FakeRobot(Robot):
    """Stands still: every observation is the same. sent: the actions of all robots, in their order; also lines of the file
    DUQ_FAKE_SENT."""

    config_class, name = FakeRobotConfig, "duq_fake"
    sent: list[np.ndarray] = []
    is_connected, is_calibrated = True, True

    @property
    def observation_features(self) -> dict:
        return dict.fromkeys(JOINTS, float) | dict.fromkeys(CAMERAS, (SIDE, SIDE, 3))

    @property
    def action_features(self) -> dict:
        return dict.fromkeys(JOINTS, float)

    def get_observation(self) -> dict:
        images = {name: image(index) for index, name in enumerate(CAMERAS)}
        return {name: 0.1 * index for index, name in enumerate(JOINTS)} | images

    def send_action(self, action: dict) -> dict:
        self.sent.append(np.array([action[name] for name in JOINTS], np.float32))
        if log := os.environ.get("DUQ_FAKE_SENT"):
            with open(log, "a") as file:
                print(self.sent[-1].tolist(), file=file)
        return action

    def connect(self, calibrate: bool = True) -> None: ...

    def disconnect(self) -> None: ...

    def calibrate(self) -> None: ...

    def configure(self) -> None: ...
