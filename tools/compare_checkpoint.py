"""The comparison of an engine with PyTorch on its checkpoint, as duq-compare prints it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

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
from duq.compiler.accuracy.thresholds import Criterion, Thresholds, judge, with_unit
from duq.compiler.checkpoint import load_checkpoint
from duq.compiler.checks import check_weights
from duq.compiler.data import load_calibration, robot_mapping
from duq.runtime.command_line import print_line, progress_bar
from duq.runtime.config import ModelConfig
from duq.runtime.plan import Plan
from duq.runtime.policy import preprocessor_of
from duq.runtime.robots import Robot
from duq.runtime.solver import Solver

VERDICT_STYLES = {"pass": "green", "look": "yellow", "fail": "red"}


def compare_checkpoint(
    checkpoint: str,
    plan: Path,
    observations: Path | None,
    *,
    count: int | None,
    as_json: bool,
    report: Path | None,
    thresholds: Thresholds,
    criteria: Mapping[str, Criterion],
    threads: int | None,
    seed: int,
    any_checkpoint: bool,
    base: str | None,
) -> tuple[list[str], str]:
    """Prints how far a plan is from its checkpoint; returns the thresholds that it is past, and the verdict."""
    engine = Plan(plan)
    config = ModelConfig.from_json(engine.manifest["model"])
    found = (
        None if observations is None else _observations(observations, count, seed, preprocessor_of(engine, config).robot)
    )
    policy = load_checkpoint(checkpoint, base=base, statistics=False)  # a comparison takes the plan's
    check_match(policy, engine, any_checkpoint)
    if found is None:
        found = synthetic_observations(config, engine.manifest["cameras"])
    if thresholds.max_robot_error is not None:
        check_robot_units(engine, found)
    with progress_bar() as progress:
        check_weights(policy, progress)
        comparison = compare(policy, engine, found, progress, threads=threads, seed=seed, base=base)
    failures = thresholds.failures(comparison.summary["observations"])
    verdict = judge(comparison.summary, criteria, failures, made_up=observations is None)
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
    return failures, verdict["result"]


def _observations(path: Path, count: int | None, seed: int, robot: Robot | None) -> list[dict]:
    found = load_calibration(path, count, seed, robot_mapping(robot))
    for line in (*found.shown, *(f"warning: {each}" for each in found.warnings)):
        print_line(line)
    return found.observations


def _print(comparison: Comparison, report: Path | None) -> None:
    console, summary = Console(highlight=False, markup=False), comparison.summary
    count = len(summary["observations"])
    console.print(f"{summary['plan']['path']} on {count} observations, {summary['source']}", soft_wrap=True)
    plan, reference = (Solver(summary[side]["solver"], summary[side]["num_steps"]) for side in ("plan", "reference"))
    if plan != reference:
        console.print(f"its actions, by {plan}, are compared with PyTorch's by {reference}", soft_wrap=True)
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
