"""What a checkpoint says about the policy around its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from duq.runtime.robots import Robot


@dataclass(frozen=True)
class Settings:
    """Settings that change the numbers, as far as a checkpoint's files say them; None, or a key that is absent: they don't.

    transforms: keys of `runtime.transforms`. robot: the robot that the checkpoint's own features, or its training config,
    describe. asset_id, config: whose norm stats, and the name of the openpi training config. rotary: of
    `runtime.config.ROTARY`. lerobot_version: "0.3", "0.4" or "0.5" (and later); padded_state_dims and square_images: what
    the difference between them depends on. ignored: keys of config.json whose meaning is not known, as "key: value".
    loop: what LeRobot's loop around the policy goes by, which changes no chunk (`lerobot.loop_settings`).
    """

    num_steps: int | None = None
    action_horizon: int | None = None
    max_prompt_tokens: int | None = None
    transforms: dict[str, Any] = field(default_factory=dict)
    robot: Robot | None = None
    asset_id: str | None = None
    config: str | None = None
    rotary: str | None = None
    lerobot_version: str | None = None
    padded_state_dims: int = 32
    square_images: bool = False
    ignored: tuple[str, ...] = ()
    loop: dict[str, Any] | None = None
