"""Ahead-of-time compiler and runtime for the pi0 / pi0.5 robot policies: `from duq import Policy`.

The parts are duq.compiler, duq.plugins, duq.runtime and duq.tools. In a checkout their folders lie beside this one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from duq.runtime import EngineError, ObservationError, PlanError, Policy

__all__ = ["EngineError", "ObservationError", "PlanError", "Policy"]
__version__ = "0.2.0.dev0"

_HERE = Path(__file__).resolve().parent
if not (_HERE / "runtime").is_dir():  # a checkout
    __path__.append(str(_HERE.parent))


def __getattr__(name: str) -> object:
    """The policy and its errors are imported when asked for: duq.plugins and duq.compiler do not need the runtime."""
    if name in __all__:
        from duq import runtime

        return getattr(runtime, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
