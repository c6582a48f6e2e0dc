"""Tables and a figure of what evaluate.py recorded: `python examples/libero/report.py --help`."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # the checkout
    from duq.commands import command

    command("report.py", "duq.examples.libero.report:main", "compile")()

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from duq.compiler.accuracy.rates import paired_difference, wilson
from duq.examples.libero.journal import Journal
from duq.plugins.errors import DuqError
from duq.runtime.cli_errors import check_output_file, one_line_errors
from duq.runtime.files import write_text
from duq.tools.figures import ENGINE, REFERENCE, STYLE, check_figure, save_figure

COLUMNS = ("success, %", "against {}", "McNemar's p", "steps", "action error", "jerk", "episodes")
Entry = dict[str, Any]  # a line of the journal

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


def key_of(entry: Entry) -> tuple:
    """Which episode: the policy's name, where, and under which stress."""
    return entry["arm"], *condition_of(entry), entry["task"], entry["seed"]


def condition_of(entry: Entry) -> tuple:
    """What all policies of one table have in common."""
    return entry["suite"], entry["places"], tuple(sorted(entry["stress"].items()))


def title_of(condition: tuple) -> str:
    suite, places, stress = condition
    units = {"noise": "/255 pixel noise", "camera": " m camera offset", "push": " m/s push"}
    stresses = [f"{value:g}{units[name]}" for name, value in stress if value]
    return ", ".join([suite, f"{places} places", *stresses])


@dataclass(frozen=True)
class Row:
    """A policy over all its episodes; what compares it with the reference is over those that both have, None without any.

    rate, interval: of success. difference, its interval and McNemar's exact p: of success, in pairs. steps: mean of those that
    succeeded. error: root mean square difference of the first chunks. jerk: mean over episodes."""

    arm: str
    episodes: int
    rate: float
    interval: tuple[float, float]
    difference: float | None
    difference_interval: tuple[float, float] | None
    p: float | None
    steps: float | None
    error: float | None
    jerk: float | None
    by_task: dict[int, float]


def mcnemar(reference: Sequence[bool], found: Sequence[bool]) -> float:
    """The exact two-sided p of pairs that differ falling so unevenly by chance."""
    lost = sum(r and not f for r, f in zip(reference, found, strict=True))
    gained = sum(f and not r for r, f in zip(reference, found, strict=True))
    count = lost + gained
    tail = sum(math.comb(count, k) for k in range(min(lost, gained) + 1)) / 2**count
    return min(1.0, 2 * tail)


def common(entries: Sequence[Entry]) -> list[Entry]:
    """Those of episodes that all policies under a condition have."""
    arms: dict[tuple, set[str]] = {}
    have: dict[tuple, set[str]] = {}
    for entry in entries:
        arms.setdefault(condition_of(entry), set()).add(entry["arm"])
        have.setdefault((condition_of(entry), entry["task"], entry["seed"]), set()).add(entry["arm"])
    return [
        entry for entry in entries if have[condition_of(entry), entry["task"], entry["seed"]] == arms[condition_of(entry)]
    ]


def conditions(entries: Sequence[Entry]) -> list[tuple]:
    return list(dict.fromkeys(condition_of(entry) for entry in entries))


def rows(entries: Sequence[Entry], condition: tuple, reference: str | None) -> list[Row]:
    """Of every policy under one condition, in the order in which they ran."""
    arms: dict[str, dict[tuple[int, int], Entry]] = {}
    for entry in entries:
        if condition_of(entry) == condition:
            arms.setdefault(entry["arm"], {})[entry["task"], entry["seed"]] = entry
    return [_row(arm, found, arms.get(reference or "", {}) if arm != reference else {}) for arm, found in arms.items()]


def _row(arm: str, found: dict[tuple[int, int], Entry], reference: dict[tuple[int, int], Entry]) -> Row:
    success = [entry["success"] for entry in found.values()]
    both = [start for start in found if start in reference]
    pair = [reference[start]["success"] for start in both], [found[start]["success"] for start in both]
    difference, interval = paired_difference(*pair) if both else (None, None)
    jerks = [entry["jerk"] for entry in found.values() if entry["jerk"] is not None]
    solved = [entry["steps"] for entry in found.values() if entry["success"]]
    tasks = sorted({task for task, _ in found})
    return Row(
        arm,
        len(success),
        sum(success) / len(success),
        wilson(sum(success), len(success)),
        difference,
        interval,
        mcnemar(*pair) if both else None,
        float(np.mean(solved)) if solved else None,
        _error([(reference[start]["first"], found[start]["first"]) for start in both]),
        float(np.mean(jerks)) if jerks else None,
        {task: float(np.mean([e["success"] for (of, _), e in found.items() if of == task])) for task in tasks},
    )


def _error(chunks: list[tuple[list, list]]) -> float | None:
    """Root mean square over the actions that both chunks have."""
    squares = [
        np.square(np.array(found[: len(wanted)]) - np.array(wanted[: len(found)])).ravel() for wanted, found in chunks
    ]
    return float(np.sqrt(np.concatenate(squares).mean())) if squares else None


def cells(row: Row) -> list[str]:
    low, high = row.interval
    against = ""
    if row.difference is not None and row.difference_interval is not None:
        lower, upper = row.difference_interval
        against = f"{100 * row.difference:+.1f} ({100 * lower:+.1f} to {100 * upper:+.1f})"
    return [
        f"{100 * row.rate:.1f} ({100 * low:.1f} to {100 * high:.1f})",
        against,
        "" if row.p is None else "< 0.001" if row.p < 0.0005 else f"{row.p:.3f}",
        "" if row.steps is None else f"{row.steps:.0f}",
        "" if row.error is None else f"{row.error:.4f}",
        "" if row.jerk is None else f"{row.jerk:.4f}",
        str(row.episodes),
    ]


def grids(found: list[Row], reference: str | None) -> tuple[list[list[str]], list[list[str]]]:
    """The measures, and success by task in %: lines of cells, the first with the columns' names."""
    tasks = sorted({task for row in found for task in row.by_task})
    measures = [
        ["", *(name.format(reference or "the first") for name in COLUMNS)],
        *([row.arm, *cells(row)] for row in found),
    ]
    by_task = [["", *(f"task {task}" for task in tasks)]]
    by_task += [[row.arm, *(f"{100 * row.by_task[t]:.0f}" if t in row.by_task else "" for t in tasks)] for row in found]
    return measures, by_task


def markdown(lines: list[list[str]]) -> str:
    head, *body = lines
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---", *["---:"] * (len(head) - 1)], *body))


def reference_of(entries: Sequence[Entry], chosen: str | None) -> str | None:
    """The policy to compare with: the chosen one, or that called fp32, or the first. DuqError if it never ran."""
    arms = list(dict.fromkeys(entry["arm"] for entry in entries))
    if chosen is not None and chosen not in arms:
        raise DuqError(f"--reference {chosen}: there are episodes of {', '.join(arms) or 'nothing'}")
    return chosen or ("fp32" if "fp32" in arms else next(iter(arms), None))


def print_tables(entries: Sequence[Entry], console: Console, reference: str | None = None) -> None:
    """All conditions, to the terminal."""
    reference = reference_of(entries, reference)
    for condition in conditions(entries):
        found = rows(entries, condition, reference)
        for title, lines in zip(
            (f"{title_of(condition)}; 95 % intervals", "Success by task, %"), grids(found, reference), strict=True
        ):
            table = Table(*lines[0], title=title, title_justify="left")
            for each in lines[1:]:
                table.add_row(*each)
            console.print(table)


def draw(entries: Sequence[Entry], file: Path, reference: str | None) -> None:
    """Success with its interval, a panel a condition."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        panels = conditions(entries)
        arms = list(dict.fromkeys(entry["arm"] for entry in entries))
        canvas = Figure(figsize=(2.2 + 2.6 * len(panels), 0.9 + 0.26 * len(arms)), layout="constrained")
        for axes, condition in zip(np.atleast_1d(canvas.subplots(1, len(panels), sharey=True)), panels, strict=True):
            for row in rows(entries, condition, reference):
                color, place = REFERENCE if row.arm == reference else ENGINE, arms.index(row.arm)
                axes.plot([100 * bound for bound in row.interval], (place, place), color=color)
                axes.plot(100 * row.rate, place, "o", color=color)
            axes.set(xlim=(-2, 102), yticks=range(len(arms)), yticklabels=arms, xlabel="success, %")
            axes.set_title(title_of(condition).replace(", ", "\n"))
            axes.grid(axis="y", visible=False)
        axes.invert_yaxis()
        save_figure(canvas, file)


@app.command()
def _report(
    journal: Annotated[list[Path], typer.Argument(help="Files that evaluate.py wrote.")],
    reference: Annotated[
        str | None, typer.Option(help="The policy to compare with; by default fp32, or the first.")
    ] = None,
    only_common: Annotated[
        bool, typer.Option("--common", help="Leave out episodes that not all policies under a condition have.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Figure to write (.svg, .png, .pdf).")] = None,
    table: Annotated[Path | None, typer.Option(help="Markdown to write.")] = None,
) -> None:
    """Success with 95 % intervals, differences in pairs of equal episodes, steps, action error and jerk.

    [bold]Example[/bold]

      python examples/libero/report.py episodes.jsonl --plot success.svg --table success.md
    """
    if plot is not None:
        check_figure("--plot", plot)
    if table is not None:
        check_output_file("--table", table)
    entries = []
    for file in journal:
        found = Journal(file).read()
        if not found:
            raise DuqError(f"{file}: holds no episodes; evaluate.py records them")
        for number, entry in enumerate(found, 1):
            if "arm" not in entry or "stress" not in entry:
                raise DuqError(f"{file}: line {number} is no episode of evaluate.py")
        entries += found
    if only_common and not (entries := common(entries)):
        raise DuqError("--common: there is no episode that all policies have")
    reference = reference_of(entries, reference)
    print_tables(entries, Console(), reference)
    if plot is not None:
        draw(entries, plot, reference)
    if table is not None:
        parts = []
        for condition in conditions(entries):
            measures, by_task = grids(rows(entries, condition, reference), reference)
            parts.append(f"{title_of(condition)}:\n\n{markdown(measures)}\n{markdown(by_task)}")
        write_text(table, "\n".join(parts))


def main() -> None:
    with one_line_errors():
        app()
