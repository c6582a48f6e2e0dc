"""Two plans on the same observations and noises: how far apart their actions are. Needs neither a checkpoint nor PyTorch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from duq.compiler.accuracy.metrics import Difference, by_dimension, difference, jerk
from duq.compiler.accuracy.thresholds import Thresholds
from duq.compiler.data import load_calibration, robot_mapping
from duq.plugins.errors import DuqError
from duq.runtime.cli_errors import warnings_printed
from duq.runtime.command_line import print_line, progress_bar
from duq.runtime.config import ModelConfig
from duq.runtime.executors import open_executor
from duq.runtime.inspect import settings_rows
from duq.runtime.plan import Plan
from duq.runtime.policy import preprocessor_of
from duq.runtime.preprocess import Preprocessor
from duq.runtime.robots import Robot
from duq.tools.made_up import robot_observations

MADE_UP = 8  # observations, where none are given


@dataclass
class Side:
    """What one plan answered.

    Attributes:
        normalized: as its model gives the actions that the robot reads, float32 [observations, H, dims].
        robot: the same in the robot's units; None where an observation is not a robot's.
    """

    normalized: np.ndarray
    robot: np.ndarray | None


def compare_plans(
    first: Path,
    second: Path,
    observations: Path | None,
    *,
    count: int | None,
    thresholds: Thresholds,
    threads: int | None,
    seed: int,
    as_json: bool,
) -> list[str]:
    """Prints how far the actions of `second` are from those of `first`; returns the thresholds that they are past."""
    plans = [Plan(path) for path in (first, second)]
    check_comparable(*plans)
    found = _observations(plans[0], observations, count, seed)
    if thresholds.max_robot_error is not None:
        check_robot_units(plans[0], found)
    with progress_bar() as progress:
        sides = [run(plan, found, threads, seed, progress) for plan in plans]
    summary = summarize(plans, *sides) | {
        "observations": "made up" if observations is None else str(observations),
        "count": len(found),
        "seed": seed,
    }
    failures = thresholds.failures(summary["by_observation"])
    if as_json:
        bounds = {name: bound for name, bound in asdict(thresholds).items() if bound is not None}
        more = {"thresholds": bounds, "failures": failures, "warnings": warnings_printed()}
        typer.echo(json.dumps(_finite(summary | more), indent=1))
    else:
        _print(summary)
    return failures


def check_comparable(first: Plan, second: Plan) -> None:
    """Raises DuqError unless both take the same observations and noise, and give the same actions."""
    configs = [ModelConfig.from_json(plan.manifest["model"]) for plan in (first, second)]
    robots = [_robot(plan) for plan in (first, second)]
    parts: dict[str, list[Any]] = {
        "action horizon": [config.action_horizon for config in configs],
        "action dimensions of the model": [config.action_dim for config in configs],
        "robot": [robot.name if robot else "none" for robot in robots],
        "actions": [", ".join(robot.action_names) if robot else "" for robot in robots],
        "units": [", ".join(robot.action_units) if robot else "" for robot in robots],
    }
    for what, (one, other) in parts.items():
        if one != other:
            raise DuqError(
                f"{first.path} and {second.path}: cannot be compared, for their {what} differ: {one} and {other}"
            )


def settings_that_differ(first: Plan, second: Plan) -> dict[str, list[str]]:
    """Setting -> its value in each plan: of those around the model, which change actions as quantization does."""
    one, other = ({name: value for name, value, _ in settings_rows(plan.manifest)} for plan in (first, second))
    return {name: [one.get(name, "-"), other.get(name, "-")] for name in one | other if one.get(name) != other.get(name)}


def check_robot_units(plan: Plan, observations: Sequence[dict[str, Any]]) -> None:
    """Raises DuqError where an observation is not one of the plan's robot, so that its actions have no units."""
    if any(_preprocessor(plan).is_bare(each) for each in observations):
        raise DuqError(
            f"--max-robot-error: there are observations that are not a robot's ({plan.path} is for "
            f"{plan.manifest['robot']}), whose actions have no units; bound normalized actions with --max-error"
        )


def run(plan: Plan, observations: Sequence[dict[str, Any]], threads: int | None, seed: int, progress: Progress) -> Side:
    """The plan's actions. The noise is drawn by `seed`, as a comparison with a checkpoint draws it."""
    preprocessor, executor = _preprocessor(plan), open_executor(plan, threads)
    config, normalized, robot = preprocessor.config, [], []
    for index, observation in enumerate(progress.track(observations, description=f"Running {plan.path.name}")):
        noise = np.random.default_rng([seed, index]).standard_normal((config.action_horizon, config.action_dim), np.float32)
        actions, _ = executor.run(preprocessor.model_inputs(observation), noise)
        normalized.append(actions[:, : preprocessor.action_dim])
        if not preprocessor.is_bare(observation):
            robot.append(preprocessor.robot_actions(actions, observation))
    return Side(np.stack(normalized), np.stack(robot) if len(robot) == len(normalized) else None)


def summarize(plans: Sequence[Plan], first: Side, second: Side) -> dict[str, Any]:
    """The measures in JSON types; "dimensions" are in the robot's units where "in_robot_units" says so."""
    described = _robot(plans[0])
    dims = first.normalized.shape[-1]
    names = described.action_names if described else tuple(str(index) for index in range(dims))
    units = (described.action_units if described else ()) or ("",) * dims
    shown, in_robot_units = (first.normalized, second.normalized), False
    if first.robot is not None and second.robot is not None:
        shown, in_robot_units = (first.robot, second.robot), True
    dimensions = [
        {"name": name, "unit": (unit or "-") if in_robot_units else "normalized", **_measures(found)}
        for name, unit, found in zip(names, units, by_dimension(*shown), strict=True)
    ]
    by_observation: list[dict[str, Any]] = [
        {"actions": _measures(difference(*pair))} for pair in zip(first.normalized, second.normalized, strict=True)
    ]
    if in_robot_units:
        for each, pair in zip(by_observation, zip(*shown, strict=True), strict=True):
            worst = names[int(np.argmax(np.abs(pair[0] - pair[1]).max(axis=0)))]
            each["robot_actions"] = _measures(difference(*pair)) | {"worst_dimension": worst}
    return {
        "first": _about(plans[0]),
        "second": _about(plans[1]),
        "settings_that_differ": settings_that_differ(*plans),
        "actions": _measures(difference(first.normalized, second.normalized)),
        "in_robot_units": in_robot_units,
        "dimensions": dimensions,
        "by_observation": by_observation,
        "jerk": {"first": jerk(shown[0]), "second": jerk(shown[1])},
    }


def _measures(found: Difference) -> dict[str, float]:
    return found.to_json() | {"rms_error": found.rms_error}


def _robot(plan: Plan) -> Robot | None:
    described = plan.manifest.get("robot_description")
    return Robot.from_json(described) if described else None


def _preprocessor(plan: Plan) -> Preprocessor:
    return preprocessor_of(plan, ModelConfig.from_json(plan.manifest["model"]))


def _about(plan: Plan) -> dict[str, Any]:
    manifest = plan.manifest
    return {
        "path": str(plan.path),
        "target": manifest["target"],
        "checkpoint": manifest["checkpoint"]["fingerprint"],
        "recipe": (manifest.get("quantization") or {}).get("recipe"),
    }


def _observations(plan: Plan, path: Path | None, count: int | None, seed: int) -> list[dict[str, Any]]:
    if path is None:
        return robot_observations(plan, count or MADE_UP, seed)
    found = load_calibration(path, count, seed, robot_mapping(_preprocessor(plan).robot))
    for line in (*found.shown, *(f"warning: {each}" for each in found.warnings)):
        print_line(line)
    return found.observations


def _print(summary: dict[str, Any]) -> None:
    console = Console(highlight=False, markup=False)
    first, second = summary["first"]["path"], summary["second"]["path"]
    console.print(f"{second} against {first}, {summary['count']} observations, {summary['observations']}", soft_wrap=True)
    if summary["first"]["checkpoint"] != summary["second"]["checkpoint"]:
        console.print("note: they were compiled from different weights", soft_wrap=True)
    if differing := summary["settings_that_differ"]:
        table = Table("setting", first, second, title="Settings that differ", title_justify="left")
        for name, values in differing.items():
            table.add_row(name, *values)
        console.print(table)
    table = Table("action", "unit", title="Error of the actions", title_justify="left")
    for column in ("max", "RMS", "SQNR"):
        table.add_column(column, justify="right")
    for each in summary["dimensions"]:
        table.add_row(each["name"], each["unit"], *_cells(each))
    table.add_section()
    table.add_row("all", "normalized", *_cells(summary["actions"]))
    console.print(table)


def _cells(found: dict[str, float]) -> tuple[str, str, str]:
    sqnr = "equal" if found["sqnr_db"] == math.inf else f"{found['sqnr_db']:.1f} dB"
    return f"{found['max_error']:.3g}", f"{found['rms_error']:.3g}", sqnr


def _finite(value: Any) -> Any:
    """JSON has no infinity: null stands for it."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
