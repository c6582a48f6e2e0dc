"""What runs a plan: one executor for each target."""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import numpy as np

from duq.runtime.errors import PlanError
from duq.runtime.plan import Plan
from duq.runtime.preprocess import ModelInputs

# target -> (module, class). Imported when a plan asks for it: each needs an engine library of its own.
EXECUTORS = {
    "cpu": ("duq.runtime.executors.cpu", "CpuExecutor"),
    "cuda": ("duq.runtime.executors.cuda", "CudaExecutor"),
    "tensorrt": ("duq.runtime.executors.tensorrt", "TensorRTExecutor"),
}


class Executor(Protocol):
    """Runs a plan of one target. Safe to share between threads."""

    def warmup(self) -> None:
        """Allocates and records what a first call would otherwise wait for."""

    def run(self, inputs: ModelInputs, noise: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        """Denoises `noise` float32 [H, A] into normalized actions [H, A]; returns them with the stages' milliseconds."""

    def is_usable(self) -> bool:
        """Whether it can run again after an error. A GPU that met an illegal address cannot, in this process."""

    def close(self) -> None:
        """Frees its memory. It is not used any more."""


class Widening(Executor, Protocol):
    """An executor that can have others beside it.

    in_flight: how many calls run at once where nobody says otherwise.
    """

    in_flight: int

    def another(self) -> Executor:
        """One that runs calls beside this one's, with the same results to the bit. To be closed before this one."""


def open_executor(plan: Plan, threads: int | None = None) -> Executor:
    """The executor of the plan's target.

    threads: CPU threads of the engine (None: all cores). Raises PlanError for a target that this runtime does not know.
    """
    target = plan.manifest["target"]
    if target not in EXECUTORS:
        known = ", ".join(EXECUTORS)
        raise PlanError(f"{plan.path}: is made for target {target!r}, this runtime has {known}; compile for that")
    module, name = EXECUTORS[target]
    executor: Executor = getattr(importlib.import_module(module), name)(plan, threads)
    return executor
