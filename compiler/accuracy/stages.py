"""The policy's stages from the images to the actions, each with what the engine gets wrong in it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from duq.compiler.accuracy.metrics import Difference
from duq.compiler.accuracy.worker import Arrays
from duq.compiler.model import timesteps
from duq.runtime.solver import Solver


class Stages:
    """Collects the differences of all stages, observation by observation.

    solver: the engine's; same_solver: whether the reference's actions are by it too. value_bases: by layer, the
    matrix that leads from the engine's values to the reference's, or None. dims: the leading dimensions of actions and
    velocities that are read; those behind them only pad, and are measured apart.
    """

    def __init__(self, solver: Solver, same_solver: bool, value_bases: Sequence[np.ndarray | None], dims: int):
        self.solver, self.same_solver, self.value_bases, self.dims = solver, same_solver, value_bases, dims
        self.features, self.actions, self.padding, self.by_solver = (Difference() for _ in range(4))
        self.keys, self.values = ([Difference() for _ in value_bases] for _ in range(2))
        self.velocities, self.at_engine_x = ([Difference() for _ in range(solver.num_steps)] for _ in range(2))
        self.reference_actions: list[np.ndarray] = []
        self.engine_actions: list[np.ndarray] = []

    def add(self, reference: Arrays, engine: Arrays) -> None:
        self.features.add(reference["image_features"], engine["image_features"])
        for layer, basis in enumerate(self.value_bases):
            values = engine[f"value.{layer}"]
            self.keys[layer].add(reference[f"key.{layer}"], engine[f"key.{layer}"])
            self.values[layer].add(reference[f"value.{layer}"], values if basis is None else _in_basis(values, basis))
        for step, velocity in enumerate(self.solver.velocities(engine["x"])):
            self.velocities[step].add(self._read(reference["v"][step]), self._read(velocity))
            self.at_engine_x[step].add(self._read(reference["v_at_engine_x"][step]), self._read(velocity))
        self.actions.add(self._read(reference["actions"]), self._read(engine["actions"]))
        if not self.same_solver:
            self.by_solver.add(self._read(reference["actions_same_solver"]), self._read(engine["actions"]))
        self.padding.add(reference["actions"][:, self.dims :], engine["actions"][:, self.dims :])
        self.reference_actions.append(reference["actions"])
        self.engine_actions.append(engine["actions"])

    def _read(self, values: np.ndarray) -> np.ndarray:
        """[H, A] -> [H, dims]."""
        return values[:, : self.dims]

    @property
    def padding_dims(self) -> int:
        return self.reference_actions[0].shape[-1] - self.dims

    def to_json(self) -> dict:
        stages = {
            "image_features": self.features,
            "keys": Difference.sum(self.keys),
            "values": Difference.sum(self.values),
            "velocity_at_engine_x": Difference.sum(self.at_engine_x),
            "velocity": Difference.sum(self.velocities),
            **({} if self.same_solver else {"actions_same_solver": self.by_solver}),
            "actions": self.actions,
        }
        return {
            "stages": {name: found.to_json() for name, found in stages.items()},
            "layers": [{"key": k.to_json(), "value": v.to_json()} for k, v in zip(self.keys, self.values, strict=True)],
            "steps": [
                {"time": time, "velocity": free.to_json(), "velocity_at_engine_x": forced.to_json()}
                for time, free, forced in zip(
                    timesteps(self.solver.num_steps), self.velocities, self.at_engine_x, strict=True
                )
            ],
            "padding_dimensions": {"count": self.padding_dims, **self.padding.to_json()} if self.padding_dims else None,
        }


def _in_basis(values: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """values [1, kv_heads, P, head_dim] times the matrix over all kv_heads * head_dim channels."""
    _, heads, tokens, dim = values.shape
    rows = values.transpose(0, 2, 1, 3).reshape(tokens, heads * dim) @ basis
    return rows.reshape(1, tokens, heads, dim).transpose(0, 2, 1, 3)
