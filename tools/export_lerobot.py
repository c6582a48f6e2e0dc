"""Writes a plan as a folder for LeRobot's `--policy.path`: `duq-export-lerobot --help`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":  # in a checkout; in tools/, profile.py would pass for the standard library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from duq import commands

    commands.export_lerobot()

import typer
from rich.console import Console

from duq.plugins.errors import DuqError
from duq.runtime.cli_errors import check_output_directory, one_line_errors
from duq.runtime.command_line import command_app
from duq.runtime.lerobot_folder import export

app = command_app()


@app.command()
def _export(
    plan: Annotated[Path, typer.Argument(help="A plan whose robot is described in LeRobot's terms.")],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write; an earlier export is replaced.")],
    n_action_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Actions of a chunk that are executed; by default as the checkpoint says, else all."),
    ] = None,
    image_shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CAMERA=HEIGHTxWIDTH",
            help="Of a camera whose images' size the checkpoint does not say, such as openpi's; once for each.",
        ),
    ] = None,
) -> None:
    """Write a plan as a folder that LeRobot takes for [bold]--policy.path[/bold].

    LeRobot 0.6 or later needs the package lerobot_policy_duq beside it (integrations/lerobot_policy_duq).

    [bold]Examples[/bold]

      duq-export-lerobot engine.plan my_arm

      duq-export-lerobot engine.plan my_arm --n-action-steps 10 --image-shape observation.images.top=480x640
    """
    check_output_directory("DIR", out)
    shapes = dict(_shape(each) for each in image_shape or [])
    config = export(plan, out, n_action_steps, shapes)
    steps = f"executes {config['n_action_steps']} of {config['chunk_size']} actions"
    Console(markup=False, highlight=False).print(f"{out}: {steps}; lerobot-eval --policy.path={out}", soft_wrap=True)


def _shape(text: str) -> tuple[str, tuple[int, int]]:
    match = re.fullmatch(r"(.+)=([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise DuqError(f"--image-shape {text}: expected CAMERA=HEIGHTxWIDTH, such as observation.images.top=480x640")
    return match[1], (int(match[2]), int(match[3]))


def main() -> None:
    with one_line_errors():
        app()
