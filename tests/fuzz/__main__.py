"""``python -m tests.fuzz``: the campaign of bad inputs, or a part of it; exit code 1 if anything ended as nothing may."""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tests.fuzz import campaign
from tests.fuzz.campaign import TRIALS, Row
from tests.fuzz.judge import HOW

app = typer.Typer(add_completion=False)


@app.command()
def fuzz(
    kinds: Annotated[list[str] | None, typer.Argument(metavar="[KIND]...", help="By default all")] = None,
    share: Annotated[float, typer.Option(min=0.0, help="Of the tries of the full campaign")] = 1.0,
    processes: Annotated[int, typer.Option(min=1, help="At a time")] = 2,
    seed: Annotated[int | None, typer.Option(help="Make this one try of one kind, in this process")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Also write the result here")] = None,
) -> None:
    """Feed bad plans, manifests, observations, messages and files to duq, and count what ends as nothing may."""
    names = kinds or list(TRIALS)
    if unknown := [name for name in names if name not in TRIALS]:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(TRIALS)}")
    if seed is not None:
        if len(names) != 1:
            raise typer.BadParameter("--seed is of one kind")
        raise typer.Exit(_one(names[0], seed))
    begin = time.perf_counter()
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("tries", total=sum(max(1, round(share * TRIALS[name].count)) for name in names))
        rows = campaign.campaign(names, share, processes, lambda row: progress.advance(task, row.tries))
    seconds = time.perf_counter() - begin
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(table(list(rows.values())))
    console.print(f"{sum(row.tries for row in rows.values())} tries in {seconds:.0f} s, {processes} at a time")
    failures = [failure for row in rows.values() for failure in row.failures]
    for failure in failures:
        console.print(f"{failure['how']}: {failure['text']}\n    {failure['reproduce']}", soft_wrap=True)
    if as_json is not None:
        as_json.write_text(json.dumps(report(rows, share, seconds), indent=1))
    raise typer.Exit(1 if failures else 0)


def _one(name: str, seed: int) -> int:
    """A try in this process, for a debugger; the exit code."""
    campaign.quiet()
    with campaign.files() as made, TRIALS[name].ready(made(TRIALS[name])) as attempt:
        end, text = campaign.once(attempt, seed)
    print(f"{end}: {text}" if text else end)
    return 1 if text else 0


def report(rows: dict[str, Row], share: float, seconds: float) -> dict[str, Any]:
    """All that the table says, and the failures, in plain JSON types."""
    kinds = {
        name: {
            "tries": row.tries,
            "ends": row.ends,
            "peak_mb": round(row.peak_bytes / 1e6),
            "seconds": round(row.seconds, 1),
        }
        for name, row in rows.items()
    }
    failures = [failure for row in rows.values() for failure in row.failures]
    return {"share": share, "seconds": round(seconds), "machine": platform.platform(), "kinds": kinds, "failures": failures}


def table(rows: list[Row]) -> Table:
    """Tries, and how they ended, by kind."""
    found = Table(title="bad inputs")
    for column in ("kind", "tries", "accepted", "refused", *HOW, "peak MB", "s"):
        found.add_column(column, justify="left" if column == "kind" else "right", no_wrap=True)
    total = Row("all")
    for row in rows:
        total.join(row)
    for row in [*rows, total]:
        failed = [row.ends[how] for how in HOW]
        # Of a message there are many answers; whatever gives actions was accepted.
        accepted = row.ends["accepted"] + row.ends["actions"]
        numbers = (
            row.tries,
            accepted,
            row.tries - accepted - sum(failed),
            *failed,
            row.peak_bytes // 10**6,
            round(row.seconds),
        )
        found.add_row(row.kind, *map(str, numbers), end_section=row is rows[-1])
    return found


if __name__ == "__main__":
    app(prog_name="python -m tests.fuzz")
