"""Packs: the quantized form of one linear, and the npz files of the original scheme which hold them.

A file has the keys of the original openpi packs: ``perm`` [K], ``Rin_<i>`` and ``Rout_<i>`` [B, B] for the block ids
in ``R_in_blocks`` and ``R_out_blocks``, ``weight_scale`` [N] and ``meta`` (JSON text). Ours add ``weight_q``,
``input_scale`` and ``activation_scale``, and the linear's name to ``meta``. A file without ``weight_q`` is a foreign one:
it gives the transform only. Whatever a file holds is checked before it is used: a swapped or damaged pack may still have
the right shapes, and would move the robot wrongly without a word.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from duq.compiler.errors import PackError
from duq.compiler.quant.recipe import canonical_module, openpi_module
from duq.compiler.quant.transforms import LinearTransform
from duq.plugins.layout import pack_int4, unpack_int4
from duq.runtime.archives import read_npz
from duq.runtime.reading import brief, parse_json, plain, present, reason


@dataclass(kw_only=True, eq=False)
class LinearPack(LinearTransform):
    """One quantized linear y = W x + b: its integers, its scales, and the transform they live in.

    Attributes (beside those of :class:`LinearTransform`):
        name: canonical module name.
        weight_q: W' quantized: INT4 as packed uint8 [N, K/2], INT8 as int8 [N, K].
        weight_bits: 4 or 8.
        weight_scale: float32 [N]; W' is about weight_q * weight_scale[:, None].
        activation_bits: 8, or 0 for float activations.
        activation_scale: None for dynamic per-token, a float32 scalar array for static per-tensor, float32 [K] for
            static per-channel (``reference`` scheme only: it has no integer arithmetic).
        sqnr_db: signal to quantization noise of the output on calibration rows that the weights were not fitted to.
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
    stored: dict[str, Any] = {"meta": json.dumps(meta), **arrays}
    np.savez(directory / f"{pack.name}.npz", **stored)


def load_pack(directory: Path, name: str, shape: tuple[int, int]) -> LinearTransform:
    """Reads the pack of linear ``name`` with weight [N, K] = ``shape``, under its canonical or its openpi file name.

    Returns a :class:`LinearPack` where the file has integer weights, else a plain :class:`LinearTransform`.
    Raises PackError when there is no such file, or two; when it is damaged, names another linear, does not fit this one, or
    holds values that no pack has.
    """
    candidates = [directory / f"{name}.npz", directory / f"{openpi_module(name)}.npz"]
    files = [candidate for candidate in candidates if present(candidate, PackError)]
    if not files:
        raise PackError(f"{directory} has no pack for {name} (looked for {candidates[0].name} and {candidates[1].name})")
    if len(files) > 1:
        raise PackError(f"{directory} has two packs for {name}: {files[0].name} and {files[1].name}; keep one")
    path = files[0]
    try:
        return _from_arrays(name, shape, read_npz(path))
    except PackError as error:
        raise PackError(f"{path}: {error}") from error
    except Exception as error:  # of what is read, or of meta
        raise PackError(f"{path} is not a readable pack: {reason(error)}; make it again") from error


def _from_arrays(name: str, shape: tuple[int, int], arrays: dict[str, np.ndarray]) -> LinearTransform:
    meta = parse_json(str(arrays["meta"].item()), "meta", PackError, "make the pack again") if "meta" in arrays else {}
    _check_name(meta, name)
    _check_finite(arrays)
    rows, columns = shape
    for key, expected in (("in_features", columns), ("out_features", rows)):
        if meta.get(key, expected) != expected:
            raise PackError(f"made for {key} {brief(meta[key])}, but {name} of the checkpoint has {expected}")
    rotation = _block_diagonal(arrays, "Rin_", "R_in_blocks", meta.get("block_size"), columns)
    transform: dict[str, Any] = {
        "input_scale": _scale(arrays, "input_scale", (columns,)),
        "permutation": _permutation(arrays, columns),
        "rotation": rotation,
        "block_size": 0 if rotation is None else rotation.shape[-1],
        "output_rotation": _block_diagonal(arrays, "Rout_", "R_out_blocks", meta.get("block_out_size"), rows),
    }
    if meta.get("hadamard"):
        transform |= {"rotation": "hadamard", "block_size": _hadamard_block(meta, columns)}
    if "weight_q" not in arrays:
        return LinearTransform(**transform)
    for key, valid in (("weight_bits", (4, 8)), ("activation_bits", (8, 0))):
        if type(meta[key]) is not int or meta[key] not in valid:
            raise PackError(f"{key} is {brief(meta[key])}, expected {valid[0]} or {valid[1]}")
    bits = meta["weight_bits"]
    return LinearPack(
        name=name,
        weight_q=_integers(arrays, bits, shape),
        weight_bits=bits,
        weight_scale=_weight_scale(arrays, rows),
        activation_bits=meta["activation_bits"],
        activation_scale=_activation_scale(arrays, columns),
        sqnr_db=_decibels(meta),
        **transform,
    )


def _decibels(meta: dict) -> float:
    """A number of any size, also NaN where nothing was measured."""
    if not isinstance(meta["sqnr_db"], (int, float)):
        raise PackError(f"sqnr_db is {brief(meta['sqnr_db'])}, expected a number")
    return float(meta["sqnr_db"])


def _check_name(meta: dict, name: str) -> None:
    """PackError if the pack says that it is another linear's; foreign packs may say nothing."""
    found = meta.get("name")
    if found is not None and (not isinstance(found, str) or canonical_module(found) != name):
        raise PackError(
            f"is the pack of {plain(found)}, not of {name}: files were renamed or swapped; copy or make them again"
        )


def _check_finite(arrays: dict[str, np.ndarray]) -> None:
    for key, array in arrays.items():
        if array.dtype.kind not in ("biufU" if key == "meta" else "iuf"):
            raise PackError(f"{key} has dtype {array.dtype}, expected numbers")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            index = np.flatnonzero(~np.isfinite(array))[0]
            what = f"{key}<i> are not rotations: " if key.startswith(("Rin_", "Rout_")) else ""
            raise PackError(f"{what}{key} holds {array.flat[index]} at index {index}; make the pack again")


def _integers(arrays: dict[str, np.ndarray], bits: int, shape: tuple[int, int]) -> np.ndarray:
    """weight_q as :class:`LinearPack` has it. Two INT4 fill a byte, so each of its values is a valid pair."""
    rows, columns = shape
    weight_q = _checked(arrays, "weight_q", (rows, columns // 2 if bits == 4 else columns))
    expected = np.uint8 if bits == 4 else np.int8
    assert weight_q is not None, "its key was found"
    if weight_q.dtype != expected:
        raise PackError(f"weight_q has dtype {weight_q.dtype}, expected {np.dtype(expected)} for {bits} bits")
    return weight_q


def _weight_scale(arrays: dict[str, np.ndarray], rows: int) -> np.ndarray:
    """Of either sign: the integers reach one further down than up, and the sign turns a row's longer tail there."""
    scale = _checked(arrays, "weight_scale", (rows,))
    if scale is None:
        raise PackError("weight_scale is missing")
    if scale.dtype != np.float32 or not scale.all():
        raise PackError(f"weight_scale is {scale.dtype}, {np.sum(scale == 0)} of it 0; expected float32 other than 0")
    return scale


def _scale(arrays: dict[str, np.ndarray], key: str, *shapes: tuple[int, ...]) -> np.ndarray | None:
    """A float32 array of one of the shapes, all of it above 0; None if the file has none."""
    scale = arrays.get(key)
    if scale is None:
        return None
    if scale.shape not in shapes:
        raise PackError(f"{key} has shape {scale.shape}, expected {' or '.join(map(str, shapes))}")
    if scale.dtype != np.float32 or not (scale > 0).all():
        raise PackError(f"{key} is {scale.dtype}, as small as {scale.min()}; expected float32 above 0")
    return scale


def _activation_scale(arrays: dict[str, np.ndarray], columns: int) -> np.ndarray | None:
    return _scale(arrays, "activation_scale", (), (columns,))


def _hadamard_block(meta: dict, channels: int) -> int:
    size = meta["block_size"]
    if type(size) is not int:
        raise PackError(f"block_size is {brief(size)}, expected a whole number")
    if size < 1 or size & (size - 1) or channels % size:
        raise PackError(f"block_size is {size}; a Hadamard's is a power of two that divides {channels} channels")
    return size


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
    if permutation is not None and permutation.dtype.kind not in "iu":
        raise PackError(f"perm has dtype {permutation.dtype}, expected integers")
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
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        raise PackError(f"{index_key} is {indices.dtype} of shape {indices.shape}, expected a list of block numbers")
    size = size or arrays[f"{prefix}{indices[0]}"].shape[0]
    if type(size) is not int:
        raise PackError(f"the size of the blocks is {brief(size)}, expected a whole number")
    if size < 1 or channels % size or indices.min() < 0 or indices.max() >= channels // size:
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
