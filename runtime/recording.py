"""Recording what a served policy answered: observations in a folder, to calibrate on later."""

from __future__ import annotations

import fcntl
import logging
import os
import queue
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from duq.plugins.errors import DuqError
from duq.runtime.errors import ObservationError
from duq.runtime.files import check_output_directory, remove_stale, writing
from duq.runtime.observations import save_observations

OUTCOMES = ("written", "queue_full", "disk_limit", "failed")  # of an observation that was to be recorded
_WAITING = 8  # observations that may wait for the disk
_NAME = "observation-{:08d}.npz"
_NUMBERED = re.compile(r"observation-(\d{8,})\.npz")
log = logging.getLogger(__name__)


class Recorder:
    """Writes every ``every``-th observation that it is offered into ``directory``, one .npz file each.

    The files are read by `runtime.observations.load_observations`; each appears whole or not at all. Numbering goes on
    where the directory's files end. At most ``limit_bytes`` are used, with what the directory holds already: then nothing
    more is written, and nothing is deleted.

    Raises DuqError if the directory cannot be made or written to, or another server records into it.
    """

    def __init__(self, directory: Path, *, every: int, limit_bytes: int):
        check_output_directory("--record", directory)
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        remove_stale(directory)
        self._directory, self._every, self._limit = directory, every, limit_bytes
        self._lock = _locked(directory)
        files = [file for file in directory.iterdir() if file.suffix == ".npz"]
        self._bytes = sum(file.stat().st_size for file in files)
        self._number = max((int(found[1]) for file in files if (found := _NUMBERED.fullmatch(file.name))), default=-1) + 1
        self._offered = 0
        self._waiting: queue.Queue[Mapping[str, Any] | None] = queue.Queue(_WAITING)
        self._told: set[str] = set()
        self._count: Callable[[str], None] = lambda outcome: None
        self._writer = threading.Thread(target=self._write_all, name="duq-record", daemon=True)

    def start(self, count: Callable[[str], None]) -> None:
        """Begins to write. ``count`` is called with one of OUTCOMES for each observation, from any thread."""
        self._count = count
        log.info("recording into %s: %.3f GB of at most %.3f", self._directory, self._bytes / 1e9, self._limit / 1e9)
        self._writer.start()

    def offer(self, observation: Mapping[str, Any]) -> None:
        """Takes an observation, or passes over it; never waits. Its arrays must not change from now on."""
        self._offered += 1
        if (self._offered - 1) % self._every:
            return
        try:
            self._waiting.put_nowait(observation)
        except queue.Full:
            self._dropped("queue_full", "the disk does not keep up")

    def close(self) -> None:
        """Writes what waits, and ends."""
        if self._writer.is_alive():
            self._waiting.put(None)
            self._writer.join()
        os.close(self._lock)

    def _write_all(self) -> None:
        while (observation := self._waiting.get()) is not None:
            try:
                self._write(observation)
            except (ObservationError, OSError) as error:
                self._dropped("failed", str(error))
            except Exception:  # recording must never end the serving, nor end itself without a word
                log.exception("an observation could not be recorded")
                self._count("failed")

    def _write(self, observation: Mapping[str, Any]) -> None:
        file, full = self._directory / _NAME.format(self._number), self._bytes >= self._limit
        if not full:
            save_observations(file, [observation], sweep=False)
            size = file.stat().st_size
            full = self._bytes + size > self._limit
        if full:
            file.unlink(missing_ok=True)
            self._limit = 0  # also for a smaller observation: what is recorded is not a matter of its size
            self._dropped("disk_limit", f"{self._directory} is full, {self._bytes / 1e9:.3f} GB; see --record-limit")
            return
        self._number += 1
        self._bytes += size
        self._count("written")

    def _dropped(self, outcome: str, why: str) -> None:
        """Counts an observation that is not recorded; the log says so the first time."""
        if outcome not in self._told:
            self._told.add(outcome)
            log.warning("observations are not recorded: %s", why)
        self._count(outcome)


def _locked(directory: Path) -> int:
    """A descriptor that holds the directory for this process."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise DuqError(f"--record {directory}: another server records into it; name another directory") from None
    return descriptor
