"""A Meta-World task as a robot sees it: two cameras, its own hand, an instruction.

Observations are bare model inputs (runtime/preprocess.py), which every plan takes, whatever its robot:

    image/base_0_rgb        uint8 [S, S, 3]: the table from its corner
    image/left_wrist_0_rgb  uint8 [S, S, 3]: between the fingers
    state                   float32 [4]: the hand's x, y, z, -1 to 1 over its workspace; the gripper, -1 closed to 1 open
    prompt                  str

An action is [4]: x, y, z in centimeters to move by, and the gripper, -1 opens and 1 closes; each is clipped to -1..1.
"""

from __future__ import annotations

import os
import warnings

import numpy as np

os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a display; mujoco reads it when it is imported
import mujoco
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.policies import ENV_POLICY_MAP

warnings.filterwarnings("ignore", "Constant", module="metaworld.policies")  # the experts' actions are clipped, as is usual

# The target of each is an object: the goals of Meta-World's other tasks are dots of one or two pixels.
PROMPTS = {
    "button-press": "press the button",
    "button-press-topdown": "press the button from above",
    "coffee-button": "press the button of the coffee machine",
    "door-open": "open the door",
    "drawer-close": "close the drawer",
    "drawer-open": "open the drawer",
    "handle-press": "press the handle down",
    "window-close": "close the window",
    "window-open": "open the window",
}
ACTION_DIM = 4
_CAMERAS = {"base_0_rgb": "corner2", "left_wrist_0_rgb": "gripperPOV"}


class MetaworldEnv:
    """One of the tasks in PROMPTS. `reset` first. Use it, and free it with `close`, in the thread that made it.

    image_size: of the cameras, in pixels; a policy resizes what it is given, so its own size saves work.
    """

    def __init__(self, task: str, image_size: int = 224):
        self._prompt = PROMPTS[task]
        self._env = ALL_V3_ENVIRONMENTS[f"{task}-v3"]()
        self._env._set_task_called, self._env._freeze_rand_vec, self._env.seeded_rand_vec = True, False, True
        self._expert = ENV_POLICY_MAP[f"{task}-v3"]()
        model = self._env.model
        model.vis.quality.offsamples = 0  # without antialiasing, shadows and reflections an image takes a tenth of the time
        model.camera("corner2").pos[:] = 0.75, 0.075, 0.7  # as usual in image-based Meta-World: nearer to the table
        self._renderer = mujoco.Renderer(model, image_size, image_size)

    def reset(self, seed: int) -> None:
        """A fresh start: the seed alone determines where the object and the hand are."""
        self._env.seed(seed)
        self._sensors, _ = self._env.reset()  # [39]: hand, gripper, objects; the policy sees the first four only

    def step(self, action: np.ndarray) -> bool:
        """Moves for one control period, 1/80 s of simulated time. Whether the task is done."""
        self._sensors, _, _, _, info = self._env.step(np.clip(action, -1, 1))
        return bool(info["success"])

    def observation(self) -> dict:
        return {
            "image": {slot: self._render(camera) for slot, camera in _CAMERAS.items()},
            "state": self._state(),
            "prompt": self._prompt,
        }

    def expert_action(self) -> np.ndarray:
        """What Meta-World's scripted expert does now: it knows where the object is. float32 [4]"""
        return np.clip(self._expert.get_action(self._sensors), -1, 1).astype(np.float32)

    def close(self) -> None:
        self._renderer.close()
        self._env.close()

    def _state(self) -> np.ndarray:
        low, high = np.append(self._env.mocap_low, 0), np.append(self._env.mocap_high, 1)
        return ((self._sensors[:4] - low) / (high - low) * 2 - 1).astype(np.float32)

    def _render(self, camera: str) -> np.ndarray:
        self._renderer.update_scene(self._env.data, camera)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._renderer.scene.flags[flag] = False  # update_scene sets them
        image = self._renderer.render()
        return np.ascontiguousarray(image[::-1]) if camera == "corner2" else image  # that camera hangs upside down
