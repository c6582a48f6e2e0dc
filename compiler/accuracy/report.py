"""The comparison for readers: JSON, and one HTML page with its figures inside."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from duq.compiler.accuracy import plots
from duq.compiler.accuracy.compare import Comparison
from duq.runtime.files import write_text

WORST_LINEARS = 10
# What each stage compares, in the order of computation.
STAGES = {
    "image_features": "SigLIP and projector: image tokens of the cameras that are there",
    "keys": "all layers' rotated keys of the valid prefix tokens and pi0's state token",
    "values": "all layers' values of the same tokens, in the checkpoint's basis",
    "velocity_at_engine_x": "v of every step, both sides at the x that the engine reached",
    "velocity": "v of every step, each side at the x that it reached itself",
    "actions": "the chunk, normalized as the model gives it, in the dimensions that the robot reads",
    "robot_actions": "the chunk in the robot's units, all dimensions together",
}


def to_json(comparison: Comparison, failures: Sequence[str]) -> str:
    """The summary and "failures", the broken thresholds. What is infinite or NaN is null."""
    return json.dumps(_finite({**comparison.summary, "failures": list(failures)}), indent=1, allow_nan=False)


def write_report(comparison: Comparison, failures: Sequence[str], path: Path) -> None:
    """Writes the page whole or not at all. It loads nothing from elsewhere. Raises DuqError where it cannot be written."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"decibels": decibels, "number": number, "megabytes": megabytes}
    page = environment.get_template("report.html").render(
        **comparison.summary,
        failures=failures,
        descriptions=STAGES,
        worst=list(comparison.summary["linears"]["sqnr"].items())[:WORST_LINEARS],
        worst_observation=plots.worst_observation(comparison),
        drawn_units=plots.drawn_units(comparison),
        dimension_table=dimension_table(comparison.summary),
        figures={draw.__name__: draw(comparison) for draw in plots.FIGURES},
    )
    write_text(path, page)


def dimension_table(summary: dict) -> list[tuple[str, str, dict]]:
    """Name, unit and measures of each action that the robot reads: in its units, or normalized where no observation is its.

    Empty without a robot, whose plans give what the model computes.
    """
    if summary["plan"]["robot"] == "none":
        return []
    return [
        (each["name"], (each["unit"] or "-") if each["robot"] else "normalized", each["robot"] or each["normalized"])
        for each in summary["dimensions"]
    ]


def decibels(value: float) -> str:
    return "equal" if value == math.inf else f"{value:.1f} dB"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
