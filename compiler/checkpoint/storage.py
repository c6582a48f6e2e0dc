"""Safetensors and JSON files of a checkpoint directory, with errors that name the file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from duq.compiler.errors import CheckpointError

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
LFS_HEAD = b"version https://git-lfs"


def weight_files(directory: Path) -> list[Path]:
    """The safetensors file of a checkpoint, or its shards in order.

    Raises CheckpointError when `directory` is none or holds no PyTorch weights.
    """
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise CheckpointError(f"{directory} {what}: expected the directory that holds {WEIGHTS}")
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if (directory / WEIGHTS_INDEX).is_file():
        shards = {shard for shard in _section(directory / WEIGHTS_INDEX, "weight_map").values()}
        return [directory / shard for shard in sorted(shards)]
    if (directory / "params").is_dir():
        raise CheckpointError(
            f"{directory} is an openpi JAX checkpoint (params/): convert it to PyTorch with openpi's "
            "examples/convert_jax_model_to_pytorch.py and pass the converted directory"
        )
    raise CheckpointError(f"{directory} is not a checkpoint: it has no {WEIGHTS} (nor {WEIGHTS_INDEX})")


def open_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Name -> tensor, memory-mapped: bytes are read from the file when they are first used, never copied.

    Raises CheckpointError when the file is missing, cut short or not safetensors.
    """
    if os.fsencode(file).decode(errors="ignore") != str(file):
        raise CheckpointError(f"{file}: its path is not UTF-8, which safetensors does not open; rename it")
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}
    except (SafetensorError, OSError) as error:
        if is_lfs_pointer(file):
            pointer = f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder"
            raise CheckpointError(pointer) from error
        size = f"{file.stat().st_size:,} bytes" if file.is_file() else "missing"
        raise CheckpointError(f"{file} ({size}) is cut short or damaged: {error}; copy or download it again") from error


def is_lfs_pointer(file: Path) -> bool:
    """Whether the file only stands for one that Git LFS has not fetched."""
    if not file.is_file():
        return False
    with open(file, "rb") as stream:
        return stream.read(len(LFS_HEAD)) == LFS_HEAD


def read_json(file: Path) -> dict:
    """A JSON object. Raises CheckpointError when the file is absent or holds anything else."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} must hold a JSON object, not a {type(data).__name__}")
    return data


def _section(file: Path, key: str) -> dict:
    section = read_json(file).get(key)
    if not isinstance(section, dict):
        raise CheckpointError(f'{file} has no "{key}" object')
    return section
