"""The engine of an opened plan, and the states that it can be in.

open ── an error that left the executor usable ──► open
     ── an error that did not ───────────────────► failed: the plan must be opened again, on a GPU by a new process
     ── close ───────────────────────────────────► closed, once the calls that had begun have ended
     ── fork, in the child ──────────────────────► not usable there: the executor's threads and its GPU stayed behind
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np

from duq.plugins.errors import DeviceError, KernelError
from duq.runtime.errors import EngineError, PlanError
from duq.runtime.executors import Executor, Widening, open_executor
from duq.runtime.plan import Plan
from duq.runtime.preprocess import ModelInputs

OUT_OF_MEMORY = ("CUDA_ERROR_OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED")
_FREE_SOME = (
    "the GPU has no memory left: end what else uses it (nvidia-smi lists it), or wait until that ends, and try again"
)


class Engine:
    """A plan's executor for any number of threads, which take turns, and what becomes of it.

    in_flight: how many calls of a batch run at once, each on a lane, which is an executor of its own; None: as many as the
    executor says. The first lane is there from the beginning, and has all calls that are of no batch; others are opened when
    a batch first needs them.
    All that its libraries raise leaves as EngineError, which says what happened and whether the engine can still be used.
    """

    def __init__(self, plan: Plan, threads: int | None = None, in_flight: int | None = None):
        self._plan, self._path, self._process = plan, plan.path, os.getpid()
        self._turns = [threading.Lock()]  # of each lane
        self._opening = threading.Lock()
        self._count = threading.RLock()  # also taken by a signal handler that interrupts its holder and closes the policy
        self._calls, self._closing, self._failure = 0, False, ""
        self._lanes: list[Executor] = []
        try:
            self._lanes.append(open_executor(plan, threads))
        except DeviceError as error:  # a KernelError of another kind says itself what is missing
            plan.close()
            raise EngineError(f"{self._path}: cannot be opened: {_said(error)}") from error
        try:
            plan.check_unchanged()  # while it was read
            self.in_flight = self._calls_at_once(in_flight)
        except PlanError:
            self.close()
            raise
        _engines.add(self)

    @property
    def executor(self) -> Executor:
        """Of the first lane. Raises EngineError if it is closed."""
        return self._lane(0)

    @property
    def lanes(self) -> int:
        """How many there are by now."""
        return len(self._lanes)

    def check(self) -> None:
        """Raises EngineError, naming the remedy, unless a call may begin. Waits for nothing, not even in a fork."""
        self.check_process()
        self.check_open()
        if self._failure:
            raise EngineError(self._failure)

    def check_process(self) -> None:
        """The part of `check` that comes before any lock."""
        if self._process != os.getpid():
            raise EngineError(
                f"{self._path}: was opened by process {self._process}, which this one was forked from, and does not work here; "
                'open it in the child (for a GPU, one that multiprocessing\'s "spawn" starts)'
            )

    def check_open(self) -> None:
        if self._closing:
            raise self._is_closed()

    def begin(self) -> None:
        """Of a call with its preprocessing: what it needs is not freed until its `end`. Raises as `check`."""
        self.check()
        with self._count:
            self.check()
            self._calls += 1

    def end(self) -> None:
        with self._count:
            self._calls -= 1
        self._free_if_unused()

    def warmup(self) -> None:
        """As `Executor.warmup`, of all lanes that there are; raises as `run`."""
        for lane in range(self.lanes):
            with self._turns[lane], self._errors(lane):
                self._plan.check_unchanged()
                self._lane(lane).warmup()

    def open_lanes(self, calls: int) -> int:
        """Within a call: opens lanes for so many calls at once, no more than `in_flight`; returns how many calls have one.

        Raises PlanError or EngineError where there is too little memory.
        """
        wanted = min(self.in_flight, calls)
        with self._opening:
            while self.lanes < wanted:
                with self._errors():
                    opened = cast(Widening, self.executor).another()
                self._turns.append(threading.Lock())
                self._lanes.append(opened)
        return max(wanted, 1)

    def run(
        self, inputs: ModelInputs, noise: np.ndarray, lane: int = 0, **options: Any
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """As `Executor.run`, within a call. options: what this executor takes beside inputs and noise.

        Raises EngineError: the executor failed, or its actions are not finite; PlanError: the plan's file was written to.
        """
        with self._turns[lane]:
            if self._failure:  # by the call before
                raise EngineError(self._failure)
            with self._errors(lane):
                self._plan.check_unchanged()
                actions, timing = self._lane(lane).run(inputs, noise, **options)
        return finite(
            actions, f"{self._path}: the engine gave", "the plan's weights or this machine may be damaged"
        ), timing

    def close(self) -> None:
        """Frees the executor as soon as the calls that have begun are over; waits for none. In a fork it does nothing."""
        if self._process == os.getpid():
            self._closing = True
            self._free_if_unused()

    def _free_if_unused(self) -> None:
        with self._count:
            if self._calls or not self._closing:
                return
            lanes, self._lanes = self._lanes, []
        for executor in reversed(lanes):  # the first has what all share
            executor.close()
        if lanes:
            self._plan.close()

    def _lane(self, number: int) -> Executor:
        if not self._lanes:
            raise self._is_closed()
        return self._lanes[number]

    def _calls_at_once(self, in_flight: int | None) -> int:
        """How many calls of a batch may run at once."""
        if in_flight is None:
            return getattr(self.executor, "in_flight", 1)
        if type(in_flight) is not int or in_flight < 1:
            raise PlanError(f"{self._path}: in_flight={in_flight!r}: expected a number of calls, 1 or more")
        if in_flight > 1 and not hasattr(self.executor, "another"):
            target = self._plan.manifest["target"]
            raise PlanError(
                f"{self._path}: in_flight={in_flight}: a plan for {target} runs one call at a time; leave it out"
            )
        return in_flight

    @contextmanager
    def _errors(self, lane: int = 0) -> Iterator[None]:
        """Around an executor's work: an error of the GPU becomes an EngineError, and the engine failed if it says so."""
        try:
            yield
        except KernelError as error:
            if self._lane(lane).is_usable():
                raise EngineError(f"{self._path}: the call failed: {_said(error)}; the policy can still be used") from error
            self._failure = (
                f"{self._path}: must be opened again, in a new process: the GPU or its driver failed ({error}), and does no "
                "more work for this process; nvidia-smi and `dmesg | grep Xid` may say why"
            )
            raise EngineError(self._failure) from error

    def _is_closed(self) -> EngineError:
        return EngineError(f"{self._path}: the policy is closed; open it again")


def finite(actions: np.ndarray, what: str, why: str) -> np.ndarray:
    """`actions` [H, A] themselves; EngineError if one is not finite."""
    if not np.isfinite(actions).all():
        step, dim = np.argwhere(~np.isfinite(actions))[0]
        raise EngineError(f"{what} actions that are not finite ({actions[step, dim]} at step {step}, dim {dim}): {why}")
    return actions


def _said(error: KernelError) -> str:
    return f"{error}: {_FREE_SOME}" if isinstance(error, DeviceError) and error.status in OUT_OF_MEMORY else str(error)


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _keep_for_ever() -> None:
    """In a forked child: to free an executor is to wait for its threads, which are the parent's."""
    for engine in _engines:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine._lanes))


os.register_at_fork(after_in_child=_keep_for_ever)
