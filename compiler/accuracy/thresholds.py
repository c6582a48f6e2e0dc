"""When a comparison has failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from duq.plugins.errors import DuqError


@dataclass(frozen=True)
class Thresholds:
    """Bounds which the actions of every observation have to keep; None is no bound.

    All are on the normalized actions that the robot reads, but max_robot_error, which is in the robot's units and on the
    observations that are a robot's. DuqError for a bound that is not finite, which would always or never be kept.
    """

    min_cosine: float | None = None
    max_error: float | None = None
    min_sqnr: float | None = None
    max_robot_error: float | None = None

    def __post_init__(self) -> None:
        for name, bound in vars(self).items():
            if bound is not None and not np.isfinite(bound):
                raise DuqError(f"--{name.replace('_', '-')} {bound}: must be a finite number")

    def failures(self, observations: Sequence[Mapping]) -> list[str]:
        """A line for each bound that is broken, about the observation that breaks it most. NaN breaks every bound."""
        failures = []
        for stage, key, bound, sign, flag in (
            ("actions", "cosine", self.min_cosine, 1, "--min-cosine"),
            ("actions", "max_error", self.max_error, -1, "--max-error"),
            ("actions", "sqnr_db", self.min_sqnr, 1, "--min-sqnr"),
            ("robot_actions", "max_error", self.max_robot_error, -1, "--max-robot-error"),
        ):
            measured = {index: each[stage] for index, each in enumerate(observations) if each.get(stage)}
            if bound is None or not measured:
                continue
            margins = [sign * found[key] for found in measured.values()]
            worst = list(measured)[int(np.argmin(margins))]  # NaN, if there is one
            found = measured[worst][key]
            if not sign * found >= sign * bound:
                where = f" ({measured[worst]['worst_dimension']})" if stage == "robot_actions" else ""
                name = stage.replace("_", " ")
                failures.append(f"{name} of observation {worst}: {key} {found:.6g}{where} is past {flag} {bound:g}")
        for index, observation in enumerate(observations):
            if np.isnan(observation["actions"]["cosine"]):
                failures.append(f"actions of observation {index} are not finite")
        return failures
