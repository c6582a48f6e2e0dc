"""Reading files that may hold anything: what a library raises about one becomes a single error that names it.

    with reading(file, CheckpointError):
        data = some_library.load(file)

The readers of duq check what they know to be wrong, in words of their own; this is what stands behind them.
"""

from __future__ import annotations

import json
import reprlib
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from duq.plugins.errors import DuqError

REMEDY = "copy or download it again"
TEXT_BYTES = 256 << 20  # the largest file of text that is read: the largest of a checkpoint takes a hundredth
LARGEST_INTEGER = 1 << 64  # of JSON

Failure = Callable[[str], DuqError]  # an error's class


@contextmanager
def reading(file: Path | str, failure: Failure, remedy: str = REMEDY) -> Iterator[None]:
    """What is inside reads `file`: `failure` instead of any exception that is not a DuqError, in one line.

    The line names the file, the reason and the remedy, and is short whatever the file holds.
    """
    try:
        yield
    except DuqError:
        raise
    except OSError as error:
        raise failure(f"{file}: cannot be read ({error.strerror or reason(error)}); {remedy}") from error
    except MemoryError as error:
        raise failure(f"{file}: asks for more memory than there is; {remedy}") from error
    except RecursionError as error:
        raise failure(f"{file}: is nested too deep; {remedy}") from error
    except Exception as error:
        raise failure(f"{file}: is damaged or not of the form expected ({reason(error)}); {remedy}") from error
    except BaseException as error:  # a panic of a library in Rust is no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise failure(f"{file}: is damaged ({reason(error)}); {remedy}") from error


def reason(error: BaseException) -> str:
    """What an exception says, in one short line."""
    text = " ".join(str(error).split())
    named = type(error).__name__ != "error"  # as the errors of re, zlib and struct are
    speaks_for_itself = text and (
        isinstance(error, (OSError, ValueError)) and not isinstance(error, UnicodeError) or not named
    )
    return brief_text(text if speaks_for_itself else f"{type(error).__name__}: {text}".removesuffix(": "))


def brief_text(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def brief(value: object) -> str:
    """`repr`, short and quick whatever the value holds, itself included."""
    return _REPR.repr(value)


def plain(value: object) -> str:
    """Text as it is, all else as `brief` has it."""
    return brief_text(value, 100) if isinstance(value, str) else brief(value)


def listed(names: Iterable[object], most: int = 12) -> str:
    """Names out of a file as an error lists them: `most` of them, the start of each, and how many more there are."""
    found = list(names)
    more = [f"{len(found) - most} more"] if len(found) > most else []
    return ", ".join([*(brief_text(str(name), 100) for name in found[:most]), *more])


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 3, 80, 80, 40


def present(file: Path, failure: Failure) -> bool:
    """Whether there is a file of this name. False if there is nothing.

    Raises `failure` for what is there and cannot be read as a file, which must not pass for a file that is absent: a folder,
    a link to nothing, a device.
    """
    try:
        mode = file.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise failure(f"{file}: cannot be read ({reason(error)})") from error
    try:
        mode = file.stat().st_mode
    except OSError as error:
        raise failure(
            f"{file}: is a link that leads nowhere ({error.strerror}); copy the file itself, or remove it"
        ) from error
    if not stat.S_ISREG(mode):
        what = "folder" if stat.S_ISDIR(mode) else "device, FIFO or socket"
        raise failure(f"{file}: is a {what}, expected a file; remove it or put the file there")
    return True


def read_bytes(file: Path, failure: Failure, remedy: str = REMEDY, limit: int = TEXT_BYTES) -> bytes:
    """What a file holds. Raises `failure` if it is absent, no regular file, or larger than `limit`."""
    if not present(file, failure):
        raise failure(f"{file}: cannot be read (No such file or directory); {remedy}")
    with reading(file, failure, remedy):
        size = file.stat().st_size
        if size > limit:
            raise failure(f"{file}: has {size:,} bytes, expected at most {limit:,}; {remedy}")
        return file.read_bytes()


def read_json(file: Path, failure: Failure, remedy: str = REMEDY) -> dict[str, Any]:
    """The JSON object that a file holds. Raises `failure`, which names the file."""
    return parse_json(read_bytes(file, failure, remedy), file, failure, remedy)


def parse_json(text: str | bytes, where: Path | str, failure: Failure, remedy: str = REMEDY) -> dict[str, Any]:
    """A JSON object. Raises `failure`, which names `where`, for anything else, and for numbers that no field can have."""
    with reading(where, failure, remedy):
        try:
            value = json.loads(text, parse_int=_integer, parse_float=_float)
        except ValueError as error:
            raise failure(f"{where}: cannot be read as JSON: {reason(error)}; {remedy}") from error
    if not isinstance(value, dict):
        raise failure(f"{where}: must hold a JSON object, not a {type(value).__name__}; {remedy}")
    return value


def _integer(digits: str) -> int:
    if len(digits) > 20 or abs(int(digits)) > LARGEST_INTEGER:
        raise ValueError(f"the number {brief_text(digits, 24)} is too large")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if abs(value) == float("inf"):
        raise ValueError(f"the number {brief_text(digits, 24)} is too large")
    return value
