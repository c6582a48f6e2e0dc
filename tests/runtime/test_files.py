"""Files appear whole or not at all, whoever is killed; only regular files are replaced; errors name the file."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from duq.plugins.errors import DuqError
from duq.runtime import files
from duq.runtime.errors import PlanError
from duq.runtime.files import (
    SUFFIX,
    check_output_directory,
    check_output_file,
    check_output_folder,
    remove_stale,
    replacing,
    replacing_folder,
    write_text,
)

ROOT = Path(__file__).parents[2]
WRITERS = {
    "file": "with replacing(path) as file:\n    file.write(b'half')\n    file.flush()\n    wait()",
    "folder": "with replacing_folder(path) as folder:\n    (folder / 'part').write_text('half')\n    wait()",
    "plan": "with PlanWriter(path) as plan:\n    plan.write('part', b'half')\n    wait()",
}


def writer(kind: str, path: Path, ignored: int | None = None) -> subprocess.Popen:
    """A process in the middle of writing `path`."""
    program = f"""
import signal, sys, time
from pathlib import Path
from duq.runtime.cli_errors import one_line_errors
from duq.runtime.files import replacing, replacing_folder
from duq.runtime.plan import PlanWriter

def wait():
    print("half", flush=True)
    time.sleep(60)

path = Path(sys.argv[1])
# These tests may be a child of nohup, which ignores one, or run in the background of a shell, where the other is ignored.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
{f"signal.signal({ignored}, signal.SIG_IGN)" if ignored else ""}
with one_line_errors():
{textwrap.indent(WRITERS[kind], "    ")}
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program, path], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"half\n"
    return process


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


@pytest.mark.parametrize("kind", WRITERS)
def test_nothing_is_left_by_signals_and_what_a_kill_leaves_is_swept(kind, tmp_path):
    path = tmp_path / "out"
    ends = {
        signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGHUP: 128 + signal.SIGHUP,
        signal.SIGINT: -signal.SIGINT, signal.SIGKILL: -signal.SIGKILL,
    }  # fmt: skip
    for number, code in ends.items():
        process = writer(kind, path)
        assert len(names(tmp_path)) == 1
        process.send_signal(number)
        assert process.wait(20) == code
        process.communicate()
        assert len(names(tmp_path)) == (number == signal.SIGKILL), number
    living = writer(kind, tmp_path / "other")  # sweeps what was left, and is not swept itself
    (temporary,) = names(tmp_path)
    assert temporary.startswith(".other.") and temporary.endswith(SUFFIX)
    write_text(path, "whole")
    assert names(tmp_path) == {"out", temporary}
    living.kill()
    living.communicate()
    write_text(path, "again")
    assert names(tmp_path) == {"out"} and path.read_text() == "again"


def test_ignored_signals_stay_ignored(tmp_path):
    process = writer("file", tmp_path / "out", ignored=signal.SIGHUP)  # as nohup starts it
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert process.poll() is None
    process.terminate()
    assert process.wait(20) == 128 + signal.SIGTERM
    process.communicate()
    assert not names(tmp_path)


def test_signal_handlers_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with files.signals_as_exits():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
    found = []
    thread = threading.Thread(target=lambda: found.append(_entered_elsewhere()))
    thread.start()
    thread.join()
    assert found == [before]


def _entered_elsewhere():
    with files.signals_as_exits():  # of a thread, which may set no handlers
        return signal.getsignal(signal.SIGTERM)


def test_only_our_own_and_surely_dead_temporaries_are_swept(tmp_path):
    here, elsewhere = files._kernel(), "ffffffff"
    old = time.time() - 2 * files.FOREIGN_AGE_S
    ours, foreign_old, foreign_new = (
        tmp_path / f".x.{kernel}-{digits}{SUFFIX}"
        for kernel, digits in ((here, "00000001"), (elsewhere, "00000002"), (elsewhere, "00000003"))
    )
    theirs = [tmp_path / name for name in ("x.tmp", f"x{SUFFIX}", ".x.1.tmp")]
    for file in (ours, foreign_old, foreign_new, *theirs):
        file.write_text("x")
    folder = tmp_path / f".y.{here}-00000004{SUFFIX}"
    folder.mkdir()
    (folder / "part").write_text("x")
    link = tmp_path / f".z.{here}-00000005{SUFFIX}"
    link.symlink_to(theirs[0])
    os.utime(foreign_old, (old, old))
    remove_stale(tmp_path)
    assert names(tmp_path) == {foreign_new.name, link.name, *(file.name for file in theirs)}
    remove_stale(tmp_path / "none")  # never raises


def test_two_writers_of_one_name_do_not_meet(tmp_path, monkeypatch):
    """Temporaries differ although process and name are equal; the last one to end is what stays, whole."""
    path = tmp_path / "out"
    with replacing(path) as first:
        first.write(b"first" * 1000)
        with replacing(path) as second:
            second.write(b"second")
            assert len(names(tmp_path)) == 2
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first" * 1000 and names(tmp_path) == {"out"}


def test_an_exception_leaves_what_was_there(tmp_path):
    path, folder = tmp_path / "out", tmp_path / "packs"
    path.write_text("before")
    folder.mkdir()
    (folder / "before").write_text("")
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"after" * 100_000)
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), replacing_folder(folder, may_replace=lambda _: True) as draft:
        (draft / "after").write_text("")
        raise ZeroDivisionError
    assert path.read_text() == "before" and names(folder) == {"before"} and names(tmp_path) == {"out", "packs"}


def test_a_folder_is_replaced_whole(tmp_path):
    folder = tmp_path / "a" / "packs"
    for name in ("first", "second"):
        with replacing_folder(folder, may_replace=lambda there: "first" in names(there)) as draft:
            (draft / name).write_text("")
    assert names(folder) == {"second"} and names(folder.parent) == {"packs"}
    assert folder.stat().st_mode & 0o777 == (tmp_path / "a").stat().st_mode & 0o777
    with pytest.raises(PlanError, match="packs: already exists and holds something else"):
        with replacing_folder(folder, PlanError, may_replace=lambda there: "first" in names(there)):
            raise AssertionError


@contextmanager
def _socket(path: Path):
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(path))
        yield


def test_only_regular_files_are_replaced(tmp_path):
    fifo, folder, file = tmp_path / "fifo", tmp_path / "folder", tmp_path / "file"
    os.mkfifo(fifo)
    folder.mkdir()
    file.write_text("x")
    links = {}
    for target in (fifo, folder, file, Path("/dev/null"), tmp_path / "none", tmp_path / "circle"):
        links[target.name] = tmp_path / f"link-{target.name}"
        links[target.name].symlink_to(target)
    (tmp_path / "circle").symlink_to(links["circle"])
    with _socket(tmp_path / "socket"):
        refused = {
            fifo: "is a FIFO, and only regular files are replaced", Path("/dev/null"): "is a device",
            tmp_path / "socket": "is a socket", folder: "must be a file in an existing directory",
            links["fifo"]: "is a FIFO", links["folder"]: "must be a file", links["null"]: "is a device",
            links["none"]: "is a link to .*none, which does not exist", links["circle"]: "cannot be written",
            file / "x": "must be a file in an existing", tmp_path / "none" / "x": "must be a file in an existing",
            tmp_path / ("n" * 256): "cannot be written .File name too long.; give a shorter one",
            tmp_path / "a\0b": "cannot be written .*null",
            Path("/proc/out"): "nothing can be written to /proc",
        }  # fmt: skip
        before = names(tmp_path)
        for path, words in refused.items():
            with pytest.raises(PlanError, match=words) as caught:
                check_output_file("--out", path, PlanError)
            assert str(caught.value).startswith("--out")
            with pytest.raises(PlanError, match=words), replacing(path, PlanError):
                raise AssertionError
        assert names(tmp_path) == before
    write_text(links["file"], "through the link")
    assert links["file"].is_symlink() and file.read_text() == "through the link"


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    for path, words in {
        tmp_path / "file": "file is a file; name a directory",
        tmp_path / "file" / "x": "file is a file; name a directory",
        tmp_path / "dangling": "is a link to .*none, which does not exist",
        tmp_path / ("n" * 256) / "x": "File name too long",
        Path("/dev/null"): "/dev/null is a device; name a directory",
        Path("/proc/none"): "nothing can be written to /proc",
    }.items():
        with pytest.raises(DuqError, match=words):
            check_output_directory("--out", path)
        with pytest.raises(DuqError, match=words):
            check_output_folder("--out", path)
    with pytest.raises(DuqError, match="is a mount point, which cannot be replaced"):
        check_output_folder("--out", Path("/dev/shm"), may_replace=lambda _: True)
    check_output_folder("--out", tmp_path / "a" / "b" / "c")
    assert names(tmp_path) == {"file", "dangling"}


def test_names_as_long_as_the_file_system_takes(tmp_path):
    for name in ("n" * 255, "ü" * 127, b"\xff\xfe.plan".decode(errors="surrogateescape")):
        write_text(tmp_path / name, "x")
        with replacing_folder(tmp_path / f"{name[:-1]}f"):
            pass
    assert len(names(tmp_path)) == 6


@contextmanager
def full_disk(size: int):
    """Files may have at most so many bytes, as on a disk with no more room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_names_the_file(tmp_path):
    path = tmp_path / "engine.plan"
    path.write_text("before")
    with full_disk(100_000):
        for count in (100_001, 1_000_000):  # which fails when it is flushed, and when it is written
            with pytest.raises(PlanError, match="engine.plan: cannot be written .File too large.; raise the limit"):
                with replacing(path, PlanError) as file:
                    file.write(b"x" * count)
        with pytest.raises(DuqError, match="folder .*part.: cannot be written .File too large."):
            with replacing_folder(tmp_path / "folder") as folder, open(folder / "part", "wb", buffering=0) as part:
                while True:
                    _write(part, folder / "part")
    assert path.read_text() == "before" and names(tmp_path) == {"engine.plan"}


def _write(part, name: Path) -> None:
    try:
        part.write(b"x" * 60_000)
    except OSError as error:
        raise OSError(error.errno, error.strerror, name.name) from None


def test_file_systems_without_locks(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    left = tmp_path / f".x.{files._kernel()}-00000001{SUFFIX}"
    left.write_text("nobody can tell whether its writer lives")
    write_text(tmp_path / "out", "whole")
    assert names(tmp_path) == {"out", left.name}


def test_a_temporary_swept_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    lock, swept = files.fcntl.flock, []

    def sweep_first(descriptor, operation):
        if not swept:
            swept.extend(names(tmp_path))
            with suppress(OSError):
                (tmp_path / swept[0]).unlink()
        lock(descriptor, operation)

    monkeypatch.setattr(files.fcntl, "flock", sweep_first)
    write_text(tmp_path / "out", "whole")
    assert swept and (tmp_path / "out").read_text() == "whole"
