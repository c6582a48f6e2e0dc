"""Completion of every command in the shell: `duq-completion --help`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":  # in a checkout; in tools/, profile.py would pass for the standard library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from duq import commands

    commands.completion()

import typer
from typer.completion import get_completion_script

from duq.commands import COMMANDS
from duq.plugins.errors import DuqError
from duq.runtime.cli_errors import one_line_errors
from duq.runtime.command_line import check_choice, choice_argument, command_app, completion_variable

SHELLS = ("bash", "zsh", "fish")

app = command_app()


@app.command()
def _completion(
    shell: Annotated[str | None, choice_argument(SHELLS, help="By default the one of $SHELL.")] = None,
) -> None:
    """Print what makes a shell complete all of duq's commands, their options and the values of those that have a few.

    [bold]Examples[/bold]

      eval "$(duq-completion bash)"               # in ~/.bashrc

      eval "$(duq-completion zsh)"                # in ~/.zshrc, behind compinit

      duq-completion fish | source                # in ~/.config/fish/config.fish
    """
    shell = shell or _own_shell()
    check_choice("SHELL", shell, SHELLS)
    for name in COMMANDS:
        typer.echo(get_completion_script(prog_name=name, complete_var=completion_variable(name), shell=shell))


def _own_shell() -> str:
    name = Path(os.environ.get("SHELL", "")).name
    if name not in SHELLS:
        raise DuqError(f"$SHELL is {name or 'not set'}: name the shell, one of {', '.join(SHELLS)}")
    return name


def main() -> None:
    with one_line_errors():
        app()
