"""What quantization, or another solver, costs a policy in success: `duq-evaluate --help`. evaluation.py does the work."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":  # in a checkout; in tools/, profile.py would pass for the standard library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from duq import commands

    commands.evaluate()

import typer

from duq.runtime.cli_errors import one_line_errors
from duq.runtime.command_line import choice, command_app

POLICY = Path("examples/metaworld_policy")


@dataclass(frozen=True)
class Scheme:
    """A preset with recipe settings, run by the engine, with a solver of its own, or by PyTorch, in ten Euler steps."""

    title: str
    preset: str
    settings: dict[str, Any] = field(default_factory=dict)
    engine: bool = True
    solver: str = "euler"
    num_steps: int = 10


PLAIN = {"compensate": False}
SCHEMES = {
    "fp32": Scheme("PyTorch fp32", "none", engine=False),
    "none": Scheme("engine, float", "none"),
    "w4a8-llm": Scheme("W4A8, language model", "llm", PLAIN),
    "w4a8": Scheme("W4A8, and the expert's MLPs, not compensated", "llm+expert-mlp", PLAIN),
    "w4a8-compensated": Scheme("the same, compensated: the default", "llm+expert-mlp", {"compensate": True}),
    "w4a8-all": Scheme("W4A8, all linears", "all", PLAIN),
    "w4a8-all-compensated": Scheme("all linears, compensated", "all", {"compensate": True}),
    "w4a8-all-auto-bits": Scheme("all linears, --auto-bits 5", "all", PLAIN | {"auto_bits": 5.0}),
    "w4a16": Scheme("W4A16, all linears", "all", PLAIN | {"activation_bits": 0}),
    "w8a8": Scheme("W8A8, all linears", "all", PLAIN | {"weight_bits": 8}),
    "reference": Scheme("original scheme, the default's linears", "llm+expert-mlp", {"scheme": "reference"}, engine=False),
    "reference-all": Scheme("original scheme, all linears", "all", {"scheme": "reference"}, engine=False),
    "euler-5": Scheme("engine, float, --num-steps 5", "none", num_steps=5),
    "ab2-5": Scheme("engine, float, --solver ab2 --num-steps 5", "none", solver="ab2", num_steps=5),
    "w4a8-euler-5": Scheme("w4a8, --num-steps 5", "llm+expert-mlp", PLAIN, num_steps=5),
    "w4a8-ab2-5": Scheme("w4a8, --solver ab2 --num-steps 5", "llm+expert-mlp", PLAIN, solver="ab2", num_steps=5),
}
OF_QUANTIZATION = [name for name, scheme in SCHEMES.items() if scheme.num_steps == 10]


app = command_app()


@app.command()
def _evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Trained by examples/train_metaworld.py.")] = POLICY,
    scheme: Annotated[
        list[str] | None, choice(SCHEMES, "--scheme", help="Repeatable; by default all of ten Euler steps.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", metavar="TASK", help="Repeatable; by default those it was trained on.")
    ] = None,
    episodes: Annotated[int, typer.Option(min=1, help="Of each task and scheme.")] = 100,
    execute: Annotated[int, typer.Option(min=1, help="Actions of a chunk to carry out before asking again.")] = 8,
    steps: Annotated[int, typer.Option(min=1, max=500, help="After which an episode has failed.")] = 200,
    push: Annotated[
        float,
        typer.Option(min=0.0, help="Push the arm off its way now and then, so hard: 1 is as fast as it moves by itself."),
    ] = 0.0,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, of one thread each.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, each episode included.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Figure to write (.svg, .png, .pdf).")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Table to write.")] = None,
) -> None:
    """Drive a simulated robot with a policy at each quantization, or with another solver, and count the episodes that succeed.

    Every scheme gets the same starts, noise and pushes, so that what differs is the arithmetic. Calibration, and the
    observations on which actions are compared, come from the scripted expert, at starts of their own.

    [bold]Examples[/bold]

      duq-evaluate --episodes 20 --scheme fp32 --scheme w4a8

      duq-evaluate --push 1 --scheme w4a8 --scheme w4a8-ab2-5

      duq-evaluate --plot docs/success.svg --markdown success.md --json > success.json
    """
    from duq.tools.evaluation import evaluate

    evaluate(
        checkpoint, scheme, task, episodes=episodes, execute=execute, steps=steps, push=push, jobs=jobs, as_json=as_json,
        plot=plot, markdown=markdown,
    )  # fmt: skip


def main() -> None:
    with one_line_errors():
        app()
