"""Real-time chunking: what is left of the previous chunk guides the next one, so that the two fit together.

While a chunk is inferred, the robot executes the previous one. The new chunk's first actions (`delay`) lie in that time and
are fixed by then; those up to `horizon` may still change, but should not jump. Each has a weight, 1 where it is fixed, 0
where it is free. In every denoising step, at flow time t from 1 (noise) to 0 (actions), the predicted actions x - t v are
drawn towards the previous ones:

    v' = v - g(t) w (previous - (x - t v))      g(t) = min(t / (1 - t) * ((1 - t)^2 + t^2) / t^2, strength)

which is the rule of LeRobot's RTCProcessor: the gradient of the predicted actions is taken for the identity, so that no
step is run backwards. Where a plan runs all denoising steps as one unit, `blended` mixes the finished chunk instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from duq.runtime.errors import ObservationError

SCHEDULES = ("zeros", "ones", "linear", "exp")


def prefix_weights(schedule: str, delay: int, horizon: int, size: int) -> np.ndarray:
    """The weights of a chunk's actions, float32 [size]: 1 before `delay`, 0 from `horizon` on, in between by the schedule.

    "zeros": 0; "ones": 1; "linear": falling evenly, without the ends 1 and 0; "exp": w (e^w - 1) / (e - 1) of those.
    Raises ValueError for another schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r}: one of {', '.join(SCHEDULES)}")
    horizon = min(max(horizon, 0), size)
    delay = min(max(delay, 0), horizon)
    between = np.linspace(1, 0, horizon - delay + 2)[1:-1]
    if schedule == "zeros":
        between[:] = 0
    elif schedule == "ones":
        between[:] = 1
    elif schedule == "exp":
        between = between * np.expm1(between) / (np.e - 1)
    return np.concatenate([np.ones(delay), between, np.zeros(size - horizon)]).astype(np.float32)


@dataclass(frozen=True)
class Prefix:
    """What is left of the previous chunk, for `Policy.infer`.

    actions: [n, robot dims] in the robot's units, the first for the moment of the observation. weights: float32 [H], see
    `prefix_weights`; those beyond n must be 0. strength: the largest g(t).
    """

    actions: np.ndarray
    weights: np.ndarray
    strength: float = 10.0

    def check(self, horizon: int, dims: int) -> None:
        """Raises ObservationError unless it fits chunks of [horizon, dims]."""
        actions, weights = np.asarray(self.actions), np.asarray(self.weights)
        if actions.ndim != 2 or not 1 <= len(actions) <= horizon or actions.shape[1] != dims:
            raise ObservationError(f"prefix: actions are {list(actions.shape)}, expected [1 to {horizon}, {dims}]")
        if not np.isfinite(actions).all():
            raise ObservationError("prefix: actions are not finite")
        if weights.shape != (horizon,) or not (weights >= 0).all() or not (weights <= 1).all():
            raise ObservationError(f"prefix: weights are {list(weights.shape)}, expected [{horizon}] from 0 to 1")
        if weights[len(actions) :].any():
            raise ObservationError(f"prefix: weights reach beyond its {len(actions)} actions; end the horizon there")
        if not self.strength > 0:
            raise ObservationError(f"prefix: strength is {self.strength}, expected a positive number")


@dataclass(frozen=True)
class Guidance:
    """A prefix as the model sees it. target: float32 [H, A], normalized; weights: float32 [H, 1]."""

    target: np.ndarray
    weights: np.ndarray
    strength: float

    def correction(self, x: np.ndarray, change: np.ndarray, step: int, num_steps: int) -> np.ndarray:
        """What to add to the change of a denoising step, -v / num_steps at the state x; all float32 [H, A]."""
        time = 1 - step / num_steps
        velocity = -change * np.float32(num_steps)
        error = (self.target - (x - np.float32(time) * velocity)) * self.weights
        return np.float32(self._gain(time) / num_steps) * error

    def _gain(self, time: float) -> float:
        past = 1 - time
        if past <= 0:
            return self.strength
        return min(time / past * (past**2 + time**2) / time**2, self.strength)


def blended(actions: np.ndarray, prefix: Prefix) -> np.ndarray:
    """[H, dims] of both: w previous + (1 - w) new, in the robot's units, as `realtime.ChunkStream` blends chunks."""
    count = len(prefix.actions)
    weights = prefix.weights[:count, None]
    mixed = actions.copy()
    mixed[:count] = weights * prefix.actions + (1 - weights) * actions[:count]
    return mixed
