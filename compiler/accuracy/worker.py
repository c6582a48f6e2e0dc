"""One side of the comparison runs in a process of its own: its peak memory and its threads are then nobody else's.

Parent and worker share a directory: `inputs.<i>.npz` (model inputs and noise) for each observation, and what the sides
leave there, `engine.<i>.npz` and `reference.<i>.npz`. A worker prints one line of JSON for each pass it has done, and
last its cost.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import numpy as np

import duq
from duq.plugins.errors import DuqError
from duq.runtime.preprocess import ModelInputs

Arrays = dict[str, np.ndarray]
PACKAGES = Path(duq.__file__).resolve().parents[1]


def write_inputs(directory: Path, index: int, inputs: ModelInputs, noise: np.ndarray) -> None:
    np.savez(directory / f"inputs.{index}.npz", noise=noise, **vars(inputs))


def read_inputs(directory: Path, index: int) -> tuple[ModelInputs, np.ndarray]:
    arrays = read_arrays(directory / f"inputs.{index}.npz")
    return ModelInputs(**{field.name: arrays[field.name] for field in fields(ModelInputs)}), arrays["noise"]


def read_arrays(file: Path) -> Arrays:
    with np.load(file) as archive:
        return dict(archive)


def passes(count: int) -> int:
    """How often a worker runs the policy over `count` observations: a warm-up, then each timed, then each traced."""
    return 1 + 2 * count


def run_worker(module: str, arguments: list, advance: Callable[[], None]) -> dict:
    """Runs `python -m module arguments` and returns its cost; `advance` is called after every pass.

    A fresh interpreter and not a fork or a spawn of multiprocessing, which would bring this process's modules along; in
    the directory of our packages, so that it finds these and not what lies in the user's. Paths have to be absolute.
    Raises DuqError with the worker's own message, or with how it died.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    message: dict = {}
    with subprocess.Popen(command, cwd=PACKAGES, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            message = json.loads(line)
            if "error" in message:
                raise DuqError(message["error"])
            advance()
    if process.returncode or "cost" not in message:
        died = f"died of signal {-process.returncode}" if process.returncode < 0 else f"failed ({process.returncode})"
        raise DuqError(f"{module} {died}; out of memory, or see the message above")
    return message["cost"]


@contextmanager
def errors_to_parent() -> Iterator[None]:
    """Around a worker's main: what the user can act on goes to the parent, which reports it as its own."""
    try:
        yield
    except (DuqError, OSError) as error:
        _report(error=str(error))
        raise SystemExit(2) from None


def work(
    directory: Path,
    count: int,
    opened: int,
    run: Callable[[ModelInputs, np.ndarray], np.ndarray],
    trace: Callable[[int, ModelInputs, np.ndarray], Arrays],
    side: str,
) -> None:
    """The worker's part. run: inputs, noise -> actions, which is what is timed. trace: the stages' arrays as well.

    opened: the resident bytes before the policy was opened, libraries included. Memory is read before tracing, which
    holds on to more than a run does.
    """
    jobs = [read_inputs(directory, index) for index in range(count)]
    run(*jobs[0])
    _report()
    milliseconds, actions = [], []
    for job in jobs:
        start = time.perf_counter()
        actions.append(run(*job))
        milliseconds.append((time.perf_counter() - start) * 1e3)
        _report()
    cost = {"milliseconds": milliseconds, "peak_bytes": resident_bytes("VmHWM"), "libraries_bytes": opened}
    for index, job in enumerate(jobs):
        np.savez(directory / f"{side}.{index}.npz", actions=actions[index], **trace(index, *job))  # type: ignore[arg-type]
        _report(**({"cost": cost} if index == count - 1 else {}))


def resident_bytes(field: str = "VmRSS") -> int:
    """VmRSS (now) or VmHWM (peak) of this process, mapped files included.

    Not getrusage's ru_maxrss: across exec that keeps the peak of the parent from which the process was forked.
    """
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


def _report(**message) -> None:
    print(json.dumps(message), flush=True)
