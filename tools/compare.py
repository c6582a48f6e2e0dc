"""How far an engine is from its checkpoint: `duq-compare --help`."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":  # in a checkout; in tools/, profile.py would pass for the standard library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from duq import commands

    commands.compare()

import typer
from rich.console import Console
from rich.table import Table

from duq.compiler.accuracy.compare import Comparison, check_match, check_robot_units, compare
from duq.compiler.accuracy.report import (
    STAGES,
    WORST_LINEARS,
    decibels,
    joint_table,
    megabytes,
    number,
    percent,
    to_json,
    write_report,
)
from duq.compiler.accuracy.synthetic import synthetic_observations
from duq.compiler.accuracy.thresholds import CRITERIA, RESULTS, Thresholds, criteria, judge, with_unit
from duq.compiler.checkpoint import load_checkpoint
from duq.compiler.checks import check_weights
from duq.compiler.data import DATASET_COUNT, load_calibration, robot_mapping
from duq.compiler.quantize_cli import CHECKPOINT_HELP, BaseOption, print_line, progress_bar
from duq.runtime.cli_errors import check_output_file, one_line_errors
from duq.runtime.config import ModelConfig
from duq.runtime.plan import Plan
from duq.runtime.policy import preprocessor_of
from duq.runtime.robots import Robot

PAST_THRESHOLDS = 1  # exit code; 2 is bad input
DEFAULT_CRITERIA = ", ".join(f"{name}={each.look:g},{each.fail:g}" for name, each in CRITERIA.items())
VERDICT_STYLES = {"pass": "green", "look": "yellow", "fail": "red"}
FailOn = Enum("FailOn", {name: name for name in ("look", "fail", "never")}, type=str)  # type: ignore[misc]

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.command()
def _compare(
    checkpoint: Annotated[str, typer.Argument(help=CHECKPOINT_HELP)],
    plan: Annotated[Path, typer.Argument(help="The engine.plan compiled from it.")],
    observations: Annotated[
        Path | None,
        typer.Option(
            help="Your robot's: a LeRobotDataset folder, what duq-serve --record wrote, or .npz files. Without, "
            "three are made up, which show that the path works but not how well the policy does."
        ),
    ] = None,  # fmt: skip
    count: Annotated[
        int | None, typer.Option(min=1, help=f"Of observations; by default {DATASET_COUNT} of a dataset, all of .npz.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measures as JSON.")] = False,
    report: Annotated[Path | None, typer.Option(help="HTML page to write, self-contained, with charts.")] = None,
    criterion: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=LOOK,FAIL",
            help=f"Other thresholds of the verdict; repeatable. By default {DEFAULT_CRITERIA}.",
        ),
    ] = None,
    fail_on: Annotated[
        FailOn, typer.Option(help="The verdict that ends in exit code 1, or a worse one. Bounds below always do.")
    ] = FailOn.fail,
    min_cosine: Annotated[float | None, typer.Option(help="Fail if an observation's actions are below.")] = None,
    max_error: Annotated[float | None, typer.Option(help="Fail if an action (normalized) is further off.")] = None,
    max_robot_error: Annotated[
        float | None, typer.Option(help="Fail if an action is further off in the robot's units.")
    ] = None,
    min_sqnr: Annotated[float | None, typer.Option(help="Fail if an observation's actions are below, in dB.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of either side; by default one a core.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the noise, equal on both sides, and of the frames of a dataset.")
    ] = 0,
    any_checkpoint: Annotated[
        bool, typer.Option("--any-checkpoint", help="Compare although the plan was made from other weights.")
    ] = False,
    base: BaseOption = None,
) -> None:
    """Run the same observations and noise through PyTorch fp32 and through the engine, and say whether they agree.

    The verdict is pass, look or fail. Exit code 1: a verdict of --fail-on, past a bound, or actions that are not finite.
    2: bad input.

    [bold]Examples[/bold]

      duq-compare checkpoints/pi0 engine.plan --observations observations.npz --report report.html

      duq-compare checkpoints/pi0 engine.plan --min-sqnr 20 --json
    """
    thresholds, by = Thresholds(min_cosine, max_error, min_sqnr, max_robot_error), criteria(criterion or [])
    if report is not None:
        check_output_file("--report", report)
    engine = Plan(plan)
    config = ModelConfig.from_json(engine.manifest["model"])
    found = (
        None if observations is None else _observations(observations, count, seed, preprocessor_of(engine, config).robot)
    )
    policy = load_checkpoint(checkpoint, base=base, statistics=False)  # a comparison takes the plan's
    check_match(policy, engine, any_checkpoint)
    if found is None:
        found = synthetic_observations(config, engine.manifest["cameras"])
    if max_robot_error is not None:
        check_robot_units(engine, found)
    with progress_bar() as progress:
        check_weights(policy, progress)
        comparison = compare(policy, engine, found, progress, threads=threads, seed=seed, base=base)
    failures = thresholds.failures(comparison.summary["observations"])
    verdict = judge(comparison.summary, by, failures, made_up=observations is None)
    known = {
        "source": "made up, not a robot's (--observations gives those)" if observations is None else f"from {observations}",
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "verdict": verdict,
        "thresholds": {name: bound for name, bound in asdict(thresholds).items() if bound is not None},
    }
    comparison = replace(comparison, summary=known | comparison.summary)
    if report is not None:
        write_report(comparison, report)
    if as_json:
        typer.echo(to_json(comparison, failures))
    else:
        _print(comparison, report)
    for line in failures:
        typer.echo(f"failed: {line}", err=True)
    if failures or verdict["result"] in _fails(fail_on):
        raise typer.Exit(PAST_THRESHOLDS)


def _fails(fail_on: FailOn) -> tuple[str, ...]:
    """The verdicts that end in exit code 1."""
    return () if fail_on == FailOn.never else RESULTS[RESULTS.index(fail_on.value) :]


def _observations(path: Path, count: int | None, seed: int, robot: Robot | None) -> list[dict]:
    found = load_calibration(path, count, seed, robot_mapping(robot))
    for line in (*found.shown, *(f"warning: {each}" for each in found.warnings)):
        print_line(line)
    return found.observations


def _print(comparison: Comparison, report: Path | None) -> None:
    console, summary = Console(highlight=False, markup=False), comparison.summary
    count = len(summary["observations"])
    console.print(f"{summary['plan']['path']} on {count} observations, {summary['source']}", soft_wrap=True)
    _print_verdict(console, summary["verdict"])
    for draw in (_check_table, _dimension_table, _stage_table, _linear_table, _jerk_table, _cost_table):
        table = draw(summary)
        if table.row_count:
            console.print(table)
    if report is not None:
        console.print(f"{report}: the report", soft_wrap=True)


def _print_verdict(console: Console, verdict: dict) -> None:
    console.print(f"Verdict: {verdict['result']}", style=VERDICT_STYLES[verdict["result"]])
    for line in verdict["reasons"]:
        console.print(f"  {line}", soft_wrap=True)


def _check_table(summary: dict) -> Table:
    table = _table("Checks", "check", "found", "where", "look past", "fail past", "result")
    for check in summary["verdict"]["checks"]:
        unit = check["short_unit"]
        bounds = [with_unit(check[key], unit, "g") for key in ("look", "fail")]
        table.add_row(check["title"], with_unit(check["value"], unit), check["where"], *bounds, check["result"])
    return table


def _stage_table(summary: dict) -> Table:
    table = _table("Engine against PyTorch fp32", "stage", "cosine", "max error", "SQNR", "worst")
    for name in STAGES:
        if name in summary["stages"]:
            found = summary["stages"][name]
            row = f"{found['cosine']:.6f}", number(found["max_error"]), decibels(found["sqnr_db"])
            table.add_row(name.replace("_", " "), *row, _worst(name, summary))
    return table


def _worst(stage: str, summary: dict) -> str:
    """Where a stage of several layers, steps or observations is worst."""
    parts, key, kind = {
        "keys": (summary["layers"], "key", "layer"),
        "values": (summary["layers"], "value", "layer"),
        "velocity_at_engine_x": (summary["steps"], "velocity_at_engine_x", "step"),
        "velocity": (summary["steps"], "velocity", "step"),
        "actions": (summary["observations"], "actions", "obs."),
    }.get(stage, ([], "", ""))
    if not parts:
        return ""
    worst, found = min(enumerate(part[key]["sqnr_db"] for part in parts), key=lambda pair: pair[1])
    return f"{decibels(found)} ({kind} {worst})"


def _dimension_table(summary: dict) -> Table:
    columns = "joint", "unit", "RMS error", "max error", "RMS, of range", "SQNR"
    table = _table("The actions that the robot reads, one by one", *columns)
    for name, unit, found, shares in joint_table(summary) if summary["plan"]["robot"] != "none" else ():
        errors = number(found["rms_error"]), number(found["max_error"]), percent(shares["rms"])
        table.add_row(name, unit, *errors, decibels(found["sqnr_db"]))
    return table


def _linear_table(summary: dict) -> Table:
    worst = list(summary["linears"]["sqnr"].items())[:WORST_LINEARS]
    title = f"The {len(worst)} worst linears, {summary['linears']['measured']}"
    table = _table(title, "linear", "bits", "shape", "SQNR")
    for name, linear in worst:
        bits = f"W{linear['weight_bits']}A{linear['activation_bits'] or 16}"
        table.add_row(name, bits, " x ".join(map(str, linear["shape"])), decibels(linear["sqnr_db"]))
    return table


def _jerk_table(summary: dict) -> Table:
    table = _table("Jerk: mean squared third difference along the chunk", "units", "PyTorch", "engine")
    for units, found in (("normalized", summary["jerk"]["model"]), (summary["plan"]["robot"], summary["jerk"]["robot"])):
        if found:
            table.add_row(units, number(found["reference"]), number(found["engine"]))
    return table


def _cost_table(summary: dict) -> Table:
    title = f"Cost, each side in a process of its own, threads: {summary['threads']}"
    table = _table(title, "", "time (median)", "peak memory", "of which libraries")
    for name, side in (("PyTorch eager fp32", "reference"), ("engine", "engine")):
        cost = summary["cost"][side]
        memory = megabytes(cost["peak_bytes"]), megabytes(cost["libraries_bytes"])
        table.add_row(name, f"{cost['median_ms']:.1f} ms", *memory)
    return table


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def main() -> None:
    with one_line_errors():
        app()
