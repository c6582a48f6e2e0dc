"""Arrays of an Orbax checkpoint (the `params/` of openpi's JAX trainer), read with tensorstore alone.

The names are in `_METADATA`. The arrays are zarr arrays inside one OCDBT database, whose B-tree says which range of which
file in `d/` each chunk is; without `manifest.ocdbt`, each is a zarr folder of its own.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import torch

from duq.compiler.checkpoint.shapes import listing
from duq.compiler.checkpoint.storage import is_lfs_pointer, is_there, read_json
from duq.compiler.errors import CheckpointError
from duq.runtime.reading import brief, listed, reading, reason

METADATA, MANIFEST = "_METADATA", "manifest.ocdbt"
ROOT, VALUE = "params", "value"  # the first key of every array, and the last that nnx.State adds
MOST_AXES, MOST_VALUES = 8, 1 << 34  # of an array: the largest of a policy has 1.2e9 values
AGAIN = "copy or download it again"


@dataclass
class OrbaxArray:
    """One array, on disk."""

    name: str
    spec: dict
    store: Any  # tensorstore.TensorStore

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.store.shape)

    @cached_property
    def dtype(self) -> torch.dtype:
        name = self.store.dtype.name
        dtype = getattr(torch, name, None)
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"array {self.name} is stored as {name}, which no weight of pi0 is")
        return dtype

    def caching(self, rows: int) -> OrbaxArray:
        """The same array, to be read `rows` of the first axis at a time: chunks that hold more are decoded only once."""
        import tensorstore

        chunk = self.store.chunk_layout.read_chunk.shape
        if not chunk or chunk[0] <= rows:
            return self
        nbytes = min(chunk[0], self.shape[0]) * math.prod(self.shape[1:]) * self.dtype.itemsize
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": nbytes + nbytes // 8 + (1 << 20)}})
        return OrbaxArray(self.name, self.spec, _opened(self.name, tensorstore.open(self.spec, context=context)))

    def read(self, index: Any = ...) -> torch.Tensor:
        """The array, or a part of it, in its stored dtype. Raises CheckpointError when its bytes are missing or damaged."""
        try:
            values = self.store[index].read(order="C").result()
        except Exception as error:
            raise CheckpointError(f"array {self.name} cannot be read: {_reason(error)}; {AGAIN}") from error
        values = np.ascontiguousarray(values)
        if self.dtype == torch.bfloat16:
            return torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(values)


def open_arrays(params: Path) -> dict[str, OrbaxArray]:
    """The arrays of a folder written by Orbax, by their path without "params" and "value": "PaliGemma/img/head/kernel".

    Raises CheckpointError when tensorstore is not installed, and when files are missing or shorter than the database says.
    """
    try:
        import tensorstore
    except ImportError as error:
        raise CheckpointError(f"{params} is in Orbax's form: reading it needs tensorstore, pip install '.[jax]'") from error
    metadata = _metadata(params)
    if metadata.get("use_ocdbt", is_there(params / MANIFEST)):
        _check_ranges(params, _database_ranges(params))
    zarr = "zarr3" if metadata.get("use_zarr3") else "zarr"
    specs = {name: _spec(params, zarr, keys) for name, keys in _array_keys(params, metadata).items()}
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})
    with reading(params / METADATA, CheckpointError, AGAIN):
        opening = {name: tensorstore.open(spec, context=context) for name, spec in specs.items()}
    arrays, faults = {}, []
    for name, future in opening.items():
        try:
            arrays[name] = OrbaxArray(name, specs[name], _opened(name, future))
            _check_size(arrays[name])
        except CheckpointError as error:
            faults.append(str(error))
    if faults:
        raise CheckpointError(f"{params}: {len(faults)} arrays cannot be opened; {AGAIN}:\n{listing(faults)}")
    if not is_there(params / MANIFEST):
        _check_chunk_files(params, arrays)
    return arrays


def _check_size(array: OrbaxArray) -> None:
    """Raises CheckpointError for dimensions that would take all memory before anything else is checked."""
    chunk = array.store.chunk_layout.read_chunk.shape or array.shape
    values = math.prod(array.shape)
    if array.store.rank > MOST_AXES or values > MOST_VALUES or math.prod(chunk) > 2 * max(values, 1):
        raise CheckpointError(
            f"array {array.name} has shape {list(array.shape)} in chunks of {list(chunk)}, which no weight of a policy has"
        )


def array_files(params: Path) -> list[Path]:
    """The files that define the arrays' values, in an order that is the same wherever the folder lies."""
    if is_there(params / MANIFEST):
        return [params / METADATA, params / MANIFEST, *(params / file for file in sorted(_database_ranges(params)))]
    files = [file for folder in sorted(params.glob(f"{ROOT}.*")) for file in sorted(folder.rglob("*")) if file.is_file()]
    return [params / METADATA, *files]


def root_keys(params: Path) -> set[str]:
    """The first key of every array: {"params"} for weights, others for a training state."""
    return {keys[0] for keys in _keys(params, _metadata(params))}


def _metadata(params: Path) -> dict:
    file = params / METADATA
    if not is_there(file):
        raise CheckpointError(f"{params} has no {METADATA}, which names Orbax's arrays: {AGAIN}")
    _check_pointer(file)
    metadata = read_json(file)
    if not isinstance(metadata.get("tree_metadata"), dict):
        raise CheckpointError(f'{file} has no "tree_metadata" object')
    for key in ("use_ocdbt", "use_zarr3"):
        if not isinstance(metadata.get(key, False), bool):
            raise CheckpointError(f"{file}: {key} is {brief(metadata[key])}, expected true or false")
    if metadata.get("use_ocdbt") and not is_there(params / MANIFEST):
        raise CheckpointError(f"{params / MANIFEST} is missing, so the arrays cannot be found: {AGAIN}")
    return metadata


def _keys(params: Path, metadata: dict) -> list[list[str]]:
    """The path of every array; empty nodes of the tree have none."""
    try:
        keys = [
            [_key(key["key"]) for key in entry["key_metadata"]]
            for entry in metadata["tree_metadata"].values()
            if not entry.get("value_metadata", {}).get("skip_deserialize")
        ]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{params / METADATA} is not as Orbax writes it: {reason(error)}") from error
    if not all(keys):
        raise CheckpointError(f"{params / METADATA} is not as Orbax writes it: an array has no keys")
    return keys


def _key(key: Any) -> str:
    """A key is a part of a path, as text or as a number."""
    text = str(key) if isinstance(key, (str, int)) else ""
    if not text or text in (".", "..") or "/" in text or "\0" in text:
        raise ValueError(f"{brief(key)} is no key")
    return text


def _array_keys(params: Path, metadata: dict) -> dict[str, list[str]]:
    """Name -> the array's keys in the tree."""
    keys = _keys(params, metadata)
    foreign = sorted({path[0] for path in keys if path[0] != ROOT})
    if foreign or not keys:
        found = listed(foreign) or "nothing"
        raise CheckpointError(f"{params} holds no weights (arrays under {ROOT!r}) but {found}; pass the step's params/")
    named = {"/".join(path[1:-1] if path[-1] == VALUE else path[1:]): path for path in keys}
    if len(named) < len(keys):
        raise CheckpointError(f'{params / METADATA} names an array both with and without a last "{VALUE}"')
    return named


def _spec(params: Path, driver: str, keys: list[str]) -> dict:
    path = ".".join(keys)
    if is_there(params / MANIFEST):
        kvstore = {"driver": "ocdbt", "base": f"file://{params.resolve()}/", "path": f"{path}/"}
    else:
        kvstore = {"driver": "file", "path": f"{(params / path).resolve()}/"}
    return {
        "driver": driver,
        "kvstore": kvstore,
        "open": True,
        "recheck_cached_data": False,
        "recheck_cached_metadata": False,
    }


def _opened(name: str, future: Any) -> Any:
    try:
        return future.result()
    except Exception as error:
        raise CheckpointError(f"array {name}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """tensorstore's message without its specification and source lines."""
    return re.split(r" \[(?:source|tensorstore_spec)", " ".join(str(error).split()))[0][:300]


def _database_ranges(params: Path) -> dict[str, int]:
    """File (relative to `params`) -> the bytes it must have at least, from the newest version of the database's B-tree."""
    import tensorstore

    try:
        base = tensorstore.KvStore.open({"driver": "file", "path": f"{params.resolve()}/"}).result()
        versions = tensorstore.ocdbt.dump(base).result()["versions"]
        ends: dict[str, int] = {}
        nodes = [max(versions, key=lambda version: version["generation_number"])["root"].get("location")]
        seen = set()
        while nodes:
            if (location := nodes.pop()) and location not in seen:
                seen.add(location)
                file, end = _file_range(location)
                ends[file] = max(end, ends.get(file, 0))
                _check_ranges(params, {file: end})  # before the node is read
                for entry in tensorstore.ocdbt.dump(base, location).result()["entries"]:
                    if "location" in entry:
                        nodes.append(entry["location"])
                    if "indirect_value" in entry:
                        file, end = _file_range(entry["indirect_value"])
                        ends[file] = max(end, ends.get(file, 0))
        return ends
    except CheckpointError:
        raise
    except Exception as error:
        _check_pointer(params / MANIFEST)
        raise CheckpointError(f"{params / MANIFEST}: the database cannot be read: {_reason(error)}; {AGAIN}") from error


def _file_range(location: str) -> tuple[str, int]:
    """ "value:ocdbt.process_0/:d/77c766:100:20" -> ("ocdbt.process_0/d/77c766", 120)."""
    _, *path, offset, length = location.split(":")
    return unquote("".join(path)), int(offset) + int(length)


def _check_ranges(params: Path, ends: dict[str, int]) -> None:
    faults = []
    for name, end in sorted(ends.items()):
        file = params / name
        if not file.is_file():
            faults.append(f"{name} is missing")
        elif file.stat().st_size < end:
            _check_pointer(file)
            faults.append(f"{name} has {file.stat().st_size:,} of {end:,} bytes")
    if faults:
        raise CheckpointError(f"{params} is not complete; {AGAIN}:\n{listing(faults)}")


def _check_chunk_files(params: Path, arrays: dict[str, OrbaxArray]) -> None:
    """A missing chunk of a zarr folder would be read as zeros; Orbax writes them all."""
    faults = []
    for array in arrays.values():
        folder = Path(array.spec["kvstore"]["path"])
        chunk = array.store.chunk_layout.write_chunk.shape
        expected = math.prod(-(-size // step) for size, step in zip(array.shape, chunk, strict=True))
        found = sum(file.is_file() and not file.name.startswith((".z", "zarr.json")) for file in folder.rglob("*"))
        if found != expected:
            faults.append(f"{folder.name} has {found} of {expected} chunks")
    if faults:
        raise CheckpointError(f"{params} is not complete; {AGAIN}:\n{listing(faults)}")


def _check_pointer(file: Path) -> None:
    if is_lfs_pointer(file):
        raise CheckpointError(f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` where it was cloned")
