"""The files of a dataset: what can be wrong with one, in one line."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from duq.compiler.errors import CalibrationError
from duq.runtime.reading import brief, listed, parse_json, present, read_bytes, reading, reason

AGAIN = "download the dataset again"
MOST_ROWS, MOST_EXPANDED = 1 << 31, 2000  # of a group of a parquet file; its bytes, once decompressed, to one of the file
MOST = 1 << 40  # frames, and seconds
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def needs(module: str) -> ModuleType:
    """The module, imported now. CalibrationError names the extra that holds it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise CalibrationError(f"reading a LeRobotDataset needs {error.name}: pip install '.[data]'") from error


def check_file(file: Path) -> None:
    """Raises CalibrationError if the file is missing, empty, or a Git LFS pointer in place of its content."""
    if not present(file, CalibrationError):
        raise CalibrationError(f"{file}: is missing; {AGAIN}, all files of it")
    with reading(file, CalibrationError, AGAIN), open(file, "rb") as opened:
        begin = opened.read(len(_LFS_POINTER))
    if not begin:
        raise CalibrationError(f"{file}: is empty; download the dataset again")
    if begin == _LFS_POINTER:
        raise CalibrationError(f"{file}: is a Git LFS pointer, not the file itself; fetch it with git lfs pull")


def read_json(file: Path) -> dict:
    """A JSON object. CalibrationError names the file."""
    check_file(file)
    return parse_json(read_bytes(file, CalibrationError, AGAIN), file, CalibrationError, AGAIN)


def read_json_lines(file: Path) -> list[dict]:
    """One JSON object a line; blank lines are skipped. CalibrationError names the file and the line."""
    check_file(file)
    lines = enumerate(read_bytes(file, CalibrationError, AGAIN).splitlines(), start=1)
    return [parse_json(line, f"{file}, line {number}", CalibrationError, AGAIN) for number, line in lines if line.strip()]


def check_fields(where: Path | str, row: Mapping[str, Any], fields: Mapping[str, type]) -> None:
    """Raises CalibrationError unless the row has these fields: whole numbers from 0, finite numbers, text or lists."""
    for key, kind in fields.items():
        value: Any = row.get(key)
        fits = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
        if not fits or kind is float and not abs(value) < MOST or kind is int and not 0 <= value < MOST:
            found = brief(value) if key in row else "missing"
            expected = {int: "a whole number from 0", float: "a number", str: "text", list: "a list"}[kind]
            raise CalibrationError(f"{where}: {key} is {found}, expected {expected}; {AGAIN}")


class Table:
    """A parquet file, of which single columns and rows are read. CalibrationError if it is missing or damaged."""

    def __init__(self, file: Path):
        self.file = file
        check_file(file)
        self._arrow, self._parquet = needs("pyarrow"), needs("pyarrow.parquet")
        with self._named():
            self._opened = self._parquet.ParquetFile(file)
            self.columns: list[str] = self._opened.schema_arrow.names
            groups = [self._opened.metadata.row_group(i) for i in range(self._opened.num_row_groups)]
            sizes = [group.num_rows for group in groups]
            self._check_sizes(groups)
        self._ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]

    def _check_sizes(self, groups: list) -> None:
        """Raises CalibrationError where the file says that it holds more than fits into memory."""
        size = self.file.stat().st_size
        for group in groups:
            if not 0 <= group.num_rows < MOST_ROWS or not 0 <= group.total_byte_size < MOST_EXPANDED * size + (1 << 26):
                raise CalibrationError(
                    f"{self.file}: is damaged or cut (it says that {group.num_rows:,} rows of {group.total_byte_size:,} bytes "
                    "are in a group of it); download it again"
                )

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
                raise CalibrationError(f"{self.file}: has no column {name!r}; it has {listed(self.columns)}")

    def _named(self):
        return _intact(self.file)


@contextmanager
def _intact(file: Path) -> Iterator[None]:
    """Turns whatever pyarrow raises into a CalibrationError that names the file."""
    try:
        yield
    except CalibrationError:
        raise
    except Exception as error:
        words = reason(type(error)(str(error).partition("\n")[0]) if type(error) is OSError else error)
        raise CalibrationError(f"{file}: is damaged or cut ({words}); download it again") from error
