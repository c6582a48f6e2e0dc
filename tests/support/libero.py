"""In place of LIBERO's simulator, and of processes around it."""

from __future__ import annotations

import os

import numpy as np

from duq.examples.libero import rollout
from duq.examples.libero.scene import CAMERAS

REPLIES: list = []


class FakeScene:
    """A task that is done after so many steps, whatever they are."""

    target = "soup"

    def __init__(self, done_at):
        self.done_at = done_at
        self.begin(None)

    def begin(self, start):
        self.start, self.actions, self.pushes, self.moved = start, [], [], None

    def step(self, action):
        self.actions.append(np.array(action))
        return len(self.actions) >= self.done_at

    def sim_state(self):
        return np.array([float(len(self.actions)), 0.5])

    def observation(self):
        images = {key: np.full((8, 8, 3), 128, np.uint8) for key in CAMERAS}
        return {**images, "observation/state": np.zeros(8, np.float32), "prompt": "pick the soup up"}

    def push(self, name, velocity):
        self.pushes.append((len(self.actions), name, velocity))

    def move_camera(self, offset):
        self.moved = offset

    class Expert:
        def __init__(self, scene):
            pass

        def action(self):
            return np.full(7, 0.25, np.float32)


class _SeededScene(FakeScene):
    """Seed 0 never succeeds, seed n after 6 + n steps."""

    def __init__(self):
        super().__init__(0)

    def begin(self, start):
        super().begin(start)
        if start is not None:
            self.done_at = 6 + start.seed if start.seed else 1000


def simulate(connection, conditions):
    scene = _SeededScene()
    rollout.held_scene = lambda *arguments: scene
    rollout.simulate(connection, conditions)


def failing(connection, conditions):
    def no_scene(*arguments):
        raise FileNotFoundError("no such scene")

    rollout.held_scene = no_scene
    rollout.simulate(connection, conditions)


def dying(connection, conditions):
    connection.recv()
    os._exit(1)
