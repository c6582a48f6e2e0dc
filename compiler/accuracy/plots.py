"""The report's figures, each an SVG as a data URI, so that the page stands on its own."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

from duq.compiler.accuracy.compare import Comparison, RobotActions
from duq.compiler.errors import DuqError
from duq.runtime.files import check_output_file, replacing

REFERENCE, ENGINE, ACCENT = "#9aa5b1", "#1f6feb", "#d9822b"
STYLE = {
    "svg.fonttype": "none",  # the reader's own sans-serif
    "svg.hashsalt": "duq",  # equal figures give equal bytes
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a94a0",
    "axes.labelcolor": "#3d4852",
    "axes.titlesize": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ed",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}
PARTS = {"vision": "#7b61a8", "llm": ENGINE, "expert": ACCENT}  # of linears, by the first part of their names
TRAJECTORIES = 16  # the most dimensions to draw, each in a panel
PANELS = 4  # in a row
BINS = 61


def figure(width: float, height: float) -> Callable:
    """Turns a function that draws on a matplotlib figure into one that returns its data URI."""

    def decorate(draw: Callable[[Figure, Comparison], None]) -> Callable[[Comparison], str]:
        @wraps(draw)
        def drawn(comparison: Comparison) -> str:
            with matplotlib.rc_context(STYLE):
                canvas, svg = Figure(figsize=(width, height), layout="constrained"), io.BytesIO()
                draw(canvas, comparison)
                canvas.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
            return "data:image/svg+xml;base64," + base64.b64encode(svg.getvalue()).decode()

        return drawn

    return decorate


@figure(7.2, 2.6)
def stage_sqnr(canvas: Figure, comparison: Comparison) -> None:
    stages = comparison.summary["stages"]
    names = [name for name in stages if name != "velocity"][::-1]
    values = [_drawable(stages[name]["sqnr_db"]) for name in names]
    axes = canvas.subplots()
    bars = axes.barh([name.replace("_", " ") for name in names], values, color=ENGINE, height=0.62)
    axes.bar_label(bars, [f"{value:.1f}" for value in values], padding=4, color="#3d4852")
    axes.set_xlabel("SQNR, dB")
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12)


@figure(4.6, 2.8)
def layers(canvas: Figure, comparison: Comparison) -> None:
    axes = canvas.subplots()
    found = comparison.summary["layers"]
    for kind, color in (("key", ENGINE), ("value", ACCENT)):
        _line(axes, range(len(found)), [layer[kind]["sqnr_db"] for layer in found], kind + "s", color)
    axes.set(xlabel="layer", ylabel="SQNR, dB")
    axes.legend()


@figure(4.6, 2.8)
def steps(canvas: Figure, comparison: Comparison) -> None:
    axes = canvas.subplots()
    found = comparison.summary["steps"]
    for kind, label, color in (
        ("velocity", "each side at its own x", ENGINE),
        ("velocity_at_engine_x", "both at the engine's x", ACCENT),
    ):
        _line(axes, range(len(found)), [step[kind]["sqnr_db"] for step in found], label, color)
    axes.set(xlabel="denoising step", ylabel="SQNR of v, dB")
    axes.legend()


@figure(9.4, 4.2)
def trajectories(canvas: Figure, comparison: Comparison) -> None:
    """The observation with the largest error, in the robot's units if it is a robot's; of many dimensions the worst."""
    reference, engine = _worst_chunks(comparison)
    errors = np.nan_to_num(np.abs(engine - reference).max(0), nan=np.inf)
    drawn = sorted(np.argsort(-errors, kind="stable")[:TRAJECTORIES])
    rows = -(-len(drawn) // PANELS)
    canvas.set_size_inches(9.4, 1.0 + 1.6 * rows)
    panels = canvas.subplots(rows, PANELS, sharex=True, squeeze=False).flatten()
    for dim, axes in zip(drawn, panels, strict=False):
        axes.plot(reference[:, dim], color=REFERENCE, linewidth=3.2, label="PyTorch fp32")
        axes.plot(engine[:, dim], color=ENGINE, linewidth=1.2, label="engine")
        axes.set_title(_label(comparison, dim), loc="left")
    for axes in panels[len(drawn) :]:
        axes.set_visible(False)
    canvas.supxlabel("action of the chunk", fontsize=9)
    canvas.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)


@figure(4.6, 2.8)
def errors(canvas: Figure, comparison: Comparison) -> None:
    axes = canvas.subplots()
    found = (comparison.engine - comparison.reference).ravel()
    axes.hist(found[np.isfinite(found)], bins=BINS, color=ENGINE)
    axes.set(xlabel="engine - reference, normalized actions", ylabel="values", yscale="log")


@figure(4.6, 2.8)
def linears(canvas: Figure, comparison: Comparison) -> None:
    axes = canvas.subplots()
    found = comparison.summary["linears"]["sqnr"]
    parts = [name.partition(".")[0] for name in found]
    for part, color in PARTS.items():
        own = [rank for rank, other in enumerate(parts) if other == part]
        if own:
            values = [_drawable(list(found.values())[rank]["sqnr_db"]) for rank in own]
            axes.scatter(own, values, s=11, color=color, label=part)
    axes.set(xlabel="linears, worst first", ylabel="SQNR, dB")
    if found:
        axes.legend(loc="lower right")


FIGURES = (stage_sqnr, layers, steps, trajectories, errors, linears)


def worst_observation(comparison: Comparison) -> int:
    return int(np.argmax([observation["actions"]["max_error"] for observation in comparison.summary["observations"]]))


def drawn_units(comparison: Comparison) -> str:
    """The units of `trajectories`."""
    return "the robot's units" if _in_robot_units(comparison) else "normalized units"


def _in_robot_units(comparison: Comparison) -> bool:
    return comparison.robot is not None and worst_observation(comparison) in comparison.robot.reference


def _worst_chunks(comparison: Comparison) -> tuple[np.ndarray, np.ndarray]:
    """Reference and engine [H, dims] of the worst observation."""
    source: RobotActions | Comparison = comparison
    if comparison.robot is not None and _in_robot_units(comparison):
        source = comparison.robot
    worst = worst_observation(comparison)
    return source.reference[worst], source.engine[worst]


def _label(comparison: Comparison, dim: int) -> str:
    """A dimension's name, and its unit where it is drawn in the robot's."""
    found = comparison.summary["dimensions"][dim]
    return f"{found['name']}, {found['unit']}" if found["unit"] and _in_robot_units(comparison) else found["name"]


def _line(axes: Axes, x, values: list[float], label: str, color: str) -> None:
    axes.plot(x, [_drawable(value) for value in values], "o-", markersize=3.5, color=color, label=label)
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]


def _drawable(sqnr_db: float) -> float:
    """Equal values have an infinite SQNR, which is not drawn."""
    return sqnr_db if np.isfinite(sqnr_db) else np.nan


def check_figure(flag: str, file: Path) -> None:
    """Raises DuqError, before the work that is to be drawn, if `save_figure` cannot write the file."""
    check_output_file(flag, file)
    if _form(file) not in FigureCanvasBase.get_supported_filetypes():
        raise DuqError(f"{flag} {file}: figures are not written as .{_form(file)}; name a .svg, .png or .pdf file")


def save_figure(figure: Figure, file: Path) -> None:
    """Writes a figure, whole or not at all, in the form that the name's ending says (PNG without one)."""
    with replacing(file) as opened:
        figure.savefig(opened, format=_form(file), metadata={"Date": None} if _form(file) == "svg" else None)


def _form(file: Path) -> str:
    return file.suffix.removeprefix(".").lower() or "png"
