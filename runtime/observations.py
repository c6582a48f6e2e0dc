"""Sets of observations on disk, for calibration and comparison.

A `.npz` file holds N observations, one array a key with a leading axis of N; a directory holds any number of such files
(for sets whose observations differ in their keys or image sizes). Keys of the nested dicts are written with a slash,
`image/base_0_rgb`; a robot's own keys that contain one, such as `observation/image`, stay as they are.
"""
from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from runtime import checks
from runtime.archives import read_npz
from runtime.errors import ObservationError

_NESTED = ("image", "image_mask", "images")


def load_observations(path: str | os.PathLike) -> list[dict]:
    """Reads a `.npz` file, or every `.npz` file of a directory in the order of their names.

    Raises ObservationError if there is none, a file is unreadable, or its arrays disagree about N.
    """
    path = Path(path)
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not files:
        raise ObservationError(f"{path}: holds no .npz file of observations")
    return [observation for file in files for observation in _split(file, _read(file))]


def save_observations(path: str | os.PathLike, observations: Sequence[Mapping]) -> None:
    """Writes one `.npz` file. ObservationError if the observations differ in their keys, shapes or dtypes."""
    path = Path(path)
    if not observations:
        raise ObservationError(f"{path}: there are no observations to save")
    rows = [_flatten(observation) for observation in observations]
    for row in rows:
        if row.keys() != rows[0].keys():
            differing = sorted(row.keys() ^ rows[0].keys())
            raise ObservationError(f"{path}: {differing[0]} is not in every observation; save those in separate files")
    arrays = {key: _stack(path, key, [row[key] for row in rows]) for key in rows[0]}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(file: Path) -> dict[str, np.ndarray]:
    try:
        return read_npz(file)
    except OSError as error:
        raise ObservationError(f"{file}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise ObservationError(f"{file}: is not an .npz file of plain arrays ({error})") from error


def _split(file: Path, arrays: dict[str, np.ndarray]) -> list[dict]:
    """One nested dict per index of the leading axis."""
    if not arrays:
        raise ObservationError(f"{file}: holds no arrays")
    lengths = {key: len(array) if array.ndim else 0 for key, array in arrays.items()}
    first, count = next(iter(lengths.items()))
    for key, length in lengths.items():
        if length != count or not count:
            raise ObservationError(f"{file}: {key} holds {length} observations and {first} {count}, must be equal, > 0")
    return [_nest({key: _element(array, index) for key, array in arrays.items()}) for index in range(count)]


def _element(array: np.ndarray, index: int):
    """One observation's value; text comes back as str."""
    return str(array[index]) if array.dtype.kind == "U" and array.ndim == 1 else array[index]


def _stack(path: Path, key: str, values: list) -> np.ndarray:
    try:
        values = [_plain(value, key) for value in values]
    except ObservationError as error:
        raise ObservationError(f"{path}: {error}") from error
    kinds = {(value.shape, value.dtype.kind if value.dtype.kind in "US" else value.dtype) for value in values}
    if len(kinds) > 1:
        raise ObservationError(f"{path}: {key} differs in shape or dtype between observations")
    return np.stack(values)


def _plain(value, key: str) -> np.ndarray:
    """Text, a plain numpy array of any dtype, or numbers in whatever form, as an array."""
    if isinstance(value, (str, bytes)) or type(value) is np.ndarray and value.dtype.kind not in "OV":
        return np.asarray(value)
    return checks.array(value, key)


def _flatten(observation: Mapping) -> dict:
    flat = {}
    for key, value in observation.items():
        flat.update({f"{key}/{name}": inner for name, inner in value.items()} if key in _NESTED else {key: value})
    return flat


def _nest(flat: dict) -> dict:
    nested: dict = {}
    for key, value in flat.items():
        outer, slash, inner = key.partition("/")
        if slash and outer in _NESTED:
            nested.setdefault(outer, {})[inner] = value
        else:
            nested[key] = value
    return nested
