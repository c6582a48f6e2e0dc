"""The comparison: the same observations and noise through the PyTorch reference and through the engine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.progress import Progress

from duq.compiler.accuracy.joints import along_the_chunk, furthest_off, joints_json, working_range
from duq.compiler.accuracy.metrics import difference, jerk
from duq.compiler.accuracy.provenance import machine, now, versions
from duq.compiler.accuracy.reference import reference_solver
from duq.compiler.accuracy.stages import Stages
from duq.compiler.accuracy.worker import passes, read_arrays, run_worker, write_inputs
from duq.compiler.checkpoint import Checkpoint
from duq.compiler.errors import CheckpointError, DuqError
from duq.compiler.manifest import value_basis_entry
from duq.runtime.config import ModelConfig
from duq.runtime.errors import ObservationError
from duq.runtime.plan import Plan
from duq.runtime.policy import preprocessor_of
from duq.runtime.preprocess import ModelInputs, Preprocessor
from duq.runtime.solver import Solver

# Chosen when compiling: the reference follows the plan, whatever the checkpoint's own are.
CHOSEN = ("action_horizon", "max_prompt_tokens", "rotary")
SQNR_SOURCE = "by the quantizer, on calibration rows held out from the fit"


@dataclass
class Comparison:
    """The measures, and what they were taken of.

    Attributes:
        summary: all measures in JSON types (see `compare`).
        reference, engine: the chunks as the model gives them, float32 [observations, H, dims]: the dims that are read.
        robot: the same in the robot's units; None where no observation is one of a robot.
    """

    summary: dict
    reference: np.ndarray
    engine: np.ndarray
    robot: RobotActions | None = None


def check_match(checkpoint: Checkpoint, plan: Plan, any_checkpoint: bool) -> None:
    """Raises CheckpointError if the plan was not compiled from this checkpoint.

    any_checkpoint: other weights of the same dimensions are welcome (the effect of fine-tuning, say).
    """
    compiled, found = _dimensions(_compiled_model(plan).to_json()), _dimensions(checkpoint.config.to_json())
    differing = [key for key in found if key not in CHOSEN and found[key] != compiled[key]]
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


def check_robot_units(plan: Plan, observations: Sequence[Mapping]) -> None:
    """Raises DuqError unless some observation is one of the plan's robot: bare model inputs give actions without units."""
    preprocessor = preprocessor_of(plan, _compiled_model(plan))
    if all(preprocessor.is_bare(each) for each in observations):
        raise DuqError(
            f"--max-robot-error: no observation is one of a robot (the plan's: {plan.manifest['robot']}), so no action has "
            "its units; give the robot's with --observations, or bound normalized actions with --max-error"
        )


def _compiled_model(plan: Plan) -> ModelConfig:
    return ModelConfig.from_json(plan.manifest["model"])


def _dimensions(config: dict) -> dict:
    """{"llm": {"width": 256}} as {"llm.width": 256}."""
    flat: dict[str, Any] = {}
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
    base: str | None = None,
) -> Comparison:
    """Runs both sides over the observations, one after the other, each in a process of its own.

    threads: of either side (None: one for each core that this process may use). seed: of the noise, one draw for each
    observation. base: of an adapter, where it was given.
    Raises ObservationError, before any long work, if an observation does not fit the plan.

    The actions of a plan by another solver than Euler's are compared with those of ten Euler steps (`reference_solver`), its
    velocities with those of its own solver, as are its actions in the stage "actions_same_solver".

    The summary's keys: "checkpoint", "plan", "reference" (its solver), "threads", "seed", "date", "machine", "versions";
    "stages": the measures (cosine, max_error, sqnr_db) of every stage over all observations; "layers" and "steps": the same for
    keys and values of each layer and velocities of each step; "observations": the same for the actions of each, and in the
    robot's units; "dimensions": errors of the actions that are read, one by one (see `joints_json`); "range": how the joints'
    ranges are known; "chunk": the error of each action of the chunk, in percent of the range; "linears"; "jerk"; "cost".
    Velocities and actions are those of the dimensions that the robot reads. The model's further ones are in
    "padding_dimensions" alone.
    """
    threads = threads or len(os.sched_getaffinity(0))
    config, solver = _compiled_model(plan), Solver.of(plan.manifest)
    its_own = reference_solver(solver)
    preprocessor = preprocessor_of(plan, config)
    inputs, count = model_inputs(preprocessor, observations), len(observations)
    with tempfile.TemporaryDirectory(prefix="duq-compare-") as name:
        directory = Path(name)
        for index, each in enumerate(inputs):
            random = np.random.default_rng([seed, index])
            noise = random.standard_normal((config.action_horizon, config.action_dim), np.float32)
            write_inputs(directory, index, each, noise)
        job = [directory, count, threads]
        adapted = [] if base is None else [base if "://" in base else Path(base).resolve()]
        cost = {
            "engine": _run("engine", [*job, plan.path.resolve()], count, progress),
            "reference": _run(
                "reference",
                [*job, checkpoint.path.resolve(), solver.name, solver.num_steps, config.rotary, *adapted],
                count,
                progress,
            ),
        }
        bases, dims = [_value_basis(plan, layer) for layer in range(config.llm.depth)], preprocessor.action_dim
        stages = Stages(solver, its_own == solver, bases, dims)
        for index in range(count):
            stages.add(*(read_arrays(directory / f"{side}.{index}.npz") for side in ("reference", "engine")))
    reference, engine = np.stack(stages.reference_actions), np.stack(stages.engine_actions)
    robot = RobotActions.of(preprocessor, observations, reference, engine)
    reference, engine = reference[..., :dims], engine[..., :dims]
    names, units = action_labels(preprocessor)
    ranges, range_basis = working_range(plan.manifest.get("norm_stats"), dims, config.pi05)
    per_observation = [
        {
            "cameras": int(each.image_mask.sum()),
            "prompt_tokens": int(each.token_mask.sum()),
            "actions": difference(reference[index], engine[index]).to_json(),
            "robot_actions": robot.measures(index, names) if robot else None,
        }
        for index, each in enumerate(inputs)
    ]
    summary = {
        "checkpoint": {
            "path": str(checkpoint.path),
            "layout": checkpoint.layout,
            "fingerprint": checkpoint.fingerprint,
        },
        "plan": {
            "path": str(plan.path),
            "bytes": plan.path.stat().st_size,
            **{key: plan.manifest[key] for key in ("target", "robot", "num_steps")},
            "solver": solver.name,
            "rotary": config.rotary,
            "recipe": plan.manifest["quantization"]["recipe"],
            "compiled_by": plan.manifest["created_by"],
        },
        "reference": {"solver": its_own.name, "num_steps": its_own.num_steps},
        "threads": threads,
        "seed": seed,
        "date": now(),
        "machine": machine(plan.manifest["target"]),
        "versions": versions(),
        **stages.to_json(),
        "observations": per_observation,
        "dimensions": joints_json(names, units, ranges, (reference, engine), robot.stacked() if robot else None),
        "range": range_basis,
        "chunk": along_the_chunk(reference, engine, ranges),
        "linears": _linears(plan),
        "jerk": {"model": {"reference": jerk(reference), "engine": jerk(engine)}, "robot": robot and robot.jerk()},
        "cost": cost | {"speedup": cost["reference"]["median_ms"] / cost["engine"]["median_ms"]},
    }
    if robot:
        summary["stages"]["robot_actions"] = difference(*robot.stacked()).to_json()
    return Comparison(summary, reference, engine, robot)


def action_labels(preprocessor: Preprocessor) -> tuple[list[str], list[str]]:
    """Names and units of the actions that are read; "action 0" and "" where the robot does not say."""
    dims = range(preprocessor.action_dim)
    names = getattr(preprocessor.robot, "action_names", None) or [f"action {index}" for index in dims]
    units = getattr(preprocessor.robot, "action_units", None) or [""] * len(dims)
    return list(names), list(units)


@dataclass
class RobotActions:
    """Both sides' chunks [H, dims] in the robot's units, by the index of their observation."""

    reference: dict[int, np.ndarray] = field(default_factory=dict)
    engine: dict[int, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, preprocessor: Preprocessor, observations, reference, engine) -> RobotActions | None:
        """None where no observation is one of a robot: actions for bare model inputs have no units."""
        found, convert = cls(), preprocessor.robot_actions
        for index, observation in enumerate(observations):
            if not preprocessor.is_bare(observation):
                found.reference[index] = convert(reference[index], observation)
                found.engine[index] = convert(engine[index], observation)
        return found if found.reference else None

    def stacked(self) -> tuple[np.ndarray, np.ndarray]:
        """Reference and engine, [robot's observations, H, dims] each."""
        return np.stack(list(self.reference.values())), np.stack(list(self.engine.values()))

    def measures(self, index: int, names: Sequence[str]) -> dict | None:
        """Of one observation, and the name of the dimension that is furthest off; None where it is not a robot's."""
        if index not in self.reference:
            return None
        reference, engine = self.reference[index], self.engine[index]
        return difference(reference, engine).to_json() | {"worst_dimension": names[furthest_off(reference, engine)]}

    def jerk(self) -> dict:
        reference, engine = self.stacked()
        return {"reference": jerk(reference), "engine": jerk(engine)}


def _run(side: str, arguments: list, count: int, progress: Progress) -> dict:
    task = progress.add_task(f"Running the {side}", total=passes(count))
    cost = run_worker(f"duq.compiler.accuracy.{side}", arguments, lambda: progress.advance(task))
    return {"median_ms": median(cost["milliseconds"]), **cost}


def _value_basis(plan: Plan, layer: int) -> np.ndarray | None:
    entry = value_basis_entry(layer)
    if entry not in plan.names:
        return None
    basis = np.frombuffer(plan.read(entry), np.float32)
    return basis.reshape(int(basis.size**0.5), -1)


def _linears(plan: Plan) -> dict:
    """The SQNR of each quantized linear as the plan records it, worst first."""
    linears = plan.manifest["quantization"]["linears"]
    unknown = {name for name, linear in linears.items() if linear["sqnr_db"] is None}  # of packs that do not say
    by_sqnr = sorted(linears.keys() - unknown, key=lambda name: linears[name]["sqnr_db"])
    keys = ("weight_bits", "activation_bits", "shape", "sqnr_db")
    return {"measured": SQNR_SOURCE, "sqnr": {name: {key: linears[name][key] for key in keys} for name in by_sqnr}}
