"""How every command line of duq fails: one line on stderr, exit code 2."""
from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from plugins.errors import DuqError


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns what the user can act on (DuqError, and OSError: disk full, no permission) into a line and exit code 2.

        def main():
            with one_line_errors():
                app()
    """
    try:
        yield
    except (DuqError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
