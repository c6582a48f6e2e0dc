"""The figures of docs/accuracy.md; run, it makes both again from the tables there: `python tools/figures.py`.

duq-evaluate and duq-study-schemes draw the same with --plot, from what they measured.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # in a checkout; in tools/, profile.py would pass for the standard library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import matplotlib
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from duq.compiler.accuracy.rates import Interval, wilson
from duq.plugins.errors import DuqError
from duq.runtime.files import check_output_file, replacing

ENGINE, REFERENCE = "#1463c6", "#7a8794"
STYLE = {
    "svg.fonttype": "none",  # the reader's own sans-serif
    "svg.hashsalt": "duq",  # equal figures give equal bytes
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a94a0",
    "axes.labelcolor": "#3d4852",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ed",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}
DOCS = Path(__file__).resolve().parents[1] / "docs"


@dataclass(frozen=True)
class Success:
    """A scheme's success rate with its interval, 0..1, and its action error; `engine`: or PyTorch."""

    name: str
    rate: float
    interval: Interval
    action_error: float
    engine: bool


@dataclass(frozen=True)
class Divergence:
    """A scheme's KL divergence from fp32, nats per token; `balanced`: with the balance of duq's own scheme."""

    name: str
    kl: float
    perplexity: float
    balanced: bool


def draw_success(schemes: Sequence[Success], file: Path) -> None:
    """Success with its interval and, beside it, the error of the actions, both from zero."""
    with matplotlib.rc_context(STYLE):
        canvas = Figure(figsize=(7.6, 1.2 + 0.26 * len(schemes)), layout="constrained")
        success, error = canvas.subplots(1, 2, sharey=True, gridspec_kw={"wspace": 0.08})
        for row, scheme in enumerate(schemes):
            color, (low, high) = ENGINE if scheme.engine else REFERENCE, scheme.interval
            success.plot((100 * low, 100 * high), (row, row), color=color, linewidth=4, alpha=0.35, solid_capstyle="butt")
            success.plot(100 * scheme.rate, row, "o", color=color, markersize=4)
            error.barh(row, scheme.action_error, height=0.55, color=color)
        success.set(xlabel="episodes that succeed, %", xlim=(0, 103), yticks=range(len(schemes)))
        success.set_yticklabels([scheme.name for scheme in schemes])
        error.set(xlabel="RMS error of the actions (-1 to 1)", xlim=(0, None))
        for axes in (success, error):
            axes.grid(axis="y", visible=False)
        success.invert_yaxis()
        _legend(canvas, {"engine": ENGINE, "PyTorch": REFERENCE}, Line2D([], [], color="#56626f", linewidth=4, alpha=0.35))
        save_figure(canvas, file)


def draw_divergence(schemes: Sequence[Divergence], file: Path) -> None:
    """Dots on a logarithmic axis, which has no zero, with their numbers."""
    with matplotlib.rc_context(STYLE):
        canvas = Figure(figsize=(7.6, 1.2 + 0.24 * len(schemes)), layout="constrained")
        axes = canvas.subplots()
        for row, scheme in enumerate(schemes):
            axes.plot(scheme.kl, row, "o", color=ENGINE if scheme.balanced else REFERENCE, markersize=5)
            label = f"{scheme.kl:.3f}, perplexity {scheme.perplexity:.1f}"
            axes.annotate(label, (scheme.kl, row), (8, 0), textcoords="offset points", va="center")
        axes.set(xscale="log", xlabel="mean KL divergence from fp32, nats per token (logarithmic; less is better)")
        axes.set(yticks=range(len(schemes)), yticklabels=[scheme.name for scheme in schemes])
        axes.set_xlim(right=16 * max(scheme.kl for scheme in schemes))  # room for the labels
        axes.grid(axis="y", visible=False)
        axes.invert_yaxis()
        _legend(canvas, {"balanced, duq's default and its variants": ENGINE, "other schemes": REFERENCE})
        save_figure(canvas, file)


def _legend(canvas: Figure, colors: dict[str, str], interval: Line2D | None = None) -> None:
    handles = [Line2D([], [], marker="o", linestyle="", color=color, markersize=5) for color in colors.values()]
    labels = list(colors)
    if interval is not None:
        handles, labels = [*handles, interval], [*labels, "95 % interval"]
    canvas.legend(handles, labels, loc="outside upper center", ncols=len(labels))


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


# --- from the tables of docs/accuracy.md -------------------------------------------------------------------------------


def success_of_docs(page: str, episodes: int = 300) -> list[Success]:
    """The rows of the Meta-World policy's table with pushes, its last that has a column of success rates and one of SQNR."""
    rows = _rows(page, "| success, % | against fp32 | steps | action error | jerk | SQNR, dB |")[-1]
    found = []
    for name, success, _, _, error, *_ in rows:
        successes = round(float(success.split()[0]) * episodes / 100)
        engine = name not in ("fp32", "reference", "reference-all")
        found.append(Success(name, successes / episodes, wilson(successes, episodes), float(error), engine))
    return found


def divergence_of_docs(page: str) -> list[Divergence]:
    """The rows of the table of all schemes, the first with a column of divergences."""
    rows = _rows(page, "| KL to fp32 |")[0]
    return [
        Divergence(name, float(kl), float(perplexity), name.startswith("balanced"))
        for name, _, perplexity, kl, *_ in rows
        if kl
    ]


def _rows(page: str, column: str) -> list[list[list[str]]]:
    """The cells, without their markup, of every table that has this column."""
    tables = [table.splitlines()[2:] for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE) if column in table]
    return [[[re.sub(r"[*`]", "", cell).strip() for cell in row.strip("|").split("|")] for row in rows] for rows in tables]


def main() -> None:
    page = (DOCS / "accuracy.md").read_text()
    draw_success(success_of_docs(page), DOCS / "success.svg")
    draw_divergence(divergence_of_docs(page), DOCS / "accuracy.svg")


if __name__ == "__main__":
    main()
