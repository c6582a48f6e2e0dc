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
from typing import Any

import numpy as np

from duq.plugins.errors import DeviceError, KernelError
from duq.runtime.errors import EngineError, PlanError
from duq.runtime.executors import Executor, open_executor
from duq.runtime.plan import Plan
from duq.runtime.preprocess import ModelInputs

OUT_OF_MEMORY = ("CUDA_ERROR_OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED")
_FREE_SOME = (
    "the GPU has no memory left: end what else uses it (nvidia-smi lists it), or wait until that ends, and try again"
)


class Engine:
    """A plan's executor for any number of threads, which take turns, and what becomes of it.

    All that its libraries raise leaves as EngineError, which says what happened and whether the engine can still be used.
    """

    def __init__(self, plan: Plan, threads: int | None = None):
        self._plan, self._path, self._process = plan, plan.path, os.getpid()
        self._turn = threading.Lock()
        self._count = threading.RLock()  # also taken by a signal handler that interrupts its holder and closes the policy
        self._calls, self._closing, self._failure = 0, False, ""
        self._executor: Executor | None = None
        try:
            self._executor = open_executor(plan, threads)
        except DeviceError as error:  # a KernelError of another kind says itself what is missing
            plan.close()
            raise EngineError(f"{self._path}: cannot be opened: {_said(error)}") from error
        try:
            plan.check_unchanged()  # while it was read
        except PlanError:
            self.close()
            raise
        _engines.add(self)

    @property
    def executor(self) -> Executor:
        """Raises EngineError if it is closed."""
        if self._executor is None:
            raise self._is_closed()
        return self._executor

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
        """As `Executor.warmup`; raises as `run`."""
        with self._turn, self._errors():
            self._plan.check_unchanged()
            self.executor.warmup()

    def run(self, inputs: ModelInputs, noise: np.ndarray, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """As `Executor.run`, within a call. options: what this executor takes beside inputs and noise.

        Raises EngineError: the executor failed, or its actions are not finite; PlanError: the plan's file was written to.
        """
        with self._turn:
            if self._failure:  # by the call before
                raise EngineError(self._failure)
            with self._errors():
                self._plan.check_unchanged()
                actions, timing = self.executor.run(inputs, noise, **options)
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
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.close()
            self._plan.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Around the executor's work: an error of the GPU becomes an EngineError, and the engine failed if it says so."""
        try:
            yield
        except KernelError as error:
            if self.executor.is_usable():
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
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine._executor))


os.register_at_fork(after_in_child=_keep_for_ever)
