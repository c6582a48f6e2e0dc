"""Reading .npz files that may be anything."""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path
from typing import IO

import numpy as np

from duq.runtime.reading import reason


def read_npz(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file by name, none of them of objects.

    No more memory is taken than the file's entries fill, and none if that is more than the machine has.
    Raises OSError if the file cannot be read, ValueError with one line if it is not an intact .npz of plain arrays.
    """
    try:
        headers = read_headers(file)
        nbytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in headers.values())
        if nbytes > _memory():
            raise ValueError(f"its arrays take {nbytes / 1e9:,.1f} GB, and this machine has {_memory() / 1e9:,.1f} GB")
        # np.load also takes a lone array or a pickle
        with np.lib.npyio.NpzFile(file, allow_pickle=False) as archive:  # type: ignore[arg-type]
            return {key: np.asarray(archive[key]) for key in archive.files}
    except OSError:
        raise
    except Exception as error:  # damaged ones fail in zipfile, zlib, numpy, and, as headers are Python, in tokenize and ast
        raise ValueError(reason(error)) from error


def read_headers(file: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of each array, by name in the file's order, of which each is as large as its entry in the zip.

    Raises whatever zipfile and numpy raise for a damaged file.
    """
    headers = {}
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            with archive.open(info) as entry:
                headers[info.filename.removesuffix(".npy")] = _header(entry, info)
    return headers


def _header(entry: IO[bytes], info: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(entry)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(entry)
    expected, found = math.prod(shape) * dtype.itemsize, info.file_size - entry.tell()
    if dtype.hasobject:
        raise ValueError(f"{info.filename} holds objects, not numbers")
    if min(shape, default=0) < 0 or expected != found:
        raise ValueError(f"{info.filename} has {found:,} bytes of data, and its header says {expected:,}")
    return shape, dtype


def _memory() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
