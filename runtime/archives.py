"""Reading .npz files that may be anything."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def read_npz(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file by name, none of them of objects.

    Raises OSError if the file cannot be read, ValueError with one line if it is not an intact .npz of plain arrays.
    """
    try:
        # np.load also takes a lone array or a pickle
        with np.lib.npyio.NpzFile(file, allow_pickle=False) as archive:  # type: ignore[arg-type]
            arrays = {key: np.asarray(archive[key]) for key in archive.files}
    except OSError:
        raise
    except Exception as error:  # damaged ones fail in zipfile, zlib, numpy, and, as headers are Python, in tokenize and ast
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    return arrays
