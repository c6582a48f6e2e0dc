"""Reading an observation: each helper takes one key, checks it and says in one line what is wrong with it."""
from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from runtime.errors import ObservationError


def required(observation: Mapping, key: str):
    """The value of `key`; ObservationError if the observation lacks it."""
    if key not in observation:
        raise ObservationError(f"observation lacks {key!r}; it has {', '.join(map(repr, observation)) or 'no keys'}")
    return observation[key]


def mapping(observation: Mapping, key: str) -> Mapping:
    """The nested dict under `key`."""
    value = required(observation, key)
    if not isinstance(value, Mapping):
        raise ObservationError(f"{key}: is a {type(value).__name__}, expected a dict of cameras")
    return value


def vector(observation: Mapping, key: str, size: int) -> np.ndarray:
    """A finite floating-point [size] array as float64; a scalar counts as [1]."""
    value = np.atleast_1d(np.asarray(required(observation, key)))
    if not np.issubdtype(value.dtype, np.floating):
        raise ObservationError(f"{key}: has dtype {value.dtype}, expected floating point (float32)")
    if value.shape != (size,):
        raise ObservationError(f"{key}: has shape {list(value.shape)}, expected [{size}]")
    return finite(value.astype(np.float64), key)


def finite(value: np.ndarray, key: str) -> np.ndarray:
    """`value` itself; ObservationError if it holds a NaN or an infinity."""
    bad = np.flatnonzero(~np.isfinite(value))
    if bad.size:
        raise ObservationError(f"{key}: is not finite at index {bad[0]} ({value.flat[bad[0]]})")
    return value


def image(value, key: str, layout: str, keep_float: bool = False) -> np.ndarray:
    """A camera image as uint8 [H, W, 3].

    `layout` is "HWC", "CHW", or "any" (channels first if the first axis is 3, as openpi's policies decide). Floating
    point images hold 0..1 and are truncated to 0..255, as openpi does; with `keep_float` they stay, as float32.
    """
    value = np.asarray(value)
    if np.issubdtype(value.dtype, np.floating):
        if value.size and not (value.min() >= 0 and value.max() <= 1):  # a NaN fails both
            raise ObservationError(f"{key}: a floating-point image must lie in [0, 1]; pass uint8 for 0..255")
        value = value.astype(np.float32) if keep_float else (255 * value).astype(np.uint8)
    elif value.dtype != np.uint8:
        raise ObservationError(f"{key}: has dtype {value.dtype}, expected uint8")
    shape = list(value.shape)
    if value.ndim == 3 and (layout == "CHW" or layout == "any" and shape[0] == 3):
        value = value.transpose(1, 2, 0)
    if value.ndim != 3 or value.shape[2] != 3 or 0 in shape:
        expected = "[3, H, W]" if layout == "CHW" else "[H, W, 3]"
        raise ObservationError(f"{key}: has shape {shape}, expected {expected}")
    return value
