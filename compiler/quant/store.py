"""A directory of packs: one npz for each linear, ``recipe.json``, and the float tensors that quantisation edits.

A directory without ``recipe.json`` holds packs of the original scripts: transforms only, under openpi's module names.
"""
from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file

from compiler.errors import PackError
from compiler.quant.linears import select_linears
from compiler.quant.pack import LinearPack, load_pack, save_pack
from compiler.quant.quantize import Quantization
from compiler.quant.recipe import Recipe
from compiler.quant.transforms import LinearTransform

FORMAT_VERSION = 1
RECIPE, FLOAT_WEIGHTS, VALUE_SCALES = "recipe.json", "float_weights.safetensors", "value_scales.safetensors"


def check_destination(directory: Path) -> None:
    """Raises PackError unless packs may be written there: nothing is there, or packs written here before."""
    if directory.exists() and not (is_quantization(directory) or (directory.is_dir() and not any(directory.iterdir()))):
        raise PackError(f"{directory} exists and is not a directory of packs; choose another --out")


def save_quantization(quantization: Quantization, directory: Path, fingerprint: str, progress: Progress) -> None:
    """Writes ``directory``, which appears whole or not at all and may replace packs written here before.

    ``fingerprint`` is that of the checkpoint the integers were made from. Raises PackError when the directory exists
    and holds something else.
    """
    check_destination(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        for pack in progress.track(quantization.packs.values(), description="Writing packs"):
            save_pack(pack, temporary)
        save_file({k: v.contiguous() for k, v in quantization.float_weights.items()}, temporary / FLOAT_WEIGHTS)
        _save_value_transforms(quantization, temporary)
        description = {
            "format_version": FORMAT_VERSION,
            "checkpoint_fingerprint": fingerprint,
            "recipe": quantization.recipe.to_json(),
            "linears": list(quantization.packs),
        }
        (temporary / RECIPE).write_text(json.dumps(description, indent=2))
        temporary.chmod(0o755)  # mkdtemp's is private
        if directory.exists():
            shutil.rmtree(directory)
        os.rename(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_quantization(directory: Path, checkpoint) -> Quantization:
    """Reads what :func:`save_quantization` wrote for this checkpoint.

    Raises PackError when something is missing or damaged, or was made from another checkpoint.
    """
    try:
        description = json.loads((directory / RECIPE).read_text())
        version, fingerprint = description["format_version"], description["checkpoint_fingerprint"]
        recipe, linears = description["recipe"], description["linears"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PackError(f"{directory / RECIPE} is not readable: {error}") from error
    if version != FORMAT_VERSION:
        raise PackError(f"{directory} has packs of format {version}, this duq reads {FORMAT_VERSION}; quantise again")
    if fingerprint != checkpoint.fingerprint:
        raise PackError(f"{directory} was made from another checkpoint than {checkpoint.path}; quantise again")
    packs = {name: load_pack(directory, name, _shape(checkpoint, name)) for name in linears}
    for name, pack in packs.items():
        if not isinstance(pack, LinearPack):
            raise PackError(f"{directory / name}.npz holds no integer weights; quantise again")
    try:
        return Quantization(
            Recipe.from_settings(recipe),
            packs,
            load_file(directory / FLOAT_WEIGHTS),
            _load_value_transforms(directory),
        )
    except (OSError, SafetensorError) as error:
        raise PackError(f"{directory}: {error}; quantise again") from error


def load_transforms(directory: Path, checkpoint, recipe: Recipe) -> dict[str, LinearTransform]:
    """The transforms of packs made elsewhere, for every linear that ``recipe`` selects.

    With row rotation "0" the packs' R_out is left out, as in the original scripts. Raises PackError when a pack is
    missing, damaged, or does not fit its linear.
    """
    if not directory.is_dir():
        raise PackError(f"{directory} is not a directory of packs; duq-quantize writes one")
    transforms = {}
    for name in select_linears(recipe, checkpoint.config):
        pack = load_pack(directory, name, _shape(checkpoint, name))
        output_rotation = pack.output_rotation if recipe.row_rotation == "restore" else None
        transforms[name] = LinearTransform(**pack.parts() | {"output_rotation": output_rotation})
    return transforms


def is_quantization(directory: Path) -> bool:
    """Whether the packs in the directory are complete with integer weights, written by :func:`save_quantization`."""
    return (directory / RECIPE).is_file()


def _shape(checkpoint, name: str) -> tuple[int, int]:
    weight = checkpoint.weights.get(f"{name}.weight")
    if weight is None:
        raise PackError(f"there is a pack for {name}, which {checkpoint.path} does not have")
    return tuple(weight.shape)


def _save_value_transforms(quantization: Quantization, directory: Path) -> None:
    """They are all a scale and a Hadamard of a block size that the layers share."""
    transforms = quantization.value_transforms
    scales = {str(layer): transform.input_scale for layer, transform in transforms.items()}
    block_size = max((transform.block_size for transform in transforms.values()), default=0)
    save_numpy(scales, directory / VALUE_SCALES, {"block_size": str(block_size)})


def _load_value_transforms(directory: Path) -> dict[int, LinearTransform]:
    with safe_open(directory / VALUE_SCALES, "np") as file:
        block_size = int(file.metadata()["block_size"])
        scales = {int(layer): file.get_tensor(layer) for layer in file.keys()}
    return {
        layer: LinearTransform(input_scale=scales[layer], rotation="hadamard", block_size=block_size)
        for layer in sorted(scales)
    }
