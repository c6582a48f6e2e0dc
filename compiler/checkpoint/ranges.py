"""The ranges of every number that a checkpoint's files, a recipe or an option may set: one table, checked at one place.

They are wide: they keep out what no policy has, and what would overflow or take all memory long after it was read.
"""

from __future__ import annotations

from typing import Any

from duq.compiler.errors import CheckpointError
from duq.runtime.reading import brief

# Name -> smallest and largest value; whole numbers where both are.
RANGES: dict[str, tuple[float, float]] = {
    "action_horizon": (1, 1000),
    "max_prompt_tokens": (1, 4096),
    "num_steps": (1, 1000),
    "dims": (1, 4096),  # of a state or an action
    "heads": (1, 1024),
    "layers": (1, 1024),
    "rank": (1, 65536),  # of LoRA
    "alpha": (-1e6, 1e6),
    "eps": (1e-30, 1.0),  # of a normalization
    "statistic": (-1e9, 1e9),  # in the robot's units: encoder counts go to millions
    "spread": (0.0, 1e9),  # a standard deviation
    "calibration_steps": (1, 100_000),
    "activation_percentile": (50.0, 100.0),
    "damping": (1e-300, 1e6),  # errors are not compensated at all long before
    "mean_bits": (4.0, 8.0),
}


def in_range(value: Any, name: str) -> bool:
    """Whether `value` is a number of the range `name`: an int where both of its ends are; never a bool or NaN."""
    low, high = RANGES[name]
    whole = isinstance(low, int)
    return isinstance(value, int if whole else (int, float)) and not isinstance(value, bool) and low <= value <= high


def expected(name: str) -> str:
    """The range in words."""
    low, high = RANGES[name]
    return f"a {'whole ' if isinstance(low, int) else ''}number from {low:,g} to {high:,g}"


def checked(value: Any, name: str, what: str) -> Any:
    """The value itself. Raises CheckpointError, "<what> is ..., expected ...", unless it is in the range `name`."""
    if not in_range(value, name):
        raise CheckpointError(f"{what} is {brief(value)}, expected {expected(name)}")
    return value


def is_finite(value: Any) -> bool:
    """Whether a value of a file is a number that float32 can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 3e38
