"""How the flow is integrated from noise (t = 1) to actions (t = 0): explicit linear multistep methods.

A step of length h = 1 / num_steps evaluates the velocity once, and combines it with those of the steps before it:

    d_k = -h v(x_k, t_k)                                  the change that Euler would make
    x_{k+1} = x_k + b_0 d_k + b_1 d_{k-1} + ...           as many terms as the method's order

The first steps have fewer changes behind them, and take the method of the order that these permit: the first is Euler's.
Every user of a solver, from the PyTorch reference to the kernels' tables, has its coefficients from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

_ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12))
# Name -> (b_0, b_1, ...) of step 0, 1, ...; the last are those of all further steps.
SOLVERS = {"euler": _ADAMS_BASHFORTH[:1], "ab2": _ADAMS_BASHFORTH[:2], "ab3": _ADAMS_BASHFORTH[:3]}


@dataclass(frozen=True)
class Solver:
    """A method of SOLVERS, and in how many steps, of equal length, it crosses the flow. By default openpi's and LeRobot's."""

    name: str = "euler"
    num_steps: int = 10

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Solver:
        """A plan's; older plans, which do not say it, are Euler's."""
        return cls(manifest.get("solver", "euler"), manifest["num_steps"])

    @property
    def history(self) -> int:
        """How many earlier changes a step reads."""
        return len(SOLVERS[self.name]) - 1

    def coefficients(self) -> np.ndarray:
        """float32 [num_steps, 1 + history]: of each step, those of its own change and of earlier ones, the latest first."""
        rows = SOLVERS[self.name]
        table = np.zeros((self.num_steps, len(rows)), np.float32)
        for step in range(self.num_steps):
            row = rows[min(step, len(rows) - 1)]
            table[step, : len(row)] = row
        return table

    def velocities(self, states: np.ndarray) -> np.ndarray:
        """The velocities [num_steps, ...] that led through the states [num_steps + 1, ...] of the flow."""
        changes: list[np.ndarray] = []
        for row, step in zip(self.coefficients(), np.diff(states, axis=0), strict=True):
            earlier = sum(b * change for b, change in zip(row[1:], reversed(changes), strict=False))
            changes.append((step - earlier) / row[0])
        return -np.stack(changes) * np.float32(self.num_steps)

    def __str__(self) -> str:
        return f"{self.num_steps} {self.name} step{'s' * (self.num_steps != 1)}"
