"""Runs engine plans: ``runtime.Policy("engine.plan").infer(observation)``. Needs neither torch nor the compiler."""

from __future__ import annotations

from typing import TYPE_CHECKING

if __name__ == "runtime":
    from duq.short_names import hand_over

    hand_over(__name__)
if TYPE_CHECKING:
    from duq.runtime.errors import EngineError, ObservationError, PlanError
    from duq.runtime.policy import Policy

__all__ = ["EngineError", "ObservationError", "PlanError", "Policy"]


def __getattr__(name: str) -> object:
    """Imported when they are asked for: the options of the commands do not need numpy."""
    if name == "Policy":
        from duq.runtime.policy import Policy

        return Policy
    if name in __all__:
        from duq.runtime import errors

        return getattr(errors, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
