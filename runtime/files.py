"""Writing files: whole or not at all, with nothing left behind, and with errors that name the file.

    with replacing(Path("engine.plan")) as file: ...       # a binary file beside the destination, renamed over it at the end
    with replacing_folder(Path("packs")) as folder: ...    # the same for a folder

Only regular files are replaced, and folders that the caller knows as its own. A link to a regular file stays: the file that it
points to is replaced. Devices, FIFOs, sockets and dangling links are refused, as is a name that cannot be written.

A temporary is called `.<destination>.<kernel>-<random>.duq-tmp`, and its writer holds a lock on it (flock), which ends with the
process however that ends. The next write into the folder removes the temporaries whose lock is free. A lock is proof only
under the kernel that granted it; temporaries of other kernels are removed when they are a day old.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import io
import os
import secrets
import shutil
import signal
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, cast

from duq.plugins.errors import DuqError

SUFFIX = ".duq-tmp"
FOREIGN_AGE_S = 86400.0  # of a temporary of another kernel, whose lock proves nothing here
_SHOWN = 24  # characters of the destination's name in its temporary's: short enough for every file system

Failure = Callable[[str], DuqError]  # an error's class

_KINDS: dict[Callable[[int], bool], str] = {
    stat.S_ISDIR: "is a folder",
    stat.S_ISCHR: "is a device",
    stat.S_ISBLK: "is a device",
    stat.S_ISFIFO: "is a FIFO",
    stat.S_ISSOCK: "is a socket",
}
_REMEDIES = {
    errno.ENOSPC: "make room or name another place",
    errno.EDQUOT: "make room or name another place",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f) or name another place",
    errno.ENAMETOOLONG: "give a shorter one",
}


# --- before any work --------------------------------------------------------------------------------------------------


def check_output_file(flag: str, file: Path, failure: Failure = DuqError) -> Path:
    """Raises `failure`, before the work whose result goes there, if `file` cannot be written. flag: what named it, or "".

    Returns the file itself, which is another one where `file` is a link.
    """
    shown = f"{flag} {file}".strip()
    kind = _kind(shown, file, failure)
    if kind == "is a folder":
        raise failure(f"{shown}: must be a file in an existing directory, and {kind}")
    if not _is_folder(file.parent):
        raise failure(f"{shown}: must be a file in an existing directory; {file.parent} does not exist")
    if kind:
        raise failure(f"{shown}: {kind}, and only regular files are replaced; name another file")
    target = file.resolve() if file.is_symlink() else file
    if os.path.ismount(target):
        raise failure(f"{shown}: is a mount point, which cannot be replaced; name a file in a mounted folder")
    _check_writable(flag or str(file), target.parent, failure)
    return target


def check_output_directory(flag: str, directory: Path, failure: Failure = DuqError) -> None:
    """The same for a directory that is there already or can be made, with those above it."""
    shown = f"{flag} {directory}".strip()
    for path in (directory, *directory.absolute().parents):
        kind = _kind(shown, path, failure)
        if kind is not None and kind != "is a folder":
            raise failure(f"{shown}: {path} {kind or 'is a file'}; name a directory")
        if kind is not None:
            _check_writable(flag or str(directory), path, failure)
            return


def _kind(shown: str, path: Path, failure: Failure) -> str | None:
    """What is there, links followed: "" for a regular file, words for all else; None for nothing."""
    try:
        mode = path.lstat().st_mode
        mode = path.stat().st_mode if stat.S_ISLNK(mode) else mode
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.is_symlink():
            link = f"is a link to {os.readlink(path)}, which does not exist"
            raise failure(f"{shown}: {link}; remove it or name another place") from error
        return None
    except (OSError, ValueError) as error:
        raise failure(f"{shown}: cannot be written ({_reason(error)}); {_remedy(error)}") from error
    return next((what for test, what in _KINDS.items() if test(mode)), "")


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _check_writable(flag: str, directory: Path, failure: Failure) -> None:
    try:  # an anonymous file tells the truth also to root and on read-only file systems, where access() may not
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise failure(f"{flag}: nothing can be written to {directory} ({_reason(error)}); name another place") from error


# --- writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path, failure: Failure = DuqError, *, durable: bool = False, sweep: bool = True) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends without an exception, and is gone otherwise.

    durable: on the disk, not only in the system's memory, before it has its name. sweep: first remove what killed processes
    left in the folder, which takes a while where it holds very many files. Raises `failure`, which names `path`, where it
    cannot be written.
    """
    draft = Draft(path, failure, sweep=sweep)
    try:
        yield draft.file
        draft.publish(durable=durable)
    finally:
        draft.discard()


def write_text(path: Path, text: str, failure: Failure = DuqError) -> None:
    """Writes a text file (UTF-8) whole or not at all. Raises `failure` where it cannot be written."""
    with replacing(path, failure) as file:
        file.write(text.encode("utf-8", "surrogateescape"))


@contextmanager
def writing(path: Path, failure: Failure = DuqError) -> Iterator[None]:
    """What is inside writes `path`, or files in it, by means of its own: an OSError becomes `failure` that names it."""
    try:
        yield
    except OSError as error:
        raise _unwritable(path, error, failure) from error


class Draft:
    """A file beside its destination, until `publish` gives it its name or `discard` removes it; the latter may follow both.

    `file` is open for writing. Its errors are `failure`, and name the destination.
    """

    def __init__(self, path: Path, failure: Failure = DuqError, *, sweep: bool = True):
        self._failure, self._shown = failure, path
        self._target = check_output_file("", path, failure)
        if sweep:
            remove_stale(self._target.parent)
        with writing(path, failure):
            self._temporary, descriptor = _locked_temporary(self._target, _new_file)
        self.file = cast(BinaryIO, io.BufferedWriter(_Named(descriptor, path, failure)))

    def publish(self, *, durable: bool = True) -> None:
        """Renames the file over its destination."""
        self.file.flush()
        with writing(self._shown, self._failure):
            if durable:
                os.fsync(self.file.fileno())
            os.replace(self._temporary, self._target)
        self.file.close()

    def discard(self) -> None:
        """Removes what was not published."""
        if not self.file.closed:
            with suppress(OSError):
                self._temporary.unlink()
            with suppress(DuqError, OSError):  # what is still to be flushed goes nowhere
                self.file.close()


class _Named(io.FileIO):
    """A file whose errors name the destination."""

    def __init__(self, descriptor: int, path: Path, failure: Failure):
        super().__init__(descriptor, "w")
        self._path, self._failure = path, failure

    def write(self, data: Any) -> int:
        with writing(self._path, self._failure):
            return super().write(data)


@contextmanager
def replacing_folder(
    path: Path, failure: Failure = DuqError, may_replace: Callable[[Path], bool] = lambda folder: False
) -> Iterator[Path]:
    """An empty folder that takes the place of `path` when the block ends without an exception, and is gone otherwise.

    Folders above it are made. may_replace: whether a folder that is there, and not empty, is one to be replaced.
    Raises `failure`, which names `path`, where it cannot be written or holds something else.
    """
    target = check_output_folder("", path, failure, may_replace)
    with writing(path, failure):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(target.parent)
        draft, lock = _locked_temporary(target, _new_folder)
    try:
        with writing(path, failure):
            yield draft
            _rename_folder(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        os.close(lock)


def check_output_folder(
    flag: str, path: Path, failure: Failure = DuqError, may_replace: Callable[[Path], bool] = lambda folder: False
) -> Path:
    """Raises `failure`, before any work, unless `replacing_folder` can write `path`. Returns the folder itself of a link."""
    shown = f"{flag} {path}".strip()
    check_output_directory(flag, path, failure)
    target = path.resolve() if path.is_symlink() else path
    if target.is_dir():
        if os.path.ismount(target):
            raise failure(f"{shown}: is a mount point, which cannot be replaced; name a folder in it")
        if any(target.iterdir()) and not may_replace(target):
            raise failure(f"{shown}: already exists and holds something else; name another folder or remove it")
        _check_writable(flag or str(path), target.absolute().parent, failure)
    return target


def _rename_folder(draft: Path, target: Path) -> None:
    if not target.exists():
        os.rename(draft, target)
        return
    old, lock = _locked_temporary(target, _new_folder)  # an empty folder, in whose place the old one goes
    try:
        os.rename(target, old)
        try:
            os.rename(draft, target)
        except OSError:
            os.rename(old, target)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
        os.close(lock)


# --- temporaries ------------------------------------------------------------------------------------------------------


def _new_file(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def _new_folder(path: Path) -> int:
    path.mkdir()
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _locked_temporary(target: Path, make: Callable[[Path], int]) -> tuple[Path, int]:
    """A new temporary beside `target`, and the descriptor that holds its lock."""
    while True:
        path = target.with_name(f".{target.name[:_SHOWN]}.{_kernel()}-{secrets.token_hex(4)}{SUFFIX}")
        try:
            descriptor = make(path)
        except FileExistsError:
            continue
        with suppress(OSError):  # a file system without locks, on which nothing is swept either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):  # swept by another process before it was locked: once more
            if os.path.samestat(path.lstat(), os.fstat(descriptor)):
                return path, descriptor
        os.close(descriptor)


def remove_stale(folder: Path) -> None:
    """Removes the temporaries in `folder` whose writers are dead. Never raises: what cannot be removed stays."""
    with suppress(OSError), os.scandir(folder) as entries:
        for path in [Path(entry.path) for entry in entries if entry.name.startswith(".") and entry.name.endswith(SUFFIX)]:
            with suppress(OSError):
                _remove_if_stale(path)


def _remove_if_stale(path: Path) -> None:
    status = path.lstat()
    is_folder = stat.S_ISDIR(status.st_mode)
    here = path.name.removesuffix(SUFFIX).rpartition(".")[2].partition("-")[0] == _kernel()
    if not (is_folder or stat.S_ISREG(status.st_mode)) or not (here or time.time() - status.st_mtime > FOREIGN_AGE_S):
        return
    flags = os.O_RDONLY | os.O_DIRECTORY if is_folder else os.O_RDWR
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: its writer lives, or nobody can tell
        shutil.rmtree(path) if is_folder else path.unlink()
    finally:
        os.close(descriptor)


@functools.cache
def _kernel() -> str:
    """Eight digits that tell a running kernel from every other, and from itself after a restart."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:
        return "unknown0"


# --- errors and signals -----------------------------------------------------------------------------------------------


def _unwritable(path: Path, error: OSError, failure: Failure) -> DuqError:
    inside = f" ({error.filename})" if error.filename and SUFFIX not in str(error.filename) else ""
    return failure(f"{path}{inside}: cannot be written ({_reason(error)}); {_remedy(error)}")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _remedy(error: Exception) -> str:
    return _REMEDIES.get(getattr(error, "errno", None) or 0, "name another place")


@contextmanager
def signals_as_exits() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block by an exception, as Ctrl-C does, so that what is half-written is removed.

    The process exits with 128 + the signal's number. A signal that is ignored (nohup) or handled otherwise stays so.
    """
    names = (signal.SIGTERM, signal.SIGHUP)
    ours = [each for each in names if signal.getsignal(each) is signal.SIG_DFL] if _is_main_thread() else []

    def end(number: int, frame: FrameType | None) -> None:
        for each in ours:
            signal.signal(each, signal.SIG_IGN)  # the next one would interrupt the cleaning up
        raise SystemExit(128 + number)

    for each in ours:
        signal.signal(each, end)
    try:
        yield
    finally:
        for each in ours:
            signal.signal(each, signal.SIG_DFL)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
