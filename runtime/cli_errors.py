"""How every command line of duq fails: one line on stderr, exit code 2."""

from __future__ import annotations

import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from duq.plugins.errors import DuqError, DuqWarning

_warnings: list[str] = []


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns what the user can act on (DuqError, and OSError: disk full, no permission) into a line and exit code 2.

    def main():
        with one_line_errors():
            app()
    """
    _print_any_name()
    _warnings.clear()
    with _one_line_warnings():
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


def check_output_file(flag: str, file: Path) -> None:
    """Raises DuqError, before the work whose result goes there, if `file` cannot be written. flag: what named it."""
    if file.is_dir() or not file.parent.is_dir():
        raise DuqError(f"{flag} {file}: must be a file in an existing directory")
    _check_writable(flag, file.parent)


def check_output_directory(flag: str, directory: Path) -> None:
    """The same for a directory that is there already or can be made, with those above it."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise DuqError(f"{flag} {directory}: {existing} is a file; name a directory")
    _check_writable(flag, existing)


def _check_writable(flag: str, directory: Path) -> None:
    try:  # an anonymous file tells the truth also to root and on read-only file systems, where access() may not
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise DuqError(f"{flag}: nothing can be written to {directory} ({error.strerror}); name another place") from error
