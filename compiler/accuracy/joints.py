"""The error of every joint, in the robot's units and as a share of the range that the joint works in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from duq.compiler.accuracy.metrics import Difference, by_dimension, difference

NORMAL_RANGE = 4.65  # standard deviations between the 1st and the 99th percentile of a normal distribution
LEAST_RANGE = 2.0  # of any distribution of two values, such as a gripper's; a joint that seldom moves has less
UNIT_RANGE = 2.0  # what normalization by quantiles or by extremes maps to -1..1
PERCENTILE = 99.0


def working_range(norm_stats: Mapping[str, Any] | None, dims: int, pi05: bool) -> tuple[np.ndarray, str]:
    """The width of each joint's range in the training data, in normalized units, float64 [dims]; and how it is known.

    norm_stats: the plan's (see compiler.checkpoint.norm_stats), or None. By quantiles or extremes, the range between them
    is -1..1. By mean and deviation it is that of the 1st to the 99th percentile, from the statistics where they hold both,
    else that of a normal distribution. Without statistics it is -1..1, the narrowest of these.
    """
    stats = (norm_stats or {}).get("actions") or {"mode": "IDENTITY"}
    if stats.get("mode", "QUANTILES" if pi05 else "MEAN_STD") != "MEAN_STD":
        return np.full(dims, UNIT_RANGE), f"{_named(stats)}: -1..1 of the normalized actions"
    if stats.get("q01") is None or stats.get("q99") is None or stats.get("std") is None:
        return np.full(dims, NORMAL_RANGE), f"{NORMAL_RANGE} standard deviations of the normalized actions"
    q01, q99, std = (np.asarray(stats[key], np.float64)[:dims] for key in ("q01", "q99", "std"))
    known = np.divide(q99 - q01, std, out=np.full(std.shape, NORMAL_RANGE), where=std > 0)
    widths = np.full(dims, NORMAL_RANGE)  # statistics may be narrower than what a plan without a robot gives
    widths[: known.size] = np.maximum(known, LEAST_RANGE)
    return widths, "1st to 99th percentile of the training data"


def _named(stats: Mapping[str, Any]) -> str:
    names = {"MIN_MAX": "minimum to maximum", "QUANTILE10": "10th to 90th percentile", "IDENTITY": "no normalization"}
    return names.get(stats.get("mode", ""), "1st to 99th percentile")


def joints_json(
    names: Sequence[str],
    units: Sequence[str],
    ranges: np.ndarray,
    normalized: tuple[np.ndarray, np.ndarray],
    robot: tuple[np.ndarray, np.ndarray] | None,
) -> list[dict]:
    """One dict a joint: "name", "unit"; "normalized" and "robot", its errors in either units (None without a robot's);
    "range", the width of its working range in normalized units, and "percent_of_range", the normalized errors as its share.

    normalized, robot: reference and engine, [observations, H, dims] each.
    """
    robots = [_errors(*pair) for pair in _by_joint(*robot)] if robot else [None] * len(names)
    found = []
    for name, unit, width, pair, in_robot_units in zip(names, units, ranges, _by_joint(*normalized), robots, strict=True):
        errors = _errors(*pair)
        shares = {key: 100 * errors[f"{key}_error"] / float(width) for key in ("rms", "p99", "max")}
        found.append(
            {
                "name": name,
                "unit": unit,
                "normalized": errors,
                "robot": in_robot_units,
                "range": float(width),
                "percent_of_range": shares,
            }
        )
    return found


def along_the_chunk(reference: np.ndarray, engine: np.ndarray, ranges: np.ndarray) -> list[float]:
    """Root mean square error of each of the H actions, over joints and observations, in percent of the joints' ranges."""
    shares = 100 * (engine.astype(np.float64) - reference) / ranges
    return [float(value) for value in np.sqrt(np.square(shares).mean((0, 2)))]


def furthest_off(reference: np.ndarray, engine: np.ndarray) -> int:
    """The dimension of [H, dims] with the largest error; one that is not finite is larger than any."""
    return int(np.argmax([found.max_error for found in by_dimension(reference, engine)]))


def _by_joint(reference: np.ndarray, engine: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(reference[..., index], engine[..., index]) for index in range(reference.shape[-1])]


def _errors(reference: np.ndarray, engine: np.ndarray) -> dict:
    found: Difference = difference(reference, engine)
    p99 = float(np.percentile(np.abs(engine.astype(np.float64) - reference), PERCENTILE))
    return {"max_error": found.max_error, "p99_error": p99, "rms_error": found.rms_error, "sqnr_db": found.sqnr_db}
