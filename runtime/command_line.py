"""What every command of duq has in common: --version, --verbose, --quiet, progress on stderr, lists of choices.

    app = command_app()

    @app.command()
    def _run(...): ...

    def main() -> None:
        with one_line_errors():
            app()

A module with a command's options imports nothing that is slow to import, so that --help and the shell's completion answer
at once; what does the work is imported when the command runs.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from duq import __version__
from duq.plugins.errors import DuqError
from duq.runtime.cli_errors import keep_warning

PANEL = "Every command"
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
log = logging.getLogger("duq")

_quiet = False


class CommandApp(typer.Typer):
    """A typer application whose commands have the common options. With `help` it has several commands."""

    def __init__(self, help: str | None = None):
        super().__init__(help=help, add_completion=_a_shell_asks(), rich_markup_mode="rich", pretty_exceptions_enable=False)
        if help is not None:
            self.callback()(_with_common_options(lambda: None))

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        _set_quiet(False)
        return super().__call__(*arguments, **named)

    def command(self, *arguments: Any, **named: Any) -> Callable[..., Any]:
        register = super().command(*arguments, **named)

        def with_common_options(function: Callable[..., Any]) -> Callable[..., Any]:
            register(_with_common_options(function))
            return function

        return with_common_options


def command_app(help: str | None = None) -> CommandApp:
    """help: of an application with several commands; a single one's is its docstring."""
    return CommandApp(help)


def completion_variable(name: str) -> str:
    """What the shell sets when it asks a command for completions: "_DUQ_COMPILE_COMPLETE"."""
    return f"_{name}_COMPLETE".replace("-", "_").upper()


def _a_shell_asks() -> bool:
    """Then typer sets its completion up. Otherwise it would offer to write into the user's files, for each command anew;
    duq-completion prints the lines for all."""
    return completion_variable(Path(sys.argv[0]).name) in os.environ


def _with_common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with the options that all have, which act by themselves."""
    own = inspect.signature(command, eval_str=True)
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in _COMMON.items()
    ]

    @functools.wraps(command)
    def run(*arguments: Any, **named: Any) -> Any:
        return command(*arguments, **{name: value for name, value in named.items() if name not in _COMMON})

    run.__signature__ = own.replace(parameters=[*own.parameters.values(), *options])  # type: ignore[attr-defined]
    run.__annotations__ = {name: each.annotation for name, each in run.__signature__.parameters.items()}  # type: ignore[attr-defined]
    return run


def _print_version(context: typer.Context, asked: bool) -> None:
    if asked and not context.resilient_parsing:
        typer.echo(f"{context.find_root().info_name} {__version__}")
        raise typer.Exit


def _be_verbose(context: typer.Context, count: int) -> None:
    if count and not context.resilient_parsing:
        logging.basicConfig(level=logging.DEBUG if count > 1 else logging.INFO, format=LOG_FORMAT)
        log.setLevel(logging.DEBUG if count > 1 else logging.INFO)


def _be_quiet(context: typer.Context, asked: bool) -> None:
    if asked and not context.resilient_parsing:
        logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT)
        _set_quiet(True)


def _common(kind: type, *flags: str, **named: Any) -> Any:
    return Annotated[kind, typer.Option(*flags, rich_help_panel=PANEL, **named)]


# By the parameter's name, which no command uses itself: its annotation and its default.
_COMMON = {
    "common_version": (_common(bool, "--version", help="Print duq's version.", callback=_print_version, is_eager=True), False),
    "common_verbose": (
        _common(
            int, "--verbose", "-v", count=True, metavar="", callback=_be_verbose, show_default=False,
            help="Log what is done, to stderr; -vv also where an error comes from.",
        ),
        0,
    ),
    "common_quiet": (
        _common(
            bool, "--quiet", "-q", callback=_be_quiet,
            help="Print results, warnings and errors alone: no progress, no notes.",
        ),
        False,
    ),
}  # fmt: skip


def _set_quiet(quiet: bool) -> None:
    global _quiet
    _quiet = quiet


def is_quiet() -> bool:
    """Whether --quiet was said."""
    return _quiet


def print_line(line: str) -> None:
    """To stderr, where progress and warnings go; --quiet hides all but warnings, and --json repeats those."""
    if line.startswith("warning: "):
        keep_warning(line.removeprefix("warning: "))
    elif _quiet:
        return
    typer.echo(line, err=True)


def progress_bar(auto_refresh: bool = True) -> Progress:
    """On stderr; nothing with --quiet, and with --verbose a line of the log for each task too.

    Without auto_refresh no thread draws it: who measures times does, with `refresh`, between two calls.
    """
    columns = (TextColumn("{task.description:<24}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return _LoggedProgress(*columns, console=Console(stderr=True), disable=_quiet, auto_refresh=auto_refresh)


class _LoggedProgress(Progress):
    def add_task(self, description: str, *arguments: Any, **named: Any) -> TaskID:
        log.info("%s", description)
        return super().add_task(description, *arguments, **named)


def choice(values: Iterable[str], *flags: str, metavar: str | None = None, **named: Any) -> Any:
    """A typer option that shows its values in --help, and completes them in the shell; whoever uses the value checks it."""
    known = tuple(values)
    shown = metavar or "|".join(known)
    return typer.Option(*flags, metavar=shown, autocompletion=lambda: list(known), **named)


def choice_argument(values: Iterable[str], **named: Any) -> Any:
    """The same for an argument."""
    known = tuple(values)
    return typer.Argument(metavar="|".join(known), autocompletion=lambda: list(known), **named)


def check_choice(flag: str, value: str, known: Iterable[str]) -> None:
    """Raises DuqError, which lists the known values, for another one."""
    known = tuple(known)
    if value not in known:
        raise DuqError(f"{flag} {value}: unknown, one of {', '.join(known)}")


def compute_capability(flag: str, text: str) -> int:
    """A GPU's SM as people write it, "86", "8.6", "sm_86" or "9.0a", as an integer, 86. DuqError for anything else."""
    found = re.fullmatch(r"(?:sm_?)?(?:(\d+)\.(\d)|(\d+))[af]?", text.strip().lower(), re.ASCII)
    if found is None:
        raise DuqError(f"{flag} {text}: is no compute capability; write 86 for a GPU of 8.6")
    return int(found[3] or found[1] + found[2])
