"""How far an engine is from its checkpoint or from another engine: `duq-compare --help`. The work is in compare_*.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

if __name__ == "__main__":  # in a checkout; in tools/, profile.py would pass for the standard library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from duq import commands

    commands.compare()

import typer

from duq.compiler.accuracy.thresholds import CRITERIA, RESULTS, Thresholds, criteria
from duq.compiler.commands import CHECKPOINT_HELP, BaseOption
from duq.plugins.errors import DuqError
from duq.runtime.cli_errors import check_output_file, one_line_errors
from duq.runtime.command_line import command_app

PAST_THRESHOLDS = 1  # exit code; 2 is bad input
DEFAULT_CRITERIA = ", ".join(f"{name}={each.look:g},{each.fail:g}" for name, each in CRITERIA.items())
FailOn = Literal["look", "fail", "never"]

app = command_app()


@app.command()
def _compare(
    reference: Annotated[
        str,
        typer.Argument(metavar="CHECKPOINT|PLAN", help=f"What to compare with: another plan, or an {CHECKPOINT_HELP}"),
    ],
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="An engine.plan; compiled from CHECKPOINT.")],
    observations: Annotated[
        Path | None,
        typer.Option(
            help="Your robot's: a LeRobotDataset folder, what duq-serve --record wrote, or .npz files. Without, "
            "three are made up, which show that the path works but not how well the policy does."
        ),
    ] = None,  # fmt: skip
    count: Annotated[
        int | None, typer.Option(min=1, help="Of observations; by default 32 of a dataset, all of .npz.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measures as JSON.")] = False,
    report: Annotated[Path | None, typer.Option(help="HTML page to write, self-contained, with charts.")] = None,
    criterion: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=LOOK,FAIL", help=f"Other thresholds of the verdict; repeatable. By default {DEFAULT_CRITERIA}."
        ),
    ] = None,
    fail_on: Annotated[
        FailOn | None, typer.Option(help="End in exit code 1 for this verdict or a worse one; by default fail.")
    ] = None,
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
    """Run the same observations and noise through PyTorch fp32 and an engine, or through two engines, and report how far
    the second is from the first.

    Against a checkpoint the verdict is pass, look or fail. Two plans need neither a checkpoint nor PyTorch, and have to be
    for one robot; they get no verdict.
    Exit code 1: a verdict of --fail-on, past a bound, or actions that are not finite. 2: bad input.

    [bold]Examples[/bold]

      duq-compare checkpoints/pi0 engine.plan --observations observations.npz --report report.html

      duq-compare checkpoints/pi0 engine.plan --min-sqnr 20 --json

      duq-compare float.plan engine.plan --observations observations.npz
    """
    thresholds, by = Thresholds(min_cosine, max_error, min_sqnr, max_robot_error), criteria(criterion or [])
    verdict = None
    if report is not None:
        check_output_file("--report", report)
    if _is_plan(Path(reference)):
        for flag, given in (
            ("--report", report), ("--any-checkpoint", any_checkpoint or None), ("--base", base),
            ("--criterion", criterion), ("--fail-on", fail_on),
        ):  # fmt: skip
            if given is not None:
                raise DuqError(f"{flag}: is for a comparison with a checkpoint, but {reference} is a plan; leave it out")
        from duq.tools.compare_plans import compare_plans

        failures = compare_plans(
            Path(reference), plan, observations, count=count, thresholds=thresholds, threads=threads, seed=seed,
            as_json=as_json,
        )  # fmt: skip
    else:
        from duq.tools.compare_checkpoint import compare_checkpoint

        failures, verdict = compare_checkpoint(
            reference, plan, observations, count=count, as_json=as_json, report=report, thresholds=thresholds,
            criteria=by, threads=threads, seed=seed, any_checkpoint=any_checkpoint, base=base,
        )  # fmt: skip
    for line in failures:
        typer.echo(f"failed: {line}", err=True)
    if failures or verdict in _fails(fail_on or "fail"):
        raise typer.Exit(PAST_THRESHOLDS)


def _fails(fail_on: FailOn) -> tuple[str, ...]:
    """The verdicts that end in exit code 1."""
    return () if fail_on == "never" else RESULTS[RESULTS.index(fail_on) :]


def _is_plan(path: Path) -> bool:
    """Whether it is a zip file, as plans are and checkpoints are not: nothing more, so that a damaged plan is called one."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def main() -> None:
    with one_line_errors():
        app()
