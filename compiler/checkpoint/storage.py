"""Safetensors and JSON files of a checkpoint directory, with errors that name the file."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from duq.compiler.errors import CheckpointError
from duq.runtime.errors import PlanError
from duq.runtime.reading import REMEDY, brief, present, read_bytes, reading, reason
from duq.runtime.reading import read_json as reading_json
from duq.runtime.tokenizer import Tokenizer

TOKENIZER_BYTES = 64 << 20  # at most: PaliGemma's has 4 MB
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
    if is_there(directory / WEIGHTS):
        return [directory / WEIGHTS]
    if is_there(directory / WEIGHTS_INDEX):
        return [directory / shard for shard in _shards(directory / WEIGHTS_INDEX)]
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
    if not is_there(file):
        raise CheckpointError(f"{file} (missing) is cut short or damaged: No such file; {REMEDY}")
    with reading(file, CheckpointError):
        try:
            with safe_open(file, framework="pt") as tensors:
                return {name: tensors.get_tensor(name) for name in tensors.keys()}
        except (SafetensorError, OSError) as error:
            if is_lfs_pointer(file):
                pointer = f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder"
                raise CheckpointError(pointer) from error
            size = f"{file.stat().st_size:,} bytes"
            raise CheckpointError(f"{file} ({size}) is cut short or damaged: {reason(error)}; {REMEDY}") from error


def is_lfs_pointer(file: Path) -> bool:
    """Whether the file only stands for one that Git LFS has not fetched."""
    if not file.is_file():
        return False
    with open(file, "rb") as stream:
        return stream.read(len(LFS_HEAD)) == LFS_HEAD


def read_tokenizer(file: Path) -> bytes:
    """A SentencePiece model. Raises CheckpointError, which names the file, for anything else."""
    data = read_bytes(file, CheckpointError, limit=TOKENIZER_BYTES)
    try:
        Tokenizer(data)
    except PlanError as error:
        raise CheckpointError(f"{file}: {str(error).removeprefix('tokenizer.model: ')}") from error
    return data


def is_there(file: Path) -> bool:
    """Whether the checkpoint has this file. Raises CheckpointError for a folder or a dangling link of its name."""
    return present(file, CheckpointError)


def read_json(file: Path) -> dict:
    """A JSON object. Raises CheckpointError when the file is absent or holds anything else."""
    return reading_json(file, CheckpointError)


def optional_json(file: Path) -> dict:
    """A JSON object, empty when there is no such file. Raises CheckpointError when it holds anything else."""
    return read_json(file) if is_there(file) else {}


def file_beside(file: Path, name: object) -> Path:
    """The file that `file` names, in its own folder. Raises CheckpointError for what is no file's name."""
    if not isinstance(name, str) or not name or name in (".", "..") or "/" in name or "\0" in name:
        raise CheckpointError(f"{file}: names {brief(name)}, expected a file beside it; {REMEDY}")
    return file.parent / name


def _shards(index: Path) -> list[str]:
    """The names of the files that hold a policy's tensors, in order."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f'{index} has no "weight_map" object; {REMEDY}')
    return sorted({file_beside(index, shard).name for shard in shards.values()})
