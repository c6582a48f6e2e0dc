"""The comparison for readers: JSON, and one HTML page that needs nothing beside it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape

from duq.compiler.accuracy import charts
from duq.compiler.accuracy.compare import Comparison, RobotActions
from duq.compiler.accuracy.thresholds import with_unit
from duq.runtime.files import write_text

WORST_LINEARS = 10
MOST_JOINTS = 16  # to draw, each in a panel
MOST_OBSERVATIONS = 50  # to list
# What each stage compares, in the order of computation.
STAGES = {
    "image_features": "SigLIP and projector: image tokens of the cameras that are there",
    "keys": "all layers' rotated keys of the valid prefix tokens and pi0's state token",
    "values": "all layers' values of the same tokens, in the checkpoint's basis",
    "velocity_at_engine_x": "v of every step, both sides at the x that the engine reached",
    "velocity": "v of every step, each side at the x that it reached itself",
    "actions_same_solver": "the chunk, against PyTorch's by the plan's own solver and steps",
    "actions": "the chunk, normalized as the model gives it, in the dimensions that the robot reads",
    "robot_actions": "the chunk in the robot's units, all dimensions together",
}


def to_json(comparison: Comparison, failures: Sequence[str]) -> str:
    """The summary and "failures", the broken thresholds. What is infinite or NaN is null."""
    return json.dumps(_finite({**comparison.summary, "failures": list(failures)}), indent=1, allow_nan=False)


def write_report(comparison: Comparison, path: Path) -> None:
    """Writes the page whole or not at all. It loads nothing from elsewhere, and runs no scripts.

    The summary has its "verdict" (see `thresholds.judge`), its "source" and the "command" in it. Raises DuqError where the page
    cannot be written.
    """
    write_text(path, page(comparison))


def page(comparison: Comparison) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "decibels": decibels,
        "number": number,
        "megabytes": megabytes,
        "percent": percent,
        "cosine": cosine,
        "meter": meter,
        "with_unit": with_unit,
        "breakable": breakable,
    }
    summary = comparison.summary
    checks = {check["name"]: check for check in summary["verdict"]["checks"]}
    return environment.get_template("report.html").render(
        **summary,
        descriptions=STAGES,
        decibel_top=charts.DECIBELS[1],
        percent_top=_percent_top(summary, checks["joint-error"]),
        joint_check=checks["joint-error"],
        joint_table=joint_table(summary),
        worst=list(summary["linears"]["sqnr"].items())[:WORST_LINEARS],
        other_reasons=[
            line for line in summary["verdict"]["reasons"] if line not in {each["reason"] for each in checks.values()}
        ],
        bits=_bits(summary["linears"]["sqnr"]),
        listed_observations=_listed(summary["observations"]),
        drawn_observation=worst_observation(summary),
        drawn_units=drawn_units(comparison),
        panels=joint_panels(comparison),
        layer_chart=_layer_chart(summary),
        step_chart=_step_chart(summary),
        chunk_chart=_chunk_chart(summary),
        linear_chart=_linear_chart(summary),
    )


# --- tables ------------------------------------------------------------------------------------------------------------


def joint_table(summary: Mapping) -> list[tuple[str, str, dict, dict]]:
    """Name, unit, measures and percent of the range of each action that the robot reads: in its units, or normalized where
    no observation is its. Without a robot all that the model computes, normalized."""
    return [
        (
            each["name"],
            (each["unit"] or "-") if each["robot"] else "normalized",
            each["robot"] or each["normalized"],
            each["percent_of_range"],
        )
        for each in summary["dimensions"]
    ]


def _listed(observations: Sequence[Mapping]) -> list[tuple[int, Mapping]]:
    """Index and measures: all of them, or of many the worst; a page is for reading."""
    worst_first = sorted(enumerate(observations), key=lambda pair: -_sortable(pair[1]["actions"]["max_error"]))
    return sorted(worst_first[:MOST_OBSERVATIONS], key=lambda pair: pair[0])


def _sortable(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _bits(linears: Mapping) -> str:
    """As in "W4A8", "W4A8 and W8A8" or "float"."""
    kinds = {f"W{each['weight_bits']}A{each['activation_bits'] or 16}" for each in linears.values()}
    return " and ".join(sorted(kinds)) or "float"


def _percent_top(summary: Mapping, check: Mapping) -> float:
    """The end of the joints' bars: past the threshold, and past every bar that can be drawn."""
    shares = [joint["percent_of_range"]["rms"] for joint in summary["dimensions"]]
    return max([check["fail"] * 1.2, *(share for share in shares if math.isfinite(share))])


# --- charts ------------------------------------------------------------------------------------------------------------


def worst_observation(summary: Mapping) -> int:
    """With the largest error; one that is not finite is larger than any."""
    return int(np.argmax([observation["actions"]["max_error"] for observation in summary["observations"]]))


def drawn_units(comparison: Comparison) -> str:
    """The units of the panels."""
    return "the robot's units" if _in_robot_units(comparison) else "normalized units"


def joint_panels(comparison: Comparison) -> list[dict]:
    """Of the worst observation, a panel for each joint; of many joints for those with the largest errors.

    Each has "name", "unit", "max_error" (in the drawn units) and "chart".
    """
    reference, engine = _worst_chunks(comparison)
    errors = np.abs(engine.astype(np.float64) - reference).max(0)  # NaN, if there is one
    drawn = sorted(np.argsort(-np.nan_to_num(errors, nan=np.inf), kind="stable")[:MOST_JOINTS])
    panels = []
    for index in drawn:
        joint = comparison.summary["dimensions"][index]
        unit = joint["unit"] if _in_robot_units(comparison) else ""
        own = reference[:, index]
        summary = (
            f"{joint['name']}: PyTorch's actions go from {number(float(own.min()))} to {number(float(own.max()))} {unit}; "
            f"the engine's largest error is {number(float(errors[index]))}."
        )
        chart = charts.residual_panel(summary, own, engine[:, index])
        panels.append({"name": joint["name"], "unit": unit, "max_error": float(errors[index]), "chart": chart})
    return panels


def _in_robot_units(comparison: Comparison) -> bool:
    return comparison.robot is not None and worst_observation(comparison.summary) in comparison.robot.reference


def _worst_chunks(comparison: Comparison) -> tuple[np.ndarray, np.ndarray]:
    """Reference and engine [H, dims] of the worst observation."""
    source: RobotActions | Comparison = comparison
    if comparison.robot is not None and _in_robot_units(comparison):
        source = comparison.robot
    worst = worst_observation(comparison.summary)
    return source.reference[worst], source.engine[worst]


def _layer_chart(summary: Mapping) -> Markup:
    series = [
        charts.Series(f"{kind}s", [layer[kind]["sqnr_db"] for layer in summary["layers"]]) for kind in ("key", "value")
    ]
    return charts.decibel_lines(_spoken("SQNR of keys and values by layer", series), series, "layer")


def _step_chart(summary: Mapping) -> Markup:
    labels = {"velocity": "each at its own x", "velocity_at_engine_x": "at the engine's x"}
    series = [charts.Series(label, [step[key]["sqnr_db"] for step in summary["steps"]]) for key, label in labels.items()]
    return charts.decibel_lines(_spoken("SQNR of the velocity by denoising step", series), series, "denoising step")


def _chunk_chart(summary: Mapping) -> Markup:
    series = charts.Series("error", summary["chunk"])
    spoken = _spoken("Error of each action of the chunk", [series], "% of the range")
    return charts.zero_based_line(spoken, series, "action of the chunk", "% of range, RMS")


def _linear_chart(summary: Mapping) -> Markup | None:
    """None for a float plan."""
    found = summary["linears"]["sqnr"]
    by_part: dict[str, list[tuple[int, float]]] = {}
    for rank, (name, linear) in enumerate(found.items()):
        by_part.setdefault(name.partition(".")[0], []).append((rank, linear["sqnr_db"]))
    series = [charts.Series(part, [value for _, value in own], [rank for rank, _ in own]) for part, own in by_part.items()]
    spoken = _spoken("SQNR of each quantized linear", series)
    return charts.decibel_lines(spoken, series, "linears, worst first", joined=False) if found else None


def _spoken(title: str, series: Sequence[charts.Series], unit: str = "dB") -> str:
    """What a chart shows, for those who do not see it."""
    parts = [f"{each.label} {number(min(each.values))} to {number(max(each.values))} {unit}" for each in series]
    return f"{title}: {', '.join(parts)}."


# --- numbers -----------------------------------------------------------------------------------------------------------


def meter(value: float, top: float) -> float:
    """The length of a bar on an axis from 0 to `top`, in percent of the axis; 0 for NaN."""
    return 0.0 if math.isnan(value) else round(100 * min(max(value / top, 0.0), 1.0), 2)


def decibels(value: float) -> str:
    return "equal" if value == math.inf else _unless_nan(value, f"{value:.1f} dB")


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return _unless_nan(value, f"{value:,.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.3g}")


def cosine(value: float) -> str:
    return _unless_nan(value, f"{value:.5f}")


def percent(value: float) -> str:
    return _unless_nan(value, f"{value:.2g}%" if value < 10 else f"{value:.0f}%")


def _unless_nan(value: float, shown: str) -> str:
    return "not finite" if math.isnan(value) else shown


def breakable(name: str) -> Markup:
    """A long name that may be broken behind its dots and underscores."""
    return Markup(re.sub(r"([._])(?=.)", r"\1<wbr>", str(escape(name))))


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
