"""What a call of a cuda plan should take on a GPU that is not at hand: `duq-estimate --help`. The model is latency.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

if __name__ == "__main__":  # in a checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from duq import commands

    commands.estimate()

import typer
from rich.console import Console
from rich.table import Table

from duq.plugins.errors import DuqError
from duq.plugins.gpu import CARDS, Gpu, gpu_named
from duq.plugins.libraries import Version
from duq.runtime.cli_errors import one_line_errors
from duq.runtime.command_line import choice, command_app
from duq.runtime.executors.programs import Program, best_first, program_for, programs_of, sm_to_compile_for
from duq.runtime.executors.schedule import read_schedule
from duq.runtime.plan import Plan
from duq.tools.latency import (
    MEASURED_ON,
    UNMEASURED,
    Launch,
    Sum,
    Timed,
    constants,
    kernel_of,
    seconds_in_turn,
    sum_of,
    time_of,
)

RATES = ("int8_rate", "bf16_rate", "l2_bytes")  # that may not be public, and --assume may give
ANY_DRIVER = Version(1000, 0)
VISION, LLM, STATE, STEP = "vision (SigLIP)", "LLM", "state token", "a denoising step"

app = command_app()


class Part(NamedTuple):
    """Launches of a call; seconds: one after the other."""

    name: str
    launches: int
    operations: float
    bytes: float
    seconds: float


class Estimate(NamedTuple):
    """Of one call of a schedule's variant. stand_ins: kernels that nobody measured, for which an average one stands."""

    parts: list[Part]
    sums: Sum
    num_steps: int
    stand_ins: list[str]


@app.command()
def _estimate(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan of target cuda.")],
    gpu: Annotated[
        str,
        choice((card.name for card in CARDS), "--gpu", metavar="NAME", help=f"{', '.join(card.name for card in CARDS)}."),
    ],
    cameras: Annotated[int | None, typer.Option(min=1, max=3, help="Of the observation; by default the plan's.")] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of the observation, padded to the plan's next size; by default the largest.")
    ] = None,
    assume: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RATE=VALUE",
            help=f"A number of the GPU that is not public: {', '.join(RATES)}. Rates are multiply-adds of a multiprocessor in "
            "a cycle. May be given several times.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the estimate as JSON.")] = False,
) -> None:
    """Estimate a call on a GPU from the plan's launches: no GPU is needed, and nothing is measured.

    The model of a launch was fitted to what an H200 took, and to nothing of other GPUs but their data sheets. The plan needs a
    program that the GPU would run.

    [bold]Example[/bold]

      duq-estimate engine.plan --gpu rtx4090

      duq-estimate engine.plan --gpu thor --assume int8_rate=2048 --assume bf16_rate=1024
    """
    card = with_assumed(gpu_named(gpu), assume or [])
    opened = Plan(plan)
    if opened.manifest["target"] != "cuda":
        raise DuqError(f"{plan}: is for target {opened.manifest['target']}; an estimate needs a plan of --target cuda")
    program, schedule = _program(opened, card)
    variant = _variant(plan, schedule, cameras, prompt_tokens)
    found = estimate(schedule, variant, opened.manifest["num_steps"], card)
    size = {"cameras": variant["cameras"], "prompt_tokens": variant["prompt"]}
    if as_json:
        typer.echo(json.dumps(_as_json(found, card, program, assume or []) | size, indent=1))
        return
    title = f"An estimate for {card.name} (SM {card.sm}), not a measurement: {_shown(program)}, "
    title += f"{size['cameras']} cameras, {size['prompt_tokens']} prompt tokens"
    for each in [title, _table(found), *_lines(found, assume or [])]:
        Console(width=120, highlight=False).print(each)


def with_assumed(card: Gpu, assume: Sequence[str]) -> Gpu:
    """The card with numbers that are not public, "int8_rate=2048". DuqError where one is missing, unknown, or public."""
    unknown = [name for name in RATES if getattr(card, name) is None]
    for text in assume:
        name, _, value = text.partition("=")
        if name not in RATES or not value.isdecimal() or int(value) == 0:
            raise DuqError(f"--assume {text}: is none of {', '.join(RATES)} with a positive integer; write int8_rate=2048")
        if name not in unknown:
            raise DuqError(f"--assume {text}: the {name} of {card.name} is known, or given twice; leave it out")
        unknown.remove(name)
        given: dict[str, Any] = {name: int(value)}
        card = replace(card, **given)
    if unknown:
        needed = " ".join(f"--assume {name}=..." for name in unknown)
        raise DuqError(f"--gpu {card.name}: its {' and '.join(unknown)} are not public; say what to assume: {needed}")
    return card


def _program(plan: Plan, card: Gpu) -> tuple[Program, dict[str, Any]]:
    """Which of the plan's programs the card would run, and its schedule."""
    fitting = best_first(programs_of(plan.manifest), card.sm, ANY_DRIVER)
    found = program_for(fitting, card.sm, card.block_shared_bytes, lambda each: read_schedule(plan, each.schedule))
    if found is None:
        made_for = ", ".join(map(str, plan.manifest["sm"]))
        wanted = sm_to_compile_for(card.sm, card.block_shared_bytes)
        raise DuqError(
            f"{plan.path}: is made for SM {made_for}, and {card.name} (SM {card.sm}) runs none of it; compile it with --sm {wanted}"
        )
    return found


def _variant(plan: Path, schedule: Mapping[str, Any], cameras: int | None, prompt_tokens: int | None) -> dict[str, Any]:
    """The smallest of the schedule for such an observation."""
    most = max(variant["cameras"] for variant in schedule["variants"])
    longest = max(variant["prompt"] for variant in schedule["variants"])
    wanted = cameras or most, prompt_tokens or longest
    fitting = [each for each in schedule["variants"] if each["cameras"] == wanted[0] and each["prompt"] >= wanted[1]]
    if not fitting:
        raise DuqError(
            f"{plan}: is not for {wanted[0]} cameras and {wanted[1]} prompt tokens, but for up to {most} and {longest}"
        )
    return min(fitting, key=lambda each: each["prompt"])


def estimate(schedule: Mapping[str, Any], variant: Mapping[str, Any], num_steps: int, gpu: Gpu) -> Estimate:
    """Of a variant of a schedule. Raises KernelError for a kernel that was never measured."""
    fitted = constants()
    prefix, step = (_timed(schedule, variant[half], gpu) for half in ("prefix", "step"))
    parts: dict[str, list[Timed]] = {VISION: [], LLM: [], STATE: []}
    main = VISION
    for launch, time in prefix:
        main = LLM if launch.kernel == "tokens" else main  # the prompt comes behind the pictures
        parts[STATE if launch.branch else main].append((launch, time))
    parts[STEP] = step
    kernels = sorted({launch.name for launch, _ in (*prefix, *step)} & set(UNMEASURED))
    rows = [
        Part(
            name,
            len(timed),
            sum(launch.work for launch, _ in timed),
            sum(launch.moved for launch, _ in timed),
            seconds_in_turn(timed, fitted),
        )
        for name, timed in parts.items()
        if timed
    ]
    return Estimate(rows, sum_of(prefix, step, num_steps, fitted), num_steps, kernels)


def _timed(schedule: Mapping[str, Any], launches: Iterable[Mapping[str, Any]], gpu: Gpu) -> list[Timed]:
    found = (Launch.of(each, kernel_of(schedule, each)) for each in launches)
    return [(launch, time_of(launch, gpu)) for launch in found]


def _shown(program: Program) -> str:
    return f"the program for SM {program.sm}" + (", from PTX" if program.image == "ptx" else "")


def _table(found: Estimate) -> Table:
    table = Table("part")
    for column in ("launches", "operations", "bytes", "ms"):
        table.add_column(column, justify="right")
    for part in found.parts:
        numbers = f"{part.launches}", f"{part.operations / 1e9:,.1f} G", f"{part.bytes / 1e6:,.0f} MB"
        table.add_row(part.name, *numbers, f"{1e3 * part.seconds:.2f}")
    return table


def _lines(found: Estimate, assume: Sequence[str]) -> list[str]:
    sums, error = found.sums, constants()
    lines = [
        f"The call: {1e3 * sums.call:.2f} ms. Prefix {1e3 * sums.prefix:.2f} ms, with the state token and the first denoising "
        f"step beside it; the other {found.num_steps - 1} steps {1e3 * sums.steps:.2f} ms.",
        f"On an {MEASURED_ON}, where the model was fitted, a kernel is at most {error.kernel_error:.0%} off and a sum "
        f"{error.sum_error:.0%}. How far it is off elsewhere, nobody has measured.",
    ]
    if found.stand_ins:
        lines.append(f"Never measured, taken for average kernels of their kind: {', '.join(found.stand_ins)}.")
    if assume:
        lines.append(f"Assumed: {', '.join(assume)}.")
    return lines


def _as_json(found: Estimate, card: Gpu, program: Program, assume: Sequence[str]) -> dict[str, Any]:
    sums, error = found.sums, constants()
    return {
        "estimate": True,
        "gpu": card.name,
        "sm": card.sm,
        "program": {"sm": program.sm, "image": program.image},
        "assumed": list(assume),
        "parts": [
            {"part": part.name, "launches": part.launches, "operations": part.operations, "bytes": part.bytes,
             "ms": 1e3 * part.seconds}
            for part in found.parts
        ],
        "prefix_ms": 1e3 * sums.prefix,
        "steps_ms": 1e3 * sums.steps,
        "call_ms": 1e3 * sums.call,
        "in_turn_ms": {"prefix": 1e3 * sums.prefix_in_turn, "step": 1e3 * sums.step_in_turn},
        "never_measured": found.stand_ins,
        "error": {"on": MEASURED_ON, "kernel": error.kernel_error, "sum": error.sum_error},
    }  # fmt: skip


def main() -> None:
    with one_line_errors():
        app()
