"""Sets of observations on disk, for calibration and comparison.

A `.npz` file holds N observations, one array a key with a leading axis of N; a directory holds any number of such files
(for sets whose observations differ in their keys or image sizes). Keys of the nested dicts are written with a slash,
`image/base_0_rgb`; a robot's own keys that contain one, such as `observation/image`, stay as they are. Other nested
dicts, of any depth, take two slashes: `left//camera//front`.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from duq.runtime import checks
from duq.runtime.archives import read_headers, read_npz
from duq.runtime.errors import ObservationError
from duq.runtime.files import replacing
from duq.runtime.reading import present, reading, reason

NESTED = ("image", "image_mask", "images")
MOST = 1_000_000  # observations in a file
REMEDY = "record or copy it again"
_RESERVED = ("file", "allow_pickle")  # arguments of np.savez


def load_observations(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads a `.npz` file, or every `.npz` file of a directory in the order of their names.

    Raises ObservationError if there is none, a file is unreadable, or its arrays disagree about N.
    """
    return [observation for file in _files(path) for observation in _split(file, _read(file))]


def list_observations(path: str | os.PathLike[str]) -> list[tuple[Path, int]]:
    """Where each observation of a file or directory is: (file, index in it), in the order of `load_observations`.

    Of the files only the beginnings are read. Raises ObservationError as `load_observations` does.
    """
    return [(file, index) for file in _files(path) for index in range(_count(file))]


def read_observations(places: Sequence[tuple[Path, int]]) -> list[dict[str, Any]]:
    """The observations at these places, which `list_observations` gave; files without any of them are not opened."""
    found = []
    for file, group in itertools.groupby(places, key=lambda place: place[0]):
        observations = _split(file, _read(file))
        found += [observations[index] for _, index in group]
    return found


def save_observations(
    path: str | os.PathLike[str], observations: Sequence[Mapping[str, Any]], *, sweep: bool = True
) -> None:
    """Writes one `.npz` file, whole or not at all.

    sweep: as `runtime.files.replacing` takes it. Raises ObservationError if the observations differ in their keys, shapes or
    dtypes, or the file cannot be written.
    """
    path = Path(path)
    if not observations:
        raise ObservationError(f"{path}: there are no observations to save")
    rows = [_flatten(observation) for observation in observations]
    for row in rows:
        if row.keys() != rows[0].keys():
            differing = sorted(row.keys() ^ rows[0].keys())
            raise ObservationError(f"{path}: {differing[0]} is not in every observation; save those in separate files")
    arrays = {key: _stack(path, key, [row[key] for row in rows]) for key in rows[0]}
    with replacing(path, ObservationError, sweep=sweep) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # no key is allow_pickle


def _files(path: str | os.PathLike[str]) -> list[Path]:
    path = Path(path)
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not files:
        raise ObservationError(f"{path}: holds no .npz file of observations")
    return files


def _read(file: Path) -> dict[str, np.ndarray]:
    with _readable(file):
        return read_npz(file)


def _count(file: Path) -> int:
    """Observations in a file, by the shape of its first array."""
    with _readable(file):
        headers = read_headers(file)
    if not headers:
        raise ObservationError(f"{file}: holds no arrays")
    first, (shape, _) = next(iter(headers.items()))
    if not shape or not 0 < shape[0] <= MOST:
        raise ObservationError(f"{file}: {first} holds {shape[0] if shape else 0} observations, expected 1 to {MOST:,}")
    return shape[0]


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turns what can be wrong with a file into an ObservationError."""
    with reading(file, ObservationError, REMEDY):
        if not present(file, ObservationError):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        try:
            yield
        except (ObservationError, OSError):
            raise
        except Exception as error:  # headers are parsed as Python: damaged ones fail in many ways
            raise ObservationError(f"{file}: is not an .npz file of plain arrays ({reason(error)}); {REMEDY}") from error


def _split(file: Path, arrays: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """One nested dict per index of the leading axis."""
    if not arrays:
        raise ObservationError(f"{file}: holds no arrays")
    lengths = {key: len(array) if array.ndim else 0 for key, array in arrays.items()}
    first, count = next(iter(lengths.items()))
    for key, length in lengths.items():
        if length != count or not count:
            raise ObservationError(f"{file}: {key} holds {length} observations and {first} {count}, must be equal, > 0")
    try:
        return [nest({key: _element(array, index) for key, array in arrays.items()}) for index in range(count)]
    except ObservationError as error:
        raise ObservationError(f"{file}: {error}") from error


def _element(array: np.ndarray, index: int) -> Any:
    """One observation's value; text comes back as str."""
    return str(array[index]) if array.dtype.kind == "U" and array.ndim == 1 else array[index]


def _stack(path: Path, key: str, values: list[Any]) -> np.ndarray:
    try:
        values = [_plain(value, key) for value in values]
    except ObservationError as error:
        raise ObservationError(f"{path}: {error}") from error
    kinds = {(value.shape, value.dtype.kind if value.dtype.kind in "US" else value.dtype) for value in values}
    if len(kinds) > 1:
        raise ObservationError(f"{path}: {key} differs in shape or dtype between observations")
    return np.stack(values)


def _plain(value: Any, key: str) -> np.ndarray:
    """Text, a plain numpy array of any dtype, or numbers in whatever form, as an array."""
    if isinstance(value, (str, bytes)) or type(value) is np.ndarray and value.dtype.kind not in "OV":
        return np.asarray(value)
    return checks.array(value, key)


def _flatten(observation: Mapping[str, Any]) -> dict[str, Any]:
    flat = {}
    for path, value in _leaves(observation):
        flat["/".join(path) if len(path) == 2 and path[0] in NESTED else "//".join(path)] = value
    return flat


def _leaves(observation: Mapping[str, Any], outer: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """(keys from the outermost dict inwards, value) of everything that is no dict."""
    for key, value in observation.items():
        if not isinstance(key, str) or "//" in key or key != key.strip("/") or key in _RESERVED:
            raise ObservationError(f"{key!r} cannot be the key of an observation that is saved; rename it")
        if isinstance(value, Mapping):
            yield from _leaves(value, (*outer, key))
        else:
            yield (*outer, key), value


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The observation whose keys are written as in a file: {"images/top": ..} as {"images": {"top": ..}}."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *outer, last = key.split("//")
        if not outer and key.partition("/")[0] in NESTED and "/" in key:
            first, _, last = key.partition("/")
            outer = [first]
        inside = nested
        for name in outer:
            inside = inside.setdefault(name, {})
            if not isinstance(inside, dict):
                raise ObservationError(f"the keys {name!r} and {key!r} do not go together: {name!r} is a value")
        if isinstance(inside.get(last), dict):
            raise ObservationError(f"the key {key!r} does not go together with others: it is a dict in them")
        inside[last] = value
    return nested
