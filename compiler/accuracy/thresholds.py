"""When a comparison has failed."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Thresholds:
    """Bounds on the normalised actions, which every observation has to keep; None is no bound."""

    min_cosine: float | None = None
    max_error: float | None = None
    min_sqnr: float | None = None

    def failures(self, observations: Sequence[Mapping]) -> list[str]:
        """A line for each bound that is broken, about the observation that breaks it most. NaN breaks every bound."""
        failures = []
        for key, bound, sign, flag in (
            ("cosine", self.min_cosine, 1, "--min-cosine"),
            ("max_error", self.max_error, -1, "--max-error"),
            ("sqnr_db", self.min_sqnr, 1, "--min-sqnr"),
        ):
            margins = [sign * observation["actions"][key] for observation in observations]
            worst = int(np.argmin(margins))  # NaN, if there is one
            if bound is not None and not margins[worst] >= sign * bound:
                found = observations[worst]["actions"][key]
                failures.append(f"actions of observation {worst}: {key} {found:.6g} is past {flag} {bound:g}")
        for index, observation in enumerate(observations):
            if np.isnan(observation["actions"]["cosine"]):
                failures.append(f"actions of observation {index} are not finite")
        return failures
