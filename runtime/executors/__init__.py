"""What runs a plan: one executor for each target."""

from __future__ import annotations

import importlib

from duq.runtime.errors import PlanError
from duq.runtime.plan import Plan

# target -> (module, class). Imported when a plan asks for it: each needs an engine library of its own.
EXECUTORS = {
    "cpu": ("duq.runtime.executors.cpu", "CpuExecutor"),
    "cuda": ("duq.runtime.executors.cuda", "CudaExecutor"),
    "tensorrt": ("duq.runtime.executors.tensorrt", "TensorRTExecutor"),
}


def open_executor(plan: Plan, threads: int | None = None):
    """The executor of the plan's target, with `warmup()` and `run(inputs, noise, trace=None)`.

    threads: CPU threads of the engine (None: all cores). Raises PlanError for a target that this runtime does not know.
    """
    target = plan.manifest["target"]
    if target not in EXECUTORS:
        known = ", ".join(EXECUTORS)
        raise PlanError(f"{plan.path}: is made for target {target!r}, this runtime has {known}; compile for that")
    module, name = EXECUTORS[target]
    return getattr(importlib.import_module(module), name)(plan, threads)
