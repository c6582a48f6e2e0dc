"""Packs: the quantised form of one linear, and the npz files of the original scheme which hold them.

A file has the keys of the original openpi packs: ``perm`` [K], ``Rin_<i>`` and ``Rout_<i>`` [B, B] for the block ids
in ``R_in_blocks`` and ``R_out_blocks``, ``weight_scale`` [N] and ``meta`` (JSON text). Ours add ``weight_q``,
``input_scale`` and ``activation_scale``. A file without ``weight_q`` is a foreign one: it gives the transform only.
"""
from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compiler.errors import PackError
from compiler.quant.recipe import openpi_module
from compiler.quant.transforms import LinearTransform
from plugins.layout import pack_int4, unpack_int4


@dataclass(kw_only=True, eq=False)
class LinearPack(LinearTransform):
    """One quantised linear y = W x + b: its integers, its scales, and the transform they live in.

    Attributes (beside those of :class:`LinearTransform`):
        name: canonical module name.
        weight_q: W' quantised: INT4 as packed uint8 [N, K/2], INT8 as int8 [N, K].
        weight_bits: 4 or 8.
        weight_scale: float32 [N]; W' is about weight_q * weight_scale[:, None].
        activation_bits: 8, or 0 for float activations.
        activation_scale: None for dynamic per-token, a float32 scalar array for static per-tensor, float32 [K] for
            static per-channel (``reference`` scheme only: it has no integer arithmetic).
        sqnr_db: signal to quantisation noise of the output on calibration rows that the weights were not fitted to.
    """

    name: str
    weight_q: np.ndarray
    weight_bits: int
    weight_scale: np.ndarray
    activation_bits: int = 8
    activation_scale: np.ndarray | None = None
    sqnr_db: float = float("nan")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        rows, columns = self.weight_q.shape
        return rows, columns * (2 if self.weight_bits == 4 else 1)

    def weight(self) -> np.ndarray:
        """weight_q as int8 [N, K]."""
        return unpack_int4(self.weight_q, self.shape) if self.weight_bits == 4 else self.weight_q


def pack_weight(integers: np.ndarray, bits: int) -> np.ndarray:
    """int8 [N, K] -> what :attr:`LinearPack.weight_q` stores."""
    return pack_int4(integers) if bits == 4 else integers


def save_pack(pack: LinearPack, directory: Path) -> None:
    """Writes ``<directory>/<name>.npz``."""
    arrays = {"weight_q": pack.weight_q, "weight_scale": pack.weight_scale}
    optional = {"perm": pack.permutation, "input_scale": pack.input_scale, "activation_scale": pack.activation_scale}
    arrays |= {key: value for key, value in optional.items() if value is not None}
    if isinstance(pack.rotation, np.ndarray):
        arrays |= _blocks("Rin_", "R_in_blocks", pack.rotation)
    if pack.output_rotation is not None:
        arrays |= _blocks("Rout_", "R_out_blocks", pack.output_rotation)
    rows, columns = pack.shape
    meta = {
        "name": pack.name,
        "in_features": columns,
        "out_features": rows,
        "block_size": pack.block_size,
        "block_out_size": 0 if pack.output_rotation is None else pack.output_rotation.shape[-1],
        "hadamard": isinstance(pack.rotation, str),
        "weight_bits": pack.weight_bits,
        "activation_bits": pack.activation_bits,
        "sqnr_db": pack.sqnr_db,
    }
    np.savez(directory / f"{pack.name}.npz", meta=json.dumps(meta), **arrays)


def load_pack(directory: Path, name: str, shape: tuple[int, int]) -> LinearTransform:
    """Reads the pack of linear ``name`` with weight [N, K] = ``shape``, under its canonical or its openpi file name.

    Returns a :class:`LinearPack` where the file has integer weights, else a plain :class:`LinearTransform`.
    Raises PackError when there is no such file, it is damaged, or it does not fit the linear.
    """
    candidates = [directory / f"{name}.npz", directory / f"{openpi_module(name)}.npz"]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise PackError(f"{directory} has no pack for {name} (looked for {candidates[0].name} and {candidates[1].name})")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        return _from_arrays(name, shape, arrays)
    except (zipfile.BadZipFile, EOFError, KeyError, ValueError, TypeError, OSError) as error:
        raise PackError(f"{path} is not a readable pack: {error}") from error
    except PackError as error:
        raise PackError(f"{path}: {error}") from error


def _from_arrays(name: str, shape: tuple[int, int], arrays: dict[str, np.ndarray]) -> LinearTransform:
    meta = json.loads(arrays["meta"].item()) if "meta" in arrays else {}
    rows, columns = shape
    for key, expected in (("in_features", columns), ("out_features", rows)):
        if meta.get(key, expected) != expected:
            raise PackError(f"made for {key} {meta[key]}, but {name} of the checkpoint has {expected}")
    rotation = _block_diagonal(arrays, "Rin_", "R_in_blocks", meta.get("block_size"), columns)
    transform = {
        "input_scale": _checked(arrays, "input_scale", (columns,)),
        "permutation": _permutation(arrays, columns),
        "rotation": "hadamard" if meta.get("hadamard") else rotation,
        "block_size": int(meta["block_size"]) if meta.get("hadamard") else 0 if rotation is None else rotation.shape[-1],
        "output_rotation": _block_diagonal(arrays, "Rout_", "R_out_blocks", meta.get("block_out_size"), rows),
    }
    if "weight_q" not in arrays:
        return LinearTransform(**transform)
    bits = meta["weight_bits"]
    weight_q = _checked(arrays, "weight_q", (rows, columns // 2 if bits == 4 else columns))
    return LinearPack(
        name=name,
        weight_q=weight_q,
        weight_bits=bits,
        weight_scale=_checked(arrays, "weight_scale", (rows,)),
        activation_bits=meta["activation_bits"],
        activation_scale=arrays.get("activation_scale"),
        sqnr_db=meta["sqnr_db"],
        **transform,
    )


def _blocks(prefix: str, index_key: str, rotation: np.ndarray) -> dict[str, np.ndarray]:
    blocks = {f"{prefix}{i}": block for i, block in enumerate(rotation)}
    return blocks | {index_key: np.arange(len(rotation), dtype=np.int64)}


def _checked(arrays: dict[str, np.ndarray], key: str, shape: tuple[int, ...]) -> np.ndarray | None:
    array = arrays.get(key)
    if array is not None and array.shape != shape:
        raise PackError(f"{key} has shape {array.shape}, expected {shape}")
    return array


def _permutation(arrays: dict[str, np.ndarray], channels: int) -> np.ndarray | None:
    permutation = _checked(arrays, "perm", (channels,))
    if permutation is not None and not np.array_equal(np.sort(permutation), np.arange(channels)):
        raise PackError(f"perm is not a permutation of 0..{channels - 1}")
    return None if permutation is None else permutation.astype(np.int64)


def _block_diagonal(
    arrays: dict[str, np.ndarray], prefix: str, index_key: str, size: int | None, channels: int
) -> np.ndarray | None:
    """The blocks as float32 [channels / size, size, size]; a block that the file leaves out is the identity."""
    if index_key not in arrays or not len(arrays[index_key]):
        return None
    indices = arrays[index_key]
    size = int(size) if size else arrays[f"{prefix}{indices[0]}"].shape[0]
    if channels % size or indices.min() < 0 or indices.max() >= channels // size:
        raise PackError(f"{index_key} with blocks of {size} does not divide {channels} channels")
    blocks = np.tile(np.eye(size, dtype=np.float32), (channels // size, 1, 1))
    for index in indices:
        if f"{prefix}{index}" not in arrays:
            raise PackError(f"{prefix}{index} is missing, but {index_key} lists it")
        blocks[index] = _checked(arrays, f"{prefix}{index}", (size, size))
    error = np.abs(blocks @ blocks.swapaxes(1, 2) - np.eye(size)).max()
    if not error < 1e-3:
        raise PackError(f"{prefix}<i> are not rotations: R R^T differs from the identity by {error:.2g}")
    return blocks
