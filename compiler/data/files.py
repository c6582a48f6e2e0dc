"""The files of a dataset: what can be wrong with one, in one line."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from duq.compiler.errors import CalibrationError

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def needs(module: str) -> ModuleType:
    """The module, imported now. CalibrationError names the extra that holds it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise CalibrationError(f"reading a LeRobotDataset needs {error.name}: pip install '.[data]'") from error


def check_file(file: Path) -> None:
    """Raises CalibrationError if the file is missing, empty, or a Git LFS pointer in place of its content."""
    try:
        with open(file, "rb") as opened:
            begin = opened.read(len(_LFS_POINTER))
    except OSError as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise CalibrationError(f"{file}: {reason}; download the dataset again, all files of it") from error
    if not begin:
        raise CalibrationError(f"{file}: is empty; download the dataset again")
    if begin == _LFS_POINTER:
        raise CalibrationError(f"{file}: is a Git LFS pointer, not the file itself; fetch it with git lfs pull")


def read_json(file: Path) -> dict:
    """A JSON object. CalibrationError names the file."""
    check_file(file)
    return _parsed(file, file.read_bytes())


def read_json_lines(file: Path) -> list[dict]:
    """One JSON object a line; blank lines are skipped. CalibrationError names the file and the line."""
    check_file(file)
    lines = enumerate(file.read_bytes().splitlines(), start=1)
    return [_parsed(f"{file}, line {number}", line) for number, line in lines if line.strip()]


def _parsed(where: Path | str, text: bytes) -> dict:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise CalibrationError(f"{where}: is not JSON ({error}); download the dataset again") from error
    if not isinstance(value, dict):
        raise CalibrationError(f"{where}: is a JSON {type(value).__name__}, expected an object")
    return value


def check_fields(where: Path | str, row: Mapping[str, Any], fields: Mapping[str, type]) -> None:
    """Raises CalibrationError unless the row has these fields: whole numbers from 0, finite numbers, text or lists."""
    for key, kind in fields.items():
        value: Any = row.get(key)
        fits = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
        if not fits or kind is float and not math.isfinite(value) or kind is int and value < 0:
            found = f"{value!r:.60}" if key in row else "missing"
            expected = {int: "a whole number from 0", float: "a number", str: "text", list: "a list"}[kind]
            raise CalibrationError(f"{where}: {key} is {found}, expected {expected}; download the dataset again")


class Table:
    """A parquet file, of which single columns and rows are read. CalibrationError if it is missing or damaged."""

    def __init__(self, file: Path):
        self.file = file
        check_file(file)
        self._arrow, self._parquet = needs("pyarrow"), needs("pyarrow.parquet")
        with self._named():
            self._opened = self._parquet.ParquetFile(file)
            self.columns: list[str] = self._opened.schema_arrow.names
            sizes = [self._opened.metadata.row_group(i).num_rows for i in range(self._opened.num_row_groups)]
        self._ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]

    def strings(self) -> list[str]:
        """Names of the columns of text."""
        types = self._arrow.types
        return [f.name for f in self._opened.schema_arrow if types.is_string(f.type) or types.is_large_string(f.type)]

    def column(self, name: str) -> list:
        """All values of a column as Python's."""
        self._require([name])
        with self._named():
            return self._opened.read(columns=[name]).column(name).to_pylist()

    def integers(self, name: str) -> np.ndarray:
        """All values of a column of whole numbers: int64 [rows]."""
        self._require([name])
        with self._named():
            column = self._opened.read(columns=[name]).column(name)
        if not self._arrow.types.is_integer(column.type) or column.null_count:
            raise CalibrationError(f"{self.file}: {name} are no whole numbers but {column.type}; download it again")
        return column.to_numpy().astype(np.int64)

    def rows(self, rows: list[int], names: list[str]) -> dict[int, dict]:
        """Row number -> {column: value as Python's}. Only the row groups and columns concerned are read."""
        self._require(names)
        found: dict[int, dict] = {}
        for group, end in enumerate(self._ends):
            begin = self._ends[group - 1] if group else 0
            here = [row for row in rows if begin <= row < end]
            if here:
                with self._named():
                    table = self._opened.read_row_group(group, columns=names).select(names)
                    taken = table.take([row - begin for row in here]).to_pylist()
                found |= dict(zip(here, taken, strict=True))
        return found

    def _require(self, names: list[str]) -> None:
        for name in names:
            if name not in self.columns:
                raise CalibrationError(f"{self.file}: has no column {name!r}; it has {', '.join(self.columns)}")

    def _named(self):
        return _damage(self.file, self._arrow)


class _damage:
    """Turns pyarrow's errors into a CalibrationError that names the file."""

    def __init__(self, file: Path, arrow: ModuleType):
        self._file, self._errors = file, (arrow.ArrowException, OSError, UnicodeDecodeError)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, self._errors):
            reason = str(error).partition("\n")[0][:200]
            raise CalibrationError(f"{self._file}: is damaged or cut ({reason}); download it again") from error
