"""Regular expressions that people and files give: refused by name where they are none, too large, or never end."""

from __future__ import annotations

import functools
import math
import re
import time
from collections.abc import Callable
from typing import Any

import regex

from duq.compiler.errors import DuqError
from duq.runtime.reading import brief_text, reason

LONGEST = 4000  # characters: a list of all linears' names has fewer
MOST_REPEATS = (
    1000  # of counted repetitions within each other, "(a{10}){100}": names are shorter, and `regex` writes them out
)
PATIENCE_S = 0.5  # of the processor, for all of a pattern's searches that are not quick
_QUICK_S = 1e-3
_BRACE = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|\{(?:(\d*)(,?)(\d*)\})?", re.DOTALL)


class Pattern:
    """A regular expression in the syntax of Python's `re`, applied to names of linears.

    what: the key or file that it is from. Raises `failure` for what is no such expression, and, when it is applied, for one
    that takes too long.
    """

    def __init__(self, text: str, what: str, failure: Callable[[str], DuqError]):
        self._text, self._what, self._failure = text, what, failure
        if len(text) > LONGEST:
            raise self._fault(f"has {len(text):,} characters, at most {LONGEST:,} are read")
        if _repeats(text) > MOST_REPEATS:
            raise self._fault(f"repeats more than {MOST_REPEATS:,} times, or has a brace that is no count; escape it: \\{{")
        try:
            re.compile(text)  # its syntax; `regex` has more, and gives some of it another meaning
            self._compiled = _compile(text)
        except Exception as error:  # errors of both modules, RecursionError, OverflowError
            raise self._fault(f"is not a regular expression: {reason(error)}") from error

    def starts(self, name: str) -> bool:
        """Whether the name begins with a match."""
        return self._timed("match", name)

    def is_in(self, name: str) -> bool:
        """Whether a part of the name matches."""
        return self._timed("search", name)

    def is_all_of(self, name: str) -> bool:
        """Whether the whole name matches."""
        return self._timed("fullmatch", name)

    def _timed(self, method: str, name: str) -> bool:
        spent, begin = _spent.get(self._text, 0.0), time.process_time()
        try:
            return getattr(self._compiled, method)(name, timeout=max(PATIENCE_S - spent, _QUICK_S)) is not None
        except TimeoutError as error:
            raise self._fault("takes too long to match; write it without repetitions within repetitions") from error
        finally:
            seconds = time.process_time() - begin
            if seconds > _QUICK_S:
                _spent[self._text] = spent + seconds

    def _fault(self, what: str) -> DuqError:
        return self._failure(f"{self._what} {brief_text(repr(self._text), 100)} {what}")


_spent: dict[str, float] = {}  # pattern -> seconds of its slow searches


@functools.lru_cache(1024)
def _compile(text: str) -> Any:
    return regex.compile(text, regex.VERSION0)


def _repeats(text: str) -> float:
    """The product of all counts of repetitions; infinity for a brace that begins no count, which `regex` may take as one."""
    counts = []
    for found in _BRACE.finditer(text):
        if found[0].startswith("{"):
            count = found[3] or found[1] or ("1" if found[2] else "")
            counts.append(max(float(count), 1.0) if count and len(count) < 10 else math.inf)
    return math.prod(counts)
