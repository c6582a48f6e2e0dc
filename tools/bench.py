"""How fast plans are on this machine, alone or against PyTorch: `duq-bench --help`. bench_plan.py and bench_cpu.py do it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":  # in a checkout; in tools/, profile.py would pass for the standard library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from duq import commands

    commands.bench()

import typer
from rich.console import Console

from duq.compiler.choices import PRESETS, VARIANTS
from duq.plugins.errors import DuqError
from duq.runtime.cli_errors import one_line_errors, warnings_printed
from duq.runtime.command_line import check_choice, choice, command_app, compute_capability, print_line, progress_bar

SUITES = ("cpu", "gpu")
PLAN_PANEL = "Of a plan"
MOST_AT_ONCE = 1024  # observations of a batch
SUITE: dict[str, Any] = {"rich_help_panel": "Of a suite"}
app = command_app()


@app.command()
def _bench(
    plan: Annotated[
        Path | None, typer.Argument(metavar="[PLAN]", help="Time this engine.plan alone; without, a suite.")
    ] = None,
    calls: Annotated[int, typer.Option(min=1, help="PLAN: calls to measure.", rich_help_panel=PLAN_PANEL)] = 100,
    warm_up: Annotated[
        int, typer.Option(min=1, help="PLAN: calls before them, which do not count.", rich_help_panel=PLAN_PANEL)
    ] = 10,
    repetitions: Annotated[
        int,
        typer.Option(min=2, help="PLAN: parts of the calls, whose medians' spread is shown.", rich_help_panel=PLAN_PANEL),
    ] = 5,
    observations: Annotated[
        Path | None,
        typer.Option(help="PLAN: time it on these (.npz), not on a made-up one.", rich_help_panel=PLAN_PANEL),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="N,...",
            help="PLAN: also calls/s of infer_batch at these sizes, e.g. 1,2,4,8,16, beside single calls.",
            rich_help_panel=PLAN_PANEL,
        ),
    ] = None,
    in_flight: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="PLAN: calls of a batch that the GPU runs at once; by default the policy's.",
            rich_help_panel=PLAN_PANEL,
        ),
    ] = None,
    cameras: Annotated[
        int | None, typer.Option(min=1, max=3, help="In the observation; by default the plan's, or 3.")
    ] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="In the observation; by default 48.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of every contender; by default one a core.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all times as JSON.")] = False,
    suite: Annotated[
        str | None,
        choice(SUITES, "--suite", help="gpu: cuda plans and PyTorch on this machine's GPU. cpu is the default.", **SUITE),
    ] = None,
    variant: Annotated[
        list[str] | None,
        choice(VARIANTS, "--variant", help="Made checkpoints to measure; by default tiny and small, gpu: full.", **SUITE),
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", metavar="CHECKPOINT", help="Measure this checkpoint instead.", **SUITE)
    ] = None,
    pi05: Annotated[bool, typer.Option("--pi05", help="pi0.5 instead of pi0.", **SUITE)] = False,
    quant: Annotated[
        list[str] | None,
        choice(
            PRESETS,
            "--quant",
            metavar="|".join((*PRESETS, "FILE")),
            help="Presets or recipe files to compile; by default none, llm+expert-mlp and all.",
            **SUITE,
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Each round runs every contender once.", **SUITE)] = 20,
    torch_compile: Annotated[
        bool,
        typer.Option("--torch-compile/--no-torch-compile", help="Inductor needs a C++ compiler and minutes.", **SUITE),
    ] = True,
    program: Annotated[
        str | None,
        typer.Option(
            metavar="SM",
            help="gpu: an SM, e.g. 86, whose program to run instead of this GPU's own, from PTX; of a later SM its schedule, "
            "compiled for this GPU. Foreign to this GPU, and no measure of a GPU of that SM.",
            **SUITE,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="gpu: directory for all times as JSON and a plot.", **SUITE)] = None,
) -> None:
    """Time a plan on this machine; or, without one, engines of several recipes against PyTorch.

    A plan is timed as the robot calls it, from observation to actions: percentiles, stages, throughput, memory. A control,
    work of numpy that is the same each time, and the spread between repetitions show how steady the machine was.

    The contenders of a suite take turns in one process, so that whatever else the machine does concerns them all; the
    figures to trust are the ratios. The gpu suite measures every number of cameras: wall time from the observation to the
    actions, the replay of the engine's CUDA graph, memory, and the cosine of the actions with PyTorch's in float32.

    [bold]Examples[/bold]

      duq-bench engine.plan

      duq-bench engine.plan --calls 1000 --cameras 2 --json

      duq-bench engine.plan --batch 1,2,4,8,16

      duq-bench --suite cpu

      duq-bench --checkpoint checkpoints/pi0 --quant llm+expert-mlp --no-torch-compile --rounds 5

      duq-bench --suite gpu --quant none --quant llm+expert-mlp --out results
    """
    if plan is not None:
        given = {"--suite": suite, "--variant": variant, "--checkpoint": checkpoint, "--quant": quant, "--program": program,
                 "--out": out, "--pi05": pi05 or None}  # fmt: skip
        _refuse(given, f"is for suites; leave it out to time {plan}")
        if batch is None:
            _refuse({"--in-flight": in_flight}, "is for batches; name their sizes: --batch 1,2,4,8,16")
        _bench_plan(
            plan, as_json, calls=calls, warm_up=warm_up, repetitions=repetitions, cameras=cameras,
            prompt_tokens=prompt_tokens, threads=threads, observations=observations, in_flight=in_flight,
            batches=[] if batch is None else _sizes(batch),
        )  # fmt: skip
        return
    _refuse(
        {"--observations": observations, "--batch": batch, "--in-flight": in_flight},
        "is for a plan; name it: duq-bench engine.plan",
    )
    check_choice("--suite", suite or "cpu", SUITES)
    from duq.tools.bench_cpu import bench

    bench(
        suite or "cpu", variant, checkpoint, pi05=pi05, quant=quant, cameras=cameras or 3,
        prompt_tokens=prompt_tokens or 48, threads=threads, rounds=rounds, torch_compile=torch_compile, as_json=as_json,
        program=None if program is None else compute_capability("--program", program), out=out,
    )  # fmt: skip


def _sizes(text: str) -> list[int]:
    """Of batches, each once, in their order."""
    sizes = [int(each) if each.strip().isdecimal() else 0 for each in text.split(",")]
    if not all(1 <= size <= MOST_AT_ONCE for size in sizes):
        raise DuqError(f"--batch {text}: expected sizes of 1 to {MOST_AT_ONCE}, as 1,2,4,8,16")
    return list(dict.fromkeys(sizes))


def _refuse(given: dict[str, Any], why: str) -> None:
    for flag, value in given.items():
        if value is not None:
            raise DuqError(f"{flag}: {why}")


def _bench_plan(plan: Path, as_json: bool, **options: Any) -> None:
    from duq.tools.bench_plan import measure, tables, unsteady

    with progress_bar(auto_refresh=False) as progress:
        result = measure(plan, progress, **options)
    if warning := unsteady(result):
        print_line(f"warning: {warning}")
    if as_json:
        typer.echo(json.dumps(result | {"warnings": warnings_printed()}, indent=1))
        return
    console = Console(highlight=False, markup=False)
    for each in tables(result):
        console.print(each, soft_wrap=isinstance(each, str))


def main() -> None:
    with one_line_errors():
        app()
