"""What must hold of one try, whatever it is given: a result or an error of duq's in one line, quickly, and in little memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any

from duq.plugins.errors import DuqError

SECONDS = 5.0  # of the processor for one try
PATIENCE_S = 60.0  # of the clock: other programs may be busy
MEMORY = 1 << 30  # bytes that one try may add to the process's peak
LONGEST_ERROR = 3000  # characters: a list of twenty faults

WRONG, FOREIGN, HANG, CRASH, MEMORY_USED = "wrong", "foreign", "hang", "crash", "memory"
HOW = (WRONG, FOREIGN, HANG, CRASH, MEMORY_USED)


class Failure(AssertionError):
    """A try that ended as none may. how: one of HOW."""

    def __init__(self, how: str, text: str):
        super().__init__(text[:2000])
        self.how = how


def judged(where: str, work: Callable[[], Any], allowed: tuple[type[DuqError], ...] = (DuqError,)) -> DuqError | None:
    """The error that `work` was refused with; None: it was done. allowed: the errors that it may be refused with.

    `work` raises AssertionError for a result that was accepted and cannot be right. Raises Failure, which begins with `where`.
    """
    before, begin, found = peak(), (time.process_time(), time.perf_counter()), None
    try:
        work()
    except Failure as failure:
        raise Failure(failure.how, f"{where}: {failure}") from failure
    except AssertionError as error:
        raise Failure(WRONG, f"{where}: {error}") from error
    except allowed as error:
        found = error
    except (Exception, SystemExit) as error:
        raise Failure(FOREIGN, f"{where}: {type(error).__name__}: {error}") from error
    computed, waited, added = time.process_time() - begin[0], time.perf_counter() - begin[1], peak() - before
    if computed >= SECONDS or waited >= PATIENCE_S:
        raise Failure(HANG, f"{where}: took {computed:.1f} s, {waited:.1f} s of the clock")
    if added >= MEMORY:
        raise Failure(MEMORY_USED, f"{where}: took {added / 1e9:.1f} GB")
    length = 1 if found is None else len(str(found))
    if not 0 < length < LONGEST_ERROR:
        raise Failure(FOREIGN, f"{where}: an error of {length} characters")
    return found


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
