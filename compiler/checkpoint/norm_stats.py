"""Normalisation statistics in one form, whichever file they come from.

    {"epsilon": float,
     "state":   {"mean": [..], "std": [..], "q01": [..] | None, "q99": [..] | None},
     "actions": {the same}}

pi0 normalises with (x - mean) / (std + epsilon), pi0.5 with (x - q01) / (q99 - q01 + epsilon) * 2 - 1.
"""
from __future__ import annotations

import math
from pathlib import Path

from compiler.checkpoint.storage import read_json
from compiler.errors import CheckpointError

STATISTICS = ("mean", "std", "q01", "q99")
OPENPI_EPSILON = 1e-6
LEROBOT_EPSILON = 1e-8


def read_openpi_stats(directory: Path, asset_id: str | None) -> dict | None:
    """assets/<asset_id>/norm_stats.json of an openpi checkpoint; None when there is none at all.

    An asset id may hold slashes ("physical-intelligence/libero"). Raises CheckpointError when several are there and
    `asset_id` is None, when the one asked for is not there, and when the file does not hold statistics.
    """
    assets = directory / "assets"
    files = {file.parent.relative_to(assets).as_posix(): file for file in sorted(assets.rglob("norm_stats.json"))}
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
    return checked_stats(file, stats.get("state"), stats.get("actions"), OPENPI_EPSILON)


def checked_stats(file: Path, state: dict | None, actions: dict | None, epsilon: float) -> dict:
    """The canonical form. Raises CheckpointError (naming file and entry) when one is absent, ragged or not finite."""
    stats: dict = {"epsilon": epsilon}
    for name, entry in (("state", state), ("actions", actions)):
        if not isinstance(entry, dict) or entry.get("mean") is None or entry.get("std") is None:
            raise CheckpointError(f'{file}: "{name}" needs "mean" and "std"')
        stats[name] = {key: _vector(file, f"{name}.{key}", entry.get(key)) for key in STATISTICS}
        lengths = {key: len(values) for key, values in stats[name].items() if values is not None}
        if len(set(lengths.values())) > 1:
            raise CheckpointError(f"{file}: the statistics of {name} differ in length: {lengths}")
    return stats


def _vector(file: Path, name: str, values: list | None) -> list[float] | None:
    if values is None:
        return None
    finite = isinstance(values, list) and all(
        isinstance(value, (int, float)) and math.isfinite(value) for value in values
    )
    if not finite or not values:
        raise CheckpointError(f"{file}: {name} must be a list of finite numbers")
    return [float(value) for value in values]
