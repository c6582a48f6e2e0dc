"""The whole campaign: every kind of input, how many tries of each, and the processes that make them.

A process makes the tries of one kind. One that crashes or hangs is counted with the seed that it was at, and another goes on behind
that. So a fault in a library of C++ costs a try, and not the campaign.
"""

from __future__ import annotations

import faulthandler
import logging
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.fuzz import kinds, messages, observations, plans
from tests.fuzz.judge import CRASH, HANG, PATIENCE_S, Failure, peak
from tests.fuzz.plans import Attempt

OPENING_S = 120.0  # of the clock, until a process makes its first try
CHUNK = 2000  # tries of one process
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.fuzz.campaign"])


@dataclass(frozen=True)
class Trial:
    """count: tries of the full campaign. make: writes the files into a folder, once for all trials that share it.
    ready: a folder -> a context whose value makes a try of a seed; it says how that ended, or raises Failure."""

    count: int
    make: Callable[[Path], Any]
    ready: Callable[[Path], Any]


@dataclass
class Row:
    """What came of the tries of one kind."""

    kind: str
    tries: int = 0
    ends: Counter[str] = field(default_factory=Counter)  # how tries ended: "accepted", an error's class, or one of HOW
    failures: list[dict[str, Any]] = field(default_factory=list)
    peak_bytes: int = 0
    seconds: float = 0.0

    def add(self, seed: int, end: str, text: str = "") -> None:
        self.tries += 1
        self.ends[end] += 1
        if text:
            reproduce = f"python -m tests.fuzz {self.kind!r} --seed {seed}"
            self.failures.append({"seed": seed, "how": end, "text": text, "reproduce": reproduce})

    def join(self, other: Row) -> None:
        self.tries, self.seconds = self.tries + other.tries, self.seconds + other.seconds
        self.ends.update(other.ends)
        self.failures += other.failures
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)


@contextmanager
def _reading(kind: str, folder: Path) -> Iterator[Attempt]:
    yield lambda seed: "accepted" if kinds.check(kind, folder, seed) is None else "DuqError"


def _of_plans(count: int, ready: Callable[[Path], Any]) -> Trial:
    return Trial(count, plans.make_plans, ready)


TRIALS: dict[str, Trial] = {
    "cpu plan, flips": _of_plans(5100, partial(plans.damaged, "cpu", plans.flip, "cpu plan, flips")),
    "cuda plan, flips": _of_plans(5100, partial(plans.damaged, "cuda", plans.flip, "cuda plan, flips")),
    "cpu plan, container": _of_plans(1000, partial(plans.damaged, "cpu", plans.edit_container, "cpu plan, container")),
    "cuda plan, container": _of_plans(1000, partial(plans.damaged, "cuda", plans.edit_container, "cuda plan, container")),
    "cpu plan, rewritten": _of_plans(1000, partial(plans.rewritten, "cpu", "cpu plan, rewritten")),
    "cuda plan, rewritten": _of_plans(1000, partial(plans.rewritten, "cuda", "cuda plan, rewritten")),
    "manifest": _of_plans(1000, plans.manifests),
    **{f"observations, {robot}": _of_plans(600, partial(observations.tries, robot)) for robot in observations.ROBOTS},
    "messages": _of_plans(600, messages.ready),
    **{kind: Trial(1000, each.make, partial(_reading, kind)) for kind, each in kinds.KINDS.items()},
}


class Files:
    """The intact files of trials, each made once. make(trial) -> their folder."""

    def __init__(self, root: Path):
        self._root, self._made = root, dict[Any, Path]()

    def __call__(self, trial: Trial) -> Path:
        if trial.make not in self._made:
            folder = self._root / f"files{len(self._made)}"
            folder.mkdir(parents=True)
            trial.make(folder)
            self._made[trial.make] = folder
        return self._made[trial.make]


@contextmanager
def files() -> Iterator[Files]:
    """In memory, where the system has a place for that."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="duq-fuzz-", dir=place) as root:
        yield Files(Path(root))


def campaign(
    names: list[str], share: float, processes: int, done: Callable[[Row], None], trials: dict[str, Trial] = TRIALS
) -> dict[str, Row]:
    """A share of the tries of these kinds. done: is told of each part."""
    rows = {name: Row(name) for name in names}
    with files() as made, ThreadPoolExecutor(processes) as pool:
        parts = []
        for name in names:
            folder, count = made(trials[name]), max(1, round(share * trials[name].count))
            for start in range(0, count, CHUNK):
                seeds = range(start, min(count, start + CHUNK))
                parts.append(pool.submit(tries, name, trials[name], folder, seeds))
        for part in parts:
            row = part.result()
            rows[row.kind].join(row)
            done(row)
    return rows


def tries(name: str, trial: Trial, folder: Path, seeds: range, patience: float = PATIENCE_S) -> Row:
    """Makes the tries of these seeds in processes of their own, on a copy of the folder; patience: seconds for one."""
    row, begin = Row(name), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="try-", dir=folder.parent) as own:
        while seeds:
            copy = Path(own) / "files"
            shutil.copytree(folder, copy)
            seeds = _some(row, trial, copy, seeds, patience)
            shutil.rmtree(copy)
    row.seconds = time.perf_counter() - begin
    return row


def _some(row: Row, trial: Trial, folder: Path, seeds: range, patience: float) -> range:
    """The tries of one process, until it ends, crashes or hangs; the seeds that are left."""
    mine, theirs = CONTEXT.Pipe(duplex=False)
    log = folder.with_suffix(".log")
    process = CONTEXT.Process(target=_work, args=(trial.ready, folder, seeds, theirs, log))
    process.start()
    theirs.close()
    at: int | None = None
    try:
        while True:
            if not mine.poll(patience if at is not None else OPENING_S):
                process.kill()
                return _stopped(row, seeds, at, HANG, "nothing was heard of it")
            seed, end, text, memory = mine.recv()
            row.peak_bytes = max(row.peak_bytes, memory)
            at = seed if end is None else None
            if end is not None:
                row.add(seed, end, text)
                seeds = range(seed + 1, seeds.stop)
    except EOFError:
        process.join()
        if not seeds and at is None and process.exitcode == 0:
            return seeds
        code = process.exitcode or 0
        what = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return _stopped(row, seeds, at, CRASH, f"{what}: {_excerpt(log)}")
    finally:
        process.join()
        mine.close()


def _stopped(row: Row, seeds: range, at: int | None, how: str, text: str) -> range:
    """Counts a process that did not end as it should. Without a seed that it was at, there is no use in another."""
    seed = seeds.start if at is None else at
    row.add(seed, how, f"{row.kind}, seed {seed}{'' if at is not None else ', before or after its tries'}: {text}")
    return range(seed + 1, seeds.stop) if at is not None else range(0)


def _excerpt(log: Path) -> str:
    """What a process printed last: a traceback of Python's ends with what matters, one of faulthandler's begins with it."""
    try:
        text = log.read_text(errors="replace").strip()
    except OSError:
        return ""
    return text if len(text) < 1500 else f"{text[:700]} ... {text[-700:]}"


def _work(ready: Callable[[Path], Any], folder: Path, seeds: range, pipe: Connection, log: Path) -> None:
    """The process: tells of each seed when it begins with it (None), and how it ended."""
    with log.open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        faulthandler.enable()
        quiet()
        with ready(folder) as attempt:
            for seed in seeds:
                pipe.send((seed, None, "", peak()))
                pipe.send((seed, *once(attempt, seed), peak()))
    pipe.close()


def quiet() -> None:
    """What duq and libraries warn of is not what is looked for."""
    warnings.simplefilter("ignore")
    logging.getLogger("duq").setLevel(logging.ERROR)


def once(attempt: Attempt, seed: int) -> tuple[str, str]:
    """How a try ended, and what was wrong with that, or ""."""
    try:
        return attempt(seed), ""
    except Failure as failure:
        return failure.how, str(failure)
