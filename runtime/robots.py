"""The robots: how an observation of each names its cameras and joints, and what its actions mean.

The keys, shapes and conversions are those of openpi's policies, so that a client of an openpi server needs no change.
A camera other than the base camera may be absent; its slot is then masked off.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from runtime import checks
from runtime.config import IMAGE_SLOTS
from runtime.errors import ObservationError, PlanError


@dataclass(frozen=True)
class Robot:
    """One robot's side of the policy. Arrays are float64, in the units the norm stats were taken in.

    state(observation) -> [state_dim]; images(observation) -> {slot: uint8 [H, W, 3]} of the cameras that are there;
    actions([H, action_dim], state) -> [H, action_dim], from what the model was trained on to what the robot takes.
    """

    name: str
    state_dim: int
    action_dim: int
    state: Callable[[Mapping], np.ndarray]
    images: Callable[[Mapping], dict[str, np.ndarray]]
    actions: Callable[[np.ndarray, np.ndarray], np.ndarray]


def make_robot(name: str, *, delta_actions: bool, adapt_to_pi: bool) -> Robot | None:
    """The robot of that name; None for "none", which takes bare model inputs only.

    `delta_actions`: the model's joint actions are relative to the current state (grippers never are).
    `adapt_to_pi`: the model knows ALOHA in Physical Intelligence's own joint space (no effect on other robots).
    """
    if name == "none":
        return None
    if name not in _ROBOTS:
        raise PlanError(f"robot {name!r} is unknown; there are {', '.join(ROBOT_NAMES)}")
    return _ROBOTS[name](delta_actions, adapt_to_pi)


def default_transforms(name: str, *, pi05: bool, layout: str) -> dict[str, bool]:
    """How public checkpoints of this robot and checkpoint layout ("openpi" or "lerobot") were trained.

    delta_actions, adapt_to_pi: see `make_robot`. openpi's ALOHA policies predict deltas in adapted space, DROID's joint
    velocities; LIBERO data are deltas already, yet pi0 was trained with a second delta and pi0.5 was not.
    state_in_prompt: pi0.5 reads the state from the prompt, but openpi's LIBERO policy does without the state.
    pad_state_in_prompt: LeRobot writes the state there padded to the action dimension, openpi only its own dims.
    """
    openpi = layout == "openpi"
    return {
        "delta_actions": openpi and (name == "aloha" or name == "libero" and not pi05),
        "adapt_to_pi": openpi and name == "aloha",
        "state_in_prompt": pi05 and not (openpi and name == "libero"),
        "pad_state_in_prompt": not openpi,
    }


def _no_change(actions: np.ndarray, state: np.ndarray) -> np.ndarray:
    return actions


def _add_state(joints: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Relative to absolute actions where `joints` is true."""
    return lambda actions, state: actions + np.where(joints, state[: len(joints)], 0)


def _cameras(observation: Mapping, keys: dict[str, str], layout: str) -> dict[str, np.ndarray]:
    """The images of the cameras that are there, by slot; the base camera must be."""
    checks.required(observation, keys[IMAGE_SLOTS[0]])
    present = {slot: key for slot, key in keys.items() if key in observation}
    return {slot: checks.image(observation[key], key, layout) for slot, key in present.items()}


# --- LIBERO: a Franka arm in simulation; 8 state dims, 7 actions (6 of the end effector, gripper) ---------------------

_LIBERO_CAMERAS = {"base_0_rgb": "observation/image", "left_wrist_0_rgb": "observation/wrist_image"}


def _libero(delta_actions: bool, adapt_to_pi: bool) -> Robot:
    return Robot(
        name="libero",
        state_dim=8,
        action_dim=7,
        state=lambda observation: checks.vector(observation, "observation/state", 8),
        images=lambda observation: _cameras(observation, _LIBERO_CAMERAS, "any"),
        actions=_add_state(np.array([True] * 6 + [False])) if delta_actions else _no_change,
    )


# --- DROID: a Franka arm; 7 joints and a gripper ----------------------------------------------------------------------

_DROID_CAMERAS = {
    "base_0_rgb": "observation/exterior_image_1_left",
    "left_wrist_0_rgb": "observation/wrist_image_left",
}


def _droid_state(observation: Mapping) -> np.ndarray:
    joints = checks.vector(observation, "observation/joint_position", 7)
    return np.concatenate([joints, checks.vector(observation, "observation/gripper_position", 1)])


def _droid(delta_actions: bool, adapt_to_pi: bool) -> Robot:
    return Robot(
        name="droid",
        state_dim=8,
        action_dim=8,
        state=_droid_state,
        images=lambda observation: _cameras(observation, _DROID_CAMERAS, "any"),
        actions=_add_state(np.array([True] * 7 + [False])) if delta_actions else _no_change,
    )


# --- ALOHA: two arms of 6 joints and a gripper each -------------------------------------------------------------------

_ALOHA_CAMERAS = {
    "base_0_rgb": "cam_high",
    "left_wrist_0_rgb": "cam_left_wrist",
    "right_wrist_0_rgb": "cam_right_wrist",
}
_ALOHA_UNUSED = {"cam_low"}  # accepted, as openpi does, but the policies do not look through it
_GRIPPERS = [6, 13]
_JOINT_FLIP = np.array([1, -1, -1, 1, 1, 1, 1] * 2, np.float64)

# Units of the gripper. Interbotix maps the opening (m, between the two positions) to 0..1 and the horn's angle (rad,
# between the two joint limits) to 0..1; Physical Intelligence maps encoder counts 2405..3110 of 4096, zero at 2048.
_GRIPPER_CLOSED_M, _GRIPPER_OPEN_M = 0.01844, 0.05800
_GRIPPER_CLOSED_RAD, _GRIPPER_OPEN_RAD = -0.6213, 1.4910
_PI_CLOSED_RAD, _PI_OPEN_RAD = 0.5476, 1.6296
_ARM_LENGTH_M, _HORN_RADIUS_M = 0.036, 0.022


def _gripper_to_pi(opening: np.ndarray) -> np.ndarray:
    """ALOHA's linear gripper opening 0..1 -> the angle 0..1 of pi0's training data."""
    metres = opening * (_GRIPPER_OPEN_M - _GRIPPER_CLOSED_M) + _GRIPPER_CLOSED_M
    sine = (_HORN_RADIUS_M**2 + metres**2 - _ARM_LENGTH_M**2) / (2 * _HORN_RADIUS_M * metres)
    return (np.arcsin(np.clip(sine, -1, 1)) - _PI_CLOSED_RAD) / (_PI_OPEN_RAD - _PI_CLOSED_RAD)


def _gripper_from_pi(angle: np.ndarray) -> np.ndarray:
    """pi0's gripper command, already radians above its closed position -> ALOHA's joint range 0..1."""
    return (angle + _PI_CLOSED_RAD - _GRIPPER_CLOSED_RAD) / (_GRIPPER_OPEN_RAD - _GRIPPER_CLOSED_RAD)


def _state_to_pi(state: np.ndarray) -> np.ndarray:
    state = _JOINT_FLIP * state
    state[_GRIPPERS] = _gripper_to_pi(state[_GRIPPERS])
    return state


def _actions_from_pi(actions: np.ndarray) -> np.ndarray:
    actions = _JOINT_FLIP * actions
    actions[:, _GRIPPERS] = _gripper_from_pi(actions[:, _GRIPPERS])
    return actions


def _aloha_images(observation: Mapping) -> dict[str, np.ndarray]:
    images = checks.mapping(observation, "images")
    unknown = set(images) - set(_ALOHA_CAMERAS.values()) - _ALOHA_UNUSED
    if unknown:
        known = ", ".join(_ALOHA_CAMERAS.values())
        raise ObservationError(f"images: unknown camera {sorted(unknown)[0]!r}; ALOHA has {known}")
    return _cameras(images, _ALOHA_CAMERAS, "CHW")


def _aloha(delta_actions: bool, adapt_to_pi: bool) -> Robot:
    to_absolute = _add_state(np.array(([True] * 6 + [False]) * 2)) if delta_actions else _no_change

    def state(observation: Mapping) -> np.ndarray:
        joints = checks.vector(observation, "state", 14)
        return _state_to_pi(joints) if adapt_to_pi else joints

    def actions(predicted: np.ndarray, state: np.ndarray) -> np.ndarray:
        absolute = to_absolute(predicted, state)
        return _actions_from_pi(absolute) if adapt_to_pi else absolute

    return Robot("aloha", state_dim=14, action_dim=14, state=state, images=_aloha_images, actions=actions)


_ROBOTS = {"aloha": _aloha, "droid": _droid, "libero": _libero}
ROBOT_NAMES = (*_ROBOTS, "none")
