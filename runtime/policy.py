"""The policy: an opened plan that answers observations with actions."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from duq.runtime import checks
from duq.runtime.config import IMAGE_SLOTS, ModelConfig
from duq.runtime.errors import ObservationError, PlanError
from duq.runtime.executors import open_executor
from duq.runtime.guidance import Guidance, Prefix
from duq.runtime.plan import Plan
from duq.runtime.preprocess import Preprocessor
from duq.runtime.robots import Robot


class Policy:
    """A compiled policy with the interface of openpi's: `infer` takes and returns the same dicts.

    threads: CPU threads of the engine (None: all cores). verify: compare every hash of the plan while opening it.
    seed: of the noise that `infer` draws when it is given none. Raises PlanError if the plan cannot be used.
    One policy may be shared by threads; they take turns on the engine.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, threads: int | None = None, verify: bool = True, seed: int | None = None
    ):
        plan = Plan(path, verify)
        self._manifest = plan.manifest
        try:
            self._target = self._manifest["target"]
            self._config = ModelConfig.from_json(self._manifest["model"])
            self._preprocessor = preprocessor_of(plan, self._config)
        except (KeyError, TypeError) as error:
            raise PlanError(f"{plan.path}: its manifest is incomplete ({error}); compile it again") from error
        self._executor = open_executor(plan, threads)
        self._engine = threading.Lock()
        self._noise = np.random.default_rng(seed)

    @property
    def metadata(self) -> dict[str, Any]:
        """What a client may want to know of the policy, in plain JSON types; of a cuda plan also the "program" that runs."""
        program = getattr(self._executor, "program", None)  # no other target has several
        return {
            "robot": self._manifest["robot"],
            "model": "pi0.5" if self._config.pi05 else "pi0",
            "target": self._target,
            "num_steps": self._manifest["num_steps"],
            "cameras": self._preprocessor.cameras,
            "action_horizon": self._config.action_horizon,
            "action_dim": self._preprocessor.action_dim,
            "model_action_dim": self._config.action_dim,
            "max_prompt_tokens": self._config.max_prompt_tokens,
            "checkpoint": self._manifest["checkpoint"]["fingerprint"],
        } | ({"program": program.to_json()} if program else {})

    def warmup(self) -> None:
        """Does now what the first call would do once: page in the weights, allocate, import. Then no file is opened."""
        self._preprocessor.model_inputs(_blank_observation())
        with self._engine:
            self._executor.warmup()

    def infer(
        self, obs: Mapping[str, Any], noise: np.ndarray | None = None, *, prefix: Prefix | None = None
    ) -> dict[str, Any]:
        """An action chunk for one observation.

        obs: the robot's observation dict or bare model inputs (see `runtime.preprocess.Preprocessor`).
        noise: float32 [H, A], the start of the denoising; drawn if absent. The same noise gives the same actions.
        prefix: the rest of the previous chunk, which guides this one (runtime/guidance.py); PlanError unless `guided`.
        Returns {"actions": float32 [H, robot dims], "policy_timing": milliseconds: "infer_ms" is the whole call,
        "preprocess_ms", "prefix_ms", "denoise_ms" its parts; engines may add others}.
        Raises ObservationError, before any work of the model, if the observation does not fit.
        """
        start = time.perf_counter()
        inputs = self._preprocessor.model_inputs(obs)
        noise = self._draw_noise() if noise is None else self._checked_noise(noise)
        options: dict[str, Any] = {} if prefix is None else {"guidance": self._guidance(prefix, obs)}
        ready = time.perf_counter()
        with self._engine:
            actions, timing = self._executor.run(inputs, noise, **options)
        actions = self._preprocessor.robot_actions(actions, obs)
        end = time.perf_counter()
        timing = {"infer_ms": (end - start) * 1e3, "preprocess_ms": (ready - start) * 1e3, **timing}
        return {"actions": actions, "policy_timing": timing}

    @property
    def guided(self) -> bool:
        """Whether `infer` takes a prefix: the engine has to stop between two denoising steps."""
        return getattr(self._executor, "guided", False)

    def _guidance(self, prefix: Prefix, obs: Mapping[str, Any]) -> Guidance:
        if not self.guided:
            raise PlanError(
                f"prefix: a plan for {self._target} runs all denoising steps as one unit, which cannot be guided; compile for "
                "--target cpu, or mix the chunks with duq.runtime.guidance.blended"
            )
        horizon, width = self._noise_shape
        prefix.check(horizon, width if self._preprocessor.is_bare(obs) else self._preprocessor.action_dim)
        target = np.zeros(self._noise_shape, np.float32)
        target[: len(prefix.actions)] = self._preprocessor.model_actions(np.asarray(prefix.actions), obs)
        return Guidance(target, np.asarray(prefix.weights, np.float32)[:, None], prefix.strength)

    def _draw_noise(self) -> np.ndarray:
        return self._noise.standard_normal(self._noise_shape, np.float32)

    def _checked_noise(self, noise: np.ndarray) -> np.ndarray:
        expected = f"finite float32 {list(self._noise_shape)}"
        noise = checks.array(noise, "noise", expected)
        if noise.shape != self._noise_shape or noise.dtype != np.float32 or not np.isfinite(noise).all():
            raise ObservationError(f"noise: is {noise.dtype} {list(noise.shape)}, expected {expected}")
        return np.ascontiguousarray(noise)

    @property
    def _noise_shape(self) -> tuple[int, int]:
        return self._config.action_horizon, self._config.action_dim


def preprocessor_of(plan: Plan, config: ModelConfig) -> Preprocessor:
    """What the plan says about the conversion of observations, put to use."""
    manifest = plan.manifest
    return Preprocessor(
        config,
        robot=Robot.from_json(described) if (described := manifest.get("robot_description")) else manifest["robot"],
        layout=manifest["checkpoint"]["layout"],
        norm_stats=manifest["norm_stats"],
        tokenizer=bytes(plan.read("tokenizer.model")) if "tokenizer.model" in plan.names else None,
        cameras=manifest["cameras"],
        transforms=manifest.get("transforms"),
    )


def _blank_observation() -> dict[str, Any]:
    return {
        "image": {IMAGE_SLOTS[0]: np.zeros((32, 48, 3), np.uint8)},  # of a size that has to be resized
        "state": np.zeros(1, np.float32),
        "tokenized_prompt": np.zeros(1, np.int64),
        "tokenized_prompt_mask": np.ones(1, bool),
    }
