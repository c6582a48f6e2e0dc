"""Normalization statistics in one form, whichever file they come from.

    {"epsilon": float,
     "state":   {"mean": [..], "std": [..], "q01": [..] | None, "q99": [..] | None},
     "actions": {the same}}

openpi's pi0 normalizes with (x - mean) / (std + epsilon), its pi0.5 with (x - q01) / (q99 - q01 + epsilon) * 2 - 1. In
LeRobot each feature has a mode of its own, and the statistics that the mode needs:

    {"rule": "lerobot" | "lerobot-0.3",
     "state":   {"mode": "MIN_MAX", "epsilon": float, "min": [..], "max": [..]},
     "actions": {...}}
"""

from __future__ import annotations

import os
from pathlib import Path

from duq.compiler.checkpoint.ranges import checked, in_range, is_finite
from duq.compiler.checkpoint.storage import read_json
from duq.compiler.errors import CheckpointError
from duq.runtime.preprocess import MODES
from duq.runtime.reading import brief, listed

STATISTICS = ("mean", "std", "q01", "q99")
OPENPI_EPSILON = 1e-6
LEROBOT_EPSILON = 1e-8


def read_openpi_stats(directory: Path, asset_id: str | None, preferred: str | None = None) -> dict | None:
    """assets/<asset_id>/norm_stats.json of an openpi checkpoint; None when there is none at all.

    An asset id may hold slashes ("physical-intelligence/libero"). Raises CheckpointError when several are there and
    `asset_id` is None and none of them is `preferred` (by the training config), when the one asked for is not there, and
    when the file does not hold statistics.
    """
    assets = directory / "assets"
    if os.path.lexists(assets) and not assets.is_dir():
        raise CheckpointError(f"{assets}: expected a folder of norm stats, but it is a file or a link that leads nowhere")
    files = {file.parent.relative_to(assets).as_posix(): file for file in sorted(assets.rglob("norm_stats.json"))}
    if asset_id is None and len(files) > 1 and preferred in files:
        asset_id = preferred
    if asset_id is None and len(files) > 1:
        raise CheckpointError(f"{assets} has statistics of several robots; choose an asset id: {', '.join(files)}")
    if asset_id is not None and asset_id not in files:
        found = ", ".join(files) or "none"
        raise CheckpointError(f'{assets} has no statistics for asset id "{asset_id}"; found: {found}')
    if not files:
        return None
    file = files[asset_id] if asset_id is not None else next(iter(files.values()))
    data = read_json(file)
    stats = data.get("norm_stats", data)
    if not isinstance(stats, dict):
        raise CheckpointError(f'{file}: "norm_stats" must be an object, found {brief(stats)}')
    return checked_stats(file, stats.get("state"), stats.get("actions"), OPENPI_EPSILON)


def checked_stats(file: Path, state: dict | None, actions: dict | None, epsilon: float) -> dict:
    """The canonical form. Raises CheckpointError (naming file and entry) when one is absent, ragged or not finite."""
    stats: dict = {"epsilon": epsilon}
    for name, entry in (("state", state), ("actions", actions)):
        pairs = ({"mean", "std"}, {"q01", "q99"})
        if not isinstance(entry, dict) or not any(all(entry.get(key) is not None for key in pair) for pair in pairs):
            raise CheckpointError(f'{file}: "{name}" needs "mean" and "std" (pi0), or "q01" and "q99" (pi0.5)')
        stats[name] = {key: _vector(file, f"{name}.{key}", entry.get(key)) for key in STATISTICS}
        lengths = {key: len(values) for key, values in stats[name].items() if values is not None}
        if len(set(lengths.values())) > 1:
            raise CheckpointError(f"{file}: the statistics of {name} differ in length: {lengths}")
        _check_order(file, name, stats[name])
    return stats


def checked_modes(file: str, feature: str, mode: str, stored: dict, epsilon: float) -> dict:
    """The statistics of one of LeRobot's features that its normalization mode needs, with the mode.

    Raises CheckpointError (naming file and feature) for an unknown mode, and for statistics absent, ragged or not finite.
    """
    if mode not in MODES:
        raise CheckpointError(f"{file}: normalization {mode!r} of {feature} is unknown, one of {', '.join(MODES)}")
    absent = [name for name in MODES[mode] if name not in stored]
    if absent:
        found = listed(stored) or "no statistics of it"
        raise CheckpointError(f"{file}: {mode} normalization of {feature} needs {' and '.join(absent)}; there is {found}")
    stats = {name: _vector(file, f"{feature}.{name}", stored[name]) for name in MODES[mode]}
    if len({len(values or ()) for values in stats.values()}) > 1:
        raise CheckpointError(f"{file}: the statistics of {feature} differ in length")
    _check_order(file, feature, stats)
    checked(epsilon, "eps", f"{file}: eps of {feature}")
    return {"mode": mode, "epsilon": float(epsilon), **stats}


def _vector(file: Path | str, name: str, values: list | None) -> list[float] | None:
    if values is None:
        return None
    if not isinstance(values, list) or not in_range(len(values), "dims") or not all(map(is_finite, values)):
        raise CheckpointError(f"{file}: {name} must be a list of finite numbers, found {brief(values)}")
    range_name = "spread" if name.endswith(".std") else "statistic"
    for index, value in enumerate(values):
        checked(value, range_name, f"{file}: {name} at index {index}")
    return [float(value) for value in values]


def _check_order(file: Path | str, name: str, stats: dict) -> None:
    """Raises CheckpointError where a lower bound is above its upper one: the actions would come out mirrored."""
    for lower, upper in (("min", "max"), ("q01", "q99"), ("q10", "q90")):
        for index, (low, high) in enumerate(zip(stats.get(lower) or (), stats.get(upper) or (), strict=False)):
            if low > high:
                raise CheckpointError(f"{file}: {name} at index {index} has {lower} {low:g} above {upper} {high:g}")
