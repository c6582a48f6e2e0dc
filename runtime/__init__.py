"""Runs engine plans: ``runtime.Policy("engine.plan").infer(observation)``. Needs neither torch nor the compiler."""
from runtime.policy import Policy

__all__ = ["Policy"]
