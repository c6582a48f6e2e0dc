"""Runs engine plans: ``runtime.Policy("engine.plan").infer(observation)``. Needs neither torch nor the compiler."""

if __name__ == "runtime":
    from duq.short_names import hand_over

    hand_over(__name__)
else:
    from duq.runtime.errors import EngineError, ObservationError, PlanError
    from duq.runtime.policy import Policy

    __all__ = ["EngineError", "ObservationError", "PlanError", "Policy"]
