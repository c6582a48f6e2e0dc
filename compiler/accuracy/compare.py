"""The comparison: the same observations and noise through the PyTorch reference and through the engine."""
from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime
import torch
from rich.progress import Progress

from compiler.accuracy.metrics import Difference, difference, jerk
from compiler.accuracy.stages import Stages
from compiler.accuracy.worker import passes, read_arrays, run_worker, write_inputs
from compiler.checkpoint import Checkpoint
from compiler.errors import CheckpointError
from compiler.pipeline import value_basis_entry
from runtime.config import ModelConfig
from runtime.errors import ObservationError
from runtime.plan import Plan
from runtime.policy import preprocessor_of
from runtime.preprocess import ModelInputs, Preprocessor

SQNR_SOURCE = "by the quantiser, on calibration rows held out from the fit"


@dataclass
class Comparison:
    """summary: all measures in JSON types (see `compare`); reference, engine: the action chunks [observations, H, A]."""

    summary: dict
    reference: np.ndarray
    engine: np.ndarray


def check_match(checkpoint: Checkpoint, plan: Plan, any_checkpoint: bool) -> None:
    """Raises CheckpointError if the plan was not compiled from this checkpoint.

    any_checkpoint: other weights of the same dimensions are welcome (the effect of fine-tuning, say).
    """
    compiled, found = _dimensions(plan.manifest["model"]), _dimensions(checkpoint.config.to_json())
    differing = [key for key in found if key != "action_horizon" and found[key] != compiled.get(key)]
    if differing:
        key = differing[0]
        raise CheckpointError(
            f"{checkpoint.path} has {key} {found[key]}, but {plan.path} was compiled for {compiled.get(key)}; "
            f"give its checkpoint, {plan.manifest['checkpoint']['path']}"
        )
    if not any_checkpoint and checkpoint.fingerprint != plan.manifest["checkpoint"]["fingerprint"]:
        raise CheckpointError(
            f"{checkpoint.path} has other weights than those that {plan.path} was compiled from "
            f"({plan.manifest['checkpoint']['path']}); to compare them all the same, say --any-checkpoint"
        )


def _dimensions(config: dict) -> dict:
    """{"llm": {"width": 256}} as {"llm.width": 256}."""
    flat = {}
    for key, value in config.items():
        flat |= {f"{key}.{inner}": found for inner, found in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def model_inputs(preprocessor: Preprocessor, observations: Sequence[Mapping]) -> list[ModelInputs]:
    """Converts all observations. ObservationError says which of them does not fit."""
    inputs = []
    for index, observation in enumerate(observations):
        try:
            inputs.append(preprocessor.model_inputs(observation))
        except ObservationError as error:
            raise ObservationError(f"observation {index}: {error}") from error
    return inputs


def compare(
    checkpoint: Checkpoint,
    plan: Plan,
    observations: Sequence[Mapping],
    progress: Progress,
    *,
    threads: int | None = None,
    seed: int = 0,
    asset_id: str | None = None,
) -> Comparison:
    """Runs both sides over the observations, one after the other, each in a process of its own.

    threads: of either side (None: one for each core that this process may use). seed: of the noise, one draw for each
    observation. Raises ObservationError, before any long work, if an observation does not fit the plan.

    The summary's keys: "checkpoint", "plan", "threads", "seed", "versions"; "stages": the measures (cosine, max_error,
    sqnr_db) of every stage over all observations; "layers" and "steps": the same for keys and values of each layer and
    velocities of each step; "observations": the same for the actions of each; "linears"; "jerk"; "cost".
    """
    threads = threads or len(os.sched_getaffinity(0))
    config, num_steps = ModelConfig.from_json(plan.manifest["model"]), plan.manifest["num_steps"]
    preprocessor = preprocessor_of(plan, config)
    inputs, count = model_inputs(preprocessor, observations), len(observations)
    with tempfile.TemporaryDirectory(prefix="duq-compare-") as name:
        directory = Path(name)
        for index, each in enumerate(inputs):
            noise = np.random.default_rng([seed, index]).standard_normal((config.action_horizon, config.action_dim), np.float32)
            write_inputs(directory, index, each, noise)
        job = [directory, count, threads]
        asset = [] if asset_id is None else [asset_id]
        cost = {
            "engine": _run("engine", [*job, plan.path.resolve()], count, progress),
            "reference": _run("reference", [*job, checkpoint.path.resolve(), num_steps, *asset], count, progress),
        }
        stages = Stages(num_steps, [_value_basis(plan, layer) for layer in range(config.llm.depth)])
        for index in range(count):
            stages.add(*(read_arrays(directory / f"{side}.{index}.npz") for side in ("reference", "engine")))
    reference, engine = np.stack(stages.reference_actions), np.stack(stages.engine_actions)
    robot = RobotActions.of(preprocessor, observations, reference, engine)
    per_observation = [
        {"cameras": int(i.image_mask.sum()), "prompt_tokens": int(i.token_mask.sum()), "actions": difference(r, e).to_json()}
        for i, r, e in zip(inputs, reference, engine)
    ]
    summary = {
        "checkpoint": {"path": str(checkpoint.path), "layout": checkpoint.layout},
        "plan": {
            "path": str(plan.path),
            "bytes": plan.path.stat().st_size,
            **{key: plan.manifest[key] for key in ("target", "robot", "num_steps")},
            "recipe": plan.manifest["quantization"]["recipe"],
        },
        "threads": threads,
        "seed": seed,
        "versions": {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__},
        **stages.to_json(),
        "observations": per_observation,
        "linears": _linears(plan),
        "jerk": {"model": {"reference": jerk(reference), "engine": jerk(engine)}, "robot": robot and robot.jerk()},
        "cost": cost | {"speedup": cost["reference"]["median_ms"] / cost["engine"]["median_ms"]},
    }
    if robot:
        summary["stages"]["robot_actions"] = robot.difference().to_json()
    return Comparison(summary, reference, engine)


@dataclass
class RobotActions:
    """Both sides' chunks as the robot takes them: un-normalised, absolute, cut to its dims. Lists of [H, dims]."""

    reference: list[np.ndarray]
    engine: list[np.ndarray]

    @classmethod
    def of(cls, preprocessor: Preprocessor, observations, reference, engine) -> "RobotActions | None":
        """None where no observation is one of a robot: actions for bare model inputs have no units."""
        own = [index for index, each in enumerate(observations) if not preprocessor.is_bare(each)]
        convert = preprocessor.robot_actions
        chunks = ([convert(side[index], observations[index]) for index in own] for side in (reference, engine))
        return cls(*chunks) if own else None

    def difference(self) -> Difference:
        return difference(np.stack(self.reference), np.stack(self.engine))

    def jerk(self) -> dict:
        return {"reference": jerk(np.stack(self.reference)), "engine": jerk(np.stack(self.engine))}


def _run(side: str, arguments: list, count: int, progress: Progress) -> dict:
    task = progress.add_task(f"Running the {side}", total=passes(count))
    cost = run_worker(f"compiler.accuracy.{side}", arguments, lambda: progress.advance(task))
    return {"median_ms": median(cost["milliseconds"]), **cost}


def _value_basis(plan: Plan, layer: int) -> np.ndarray | None:
    entry = value_basis_entry(layer)
    if entry not in plan.names:
        return None
    basis = np.frombuffer(plan.read(entry), np.float32)
    return basis.reshape(int(basis.size**0.5), -1)


def _linears(plan: Plan) -> dict:
    """The SQNR of each quantised linear as the plan records it, worst first."""
    linears = plan.manifest["quantization"]["linears"]
    by_sqnr = sorted(linears, key=lambda name: linears[name]["sqnr_db"])
    keys = ("weight_bits", "activation_bits", "shape", "sqnr_db")
    return {"measured": SQNR_SOURCE, "sqnr": {name: {key: linears[name][key] for key in keys} for name in by_sqnr}}
