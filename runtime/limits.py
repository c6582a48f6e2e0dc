"""Actions outside of a robot's limits: found, counted and said once, never changed."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from duq.runtime.robots import Robot

log = logging.getLogger(__name__)
_counting = threading.Lock()


class LimitCheck:
    """Of one robot. counts: name of an action -> chunks in which it was outside; may be shared by several."""

    def __init__(self, robot: Robot, counts: Counter[str] | None = None):
        self.counts: Counter[str] = Counter() if counts is None else counts
        self._robot = robot
        self._low, self._high = _bounds(robot.limits, robot.action_names)

    def outside(self, actions: np.ndarray) -> list[dict[str, Any]]:
        """What of a chunk, float32 [H, action_dim] in the robot's units, is outside, by action, in plain JSON types:

        {"action": name, "low", "high": the limits, "steps": how many are outside, "first": the first of them, "worst": the
        value farthest out}.
        """
        beyond = np.maximum(self._low - actions, actions - self._high)
        found = [self._one(dim, actions[:, dim], beyond[:, dim]) for dim in np.flatnonzero((beyond > 0).any(0)).tolist()]
        for each in found:
            self._count(each)
        return found

    def _one(self, dim: int, values: np.ndarray, beyond: np.ndarray) -> dict[str, Any]:
        name, steps = self._robot.action_names[dim], np.flatnonzero(beyond > 0)
        low, high = self._robot.limits[name]
        worst = float(values[beyond.argmax()])
        return {"action": name, "low": low, "high": high, "steps": len(steps), "first": int(steps[0]), "worst": worst}

    def _count(self, found: Mapping[str, Any]) -> None:
        with _counting:
            self.counts[found["action"]] += 1
            count = self.counts[found["action"]]
        if count == 1:
            log.warning(
                "robot %s: action %s is %.6g at step %d, outside of %.6g..%.6g (said once; it is sent as it is)",
                self._robot.name, found["action"], found["worst"], found["first"], found["low"], found["high"],
            )  # fmt: skip


def _bounds(limits: Mapping[str, tuple[float, float]], names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """float32 [action_dim] each, as the actions are: a limit of 1.1 is not passed by an action of 1.1."""
    nothing = (-np.inf, np.inf)
    low, high = np.array([limits.get(name, nothing) for name in names], np.float32).T
    return low, high
