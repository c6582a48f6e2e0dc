"""How every command line of duq fails: one line on stderr, exit code 2."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from duq.plugins.errors import DuqError, DuqWarning
from duq.runtime.files import check_output_directory as check_output_directory
from duq.runtime.files import check_output_file as check_output_file
from duq.runtime.files import signals_as_exits

_warnings: list[str] = []


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns what the user can act on (DuqError, and OSError: disk full, no permission) into a line and exit code 2.

    SIGTERM and SIGHUP end it as Ctrl-C does: what is half-written is removed.

    def main():
        with one_line_errors():
            app()
    """
    _print_any_name()
    _warnings.clear()
    with _one_line_warnings(), signals_as_exits():
        try:
            yield
        except (DuqError, OSError) as error:
            logging.getLogger("duq").debug("the error comes from here:", exc_info=error)
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None


def keep_warning(line: str) -> None:
    """Remembers a warning that was printed, for `warnings_printed`."""
    _warnings.append(line)


def warnings_printed() -> list[str]:
    """Every warning of this command so far, without "warning: "; for --json."""
    return list(_warnings)


def _print_any_name() -> None:
    """File names need not be text in the terminal's encoding; what it cannot write appears as \\udcff and the like."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """A DuqWarning is for the user, and appears without the place in the code that warns."""
    original = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, DuqWarning):
            keep_warning(str(message))
            print(f"warning: {message}", file=sys.stderr)
        else:
            original(message, category, *place, **more)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
