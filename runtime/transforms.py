"""The settings around a model that change its numbers: one dict, in the manifest of every plan.

delta_actions: bool          the model's actions are relative to the state (which of them: delta_mask)
delta_mask: [bool] | None    None: those that the robot's description names
adapt_to_pi: bool            convert to Physical Intelligence's own joint space (the robot's description says how)
state_in_prompt: bool        pi0.5 writes the normalized state into the prompt
pad_state_in_prompt: int     padded with zeros to so many numbers before it is written; 0: as it is
default_prompt: str | None   for observations without one
prompt_text: str             how pi0's prompt is cleaned: "openpi", or "lerobot" (not at all)
resize: str                  how images come to the model's size: "openpi" (uint8, antialiased), or in float as
                             "lerobot" and its versions do (see runtime.images)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from duq.runtime.errors import PlanError
from duq.runtime.images import RULES
from duq.runtime.robots import Robot

TRANSFORMS = {
    "delta_actions": (bool,),
    "delta_mask": (list, tuple, type(None)),
    "adapt_to_pi": (bool,),
    "state_in_prompt": (bool,),
    "pad_state_in_prompt": (bool, int),
    "default_prompt": (str, type(None)),
    "prompt_text": (str,),
    "resize": (str,),
}
CHOICES = {"prompt_text": ("openpi", "lerobot"), "resize": RULES}


def default_transforms(robot: Robot | None, *, pi05: bool, layout: str) -> dict[str, Any]:
    """The settings of a policy whose checkpoint says no more than its layout ("openpi" or "lerobot") and its robot.

    The robot's own defaults are those of openpi's training configs; LeRobot's policies have none of them.
    """
    openpi = layout == "openpi"
    defaults = robot.defaults if robot and openpi else {}

    def said(name: str, otherwise: bool) -> bool:
        value = defaults.get(name, otherwise)
        return value["pi05" if pi05 else "pi0"] if isinstance(value, Mapping) else value

    return {
        "delta_actions": said("delta_actions", bool(openpi and robot and any(robot.delta))),
        "delta_mask": None,
        "adapt_to_pi": said("adapt_to_pi", False),
        "state_in_prompt": pi05 and said("state_in_prompt", True),
        "pad_state_in_prompt": 0,
        "default_prompt": robot.default_prompt if robot else None,
        "prompt_text": layout,
        "resize": layout,
    }


def checked(transforms: Mapping[str, Any]) -> dict[str, Any]:
    """The settings themselves. PlanError if one is unknown to this version or of the wrong type."""
    for name, value in transforms.items():
        if name not in TRANSFORMS:
            raise PlanError(f"transforms: the setting {name!r} is unknown to this duq; upgrade it or compile again")
        if not isinstance(value, TRANSFORMS[name]) or name in CHOICES and value not in CHOICES[name]:
            expected = CHOICES.get(name) or [kind.__name__ for kind in TRANSFORMS[name]]
            raise PlanError(f"transforms: {name} is {value!r}, expected {' or '.join(expected)}")
    return dict(transforms)
