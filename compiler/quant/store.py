"""A directory of packs: one npz for each linear, ``recipe.json``, and the float tensors that quantization edits.

A directory without ``recipe.json`` holds packs of the original scripts: transforms only, under openpi's module names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file

from duq.compiler.errors import PackError, RecipeError
from duq.compiler.quant.linears import select_linears
from duq.compiler.quant.pack import LinearPack, load_pack, save_pack
from duq.compiler.quant.quantize import Quantization
from duq.compiler.quant.recipe import SELECTION, Recipe
from duq.compiler.quant.transforms import LinearTransform
from duq.runtime.config import ModelConfig
from duq.runtime.files import check_output_folder, replacing_folder
from duq.runtime.reading import brief, listed, present, read_json, reading

FORMAT_VERSION = 1
AGAIN = "quantize again"
RECIPE, FLOAT_WEIGHTS, VALUE_SCALES = "recipe.json", "float_weights.safetensors", "value_scales.safetensors"


def check_destination(directory: Path) -> None:
    """Raises PackError unless packs may be written there: nothing is there, or packs written here before."""
    if directory.exists() and not (is_quantization(directory) or (directory.is_dir() and not any(directory.iterdir()))):
        raise PackError(f"{directory} exists and is not a directory of packs; choose another --out")
    check_output_folder("--out", directory, PackError, is_quantization)


def save_quantization(quantization: Quantization, directory: Path, fingerprint: str, progress: Progress) -> None:
    """Writes ``directory``, which appears whole or not at all and may replace packs written here before.

    ``fingerprint`` is that of the checkpoint the integers were made from. Raises PackError when the directory exists
    and holds something else.
    """
    description = {
        "format_version": FORMAT_VERSION,
        "checkpoint_fingerprint": fingerprint,
        "recipe": quantization.recipe.to_json(),
        "linears": list(quantization.packs),
    }
    check_destination(directory)
    with replacing_folder(directory, PackError, is_quantization) as draft:
        for pack in progress.track(quantization.packs.values(), description="Writing packs"):
            save_pack(pack, draft)
        try:
            save_file({k: v.contiguous() for k, v in quantization.float_weights.items()}, draft / FLOAT_WEIGHTS)
            _save_value_transforms(quantization, draft)
        except SafetensorError as error:  # the disk is full: safetensors has no OSError for it
            raise PackError(f"{directory}: cannot be written ({error}); make room or name another place") from error
        (draft / RECIPE).write_text(json.dumps(description, indent=2))


def load_quantization(directory: Path, checkpoint) -> Quantization:
    """Reads what :func:`save_quantization` wrote for this checkpoint.

    Raises PackError when something is missing, damaged or there beyond what recipe.json lists, or was made from another
    checkpoint.
    """
    description = _description(directory)
    recipe, linears = _recipe(directory, description), description["linears"]
    if description["checkpoint_fingerprint"] != checkpoint.fingerprint:
        raise PackError(f"{directory} was made from another checkpoint than {checkpoint.path}; quantize again")
    _check_files(directory, linears)
    packs: dict[str, LinearPack] = {}
    for name in linears:
        pack = load_pack(directory, name, _shape(checkpoint, name))
        if not isinstance(pack, LinearPack):
            raise PackError(f"{directory / name}.npz holds no integer weights; quantize again")
        packs[name] = pack
    with reading(directory / FLOAT_WEIGHTS, PackError, AGAIN):
        float_weights = load_file(directory / FLOAT_WEIGHTS)
    with reading(directory / VALUE_SCALES, PackError, AGAIN):
        value_transforms = _load_value_transforms(directory)
    _check_float_weights(directory, float_weights, checkpoint)
    _check_value_transforms(directory, value_transforms, checkpoint)
    return Quantization(recipe, packs, float_weights, value_transforms)


def read_recipe(directory: Path) -> Recipe:
    """The recipe that packs written by :func:`save_quantization` were made with. PackError if it cannot be read."""
    return _recipe(directory, _description(directory))


def check_recipe(directory: Path, recipe: Recipe, origins: Mapping[str, str], config: ModelConfig) -> None:
    """PackError where what was asked for contradicts the packs, which are compiled as they are.

    recipe: what was asked for. origins: its keys that the user set, and where (`recipe_origins`). Selections and bits agree
    if they give the policy's linears the same bits, however they are written.
    """
    own, asked = read_recipe(directory), {key: getattr(recipe, key) for key in origins}
    of_bits = {key: value for key, value in asked.items() if key in (*SELECTION, "weight_bits", "layer_bits")}
    if select_linears(replace(own, **of_bits), config) == select_linears(own, config):
        asked = {key: value for key, value in asked.items() if key not in of_bits}
    for key, value in asked.items():
        if value != getattr(own, key):
            raise PackError(
                f"{origins[key]}: asks for {key} {value!r}, but the packs in {directory} were made with "
                f"{getattr(own, key)!r}; leave it out to compile them as they are, or make others with duq-quantize"
            )


def _description(directory: Path) -> dict:
    """recipe.json, each of its keys there and of the right kind."""
    file = directory / RECIPE
    description = read_json(
        file, lambda message: PackError(message.replace(f"{file}:", f"{file} is not readable:", 1)), AGAIN
    )
    version = description.get("format_version")
    if type(version) is not int:
        raise PackError(f"{file} is not readable: format_version is {brief(version)}; {AGAIN}")
    if version != FORMAT_VERSION:
        raise PackError(f"{directory} has packs of format {version}, this duq reads {FORMAT_VERSION}; {AGAIN}")
    for key, kind in {"checkpoint_fingerprint": str, "recipe": dict, "linears": list}.items():
        if not isinstance(description.get(key), kind):
            raise PackError(f"{file} is not readable: {key} is no {kind.__name__}; {AGAIN}")
    if not all(isinstance(name, str) and name and "/" not in name and "\0" not in name for name in description["linears"]):
        raise PackError(f"{file} is not readable: linears are {brief(description['linears'])}, expected names; {AGAIN}")
    return description


def _recipe(directory: Path, description: dict) -> Recipe:
    try:
        return Recipe.from_settings(description["recipe"])
    except RecipeError as error:
        raise PackError(f"{directory / RECIPE} is not readable: {error}; quantize again") from error


def _check_files(directory: Path, linears: list) -> None:
    """PackError unless the directory has a pack of each linear that recipe.json lists, and of no other."""
    wanted, found = {str(name) for name in linears}, {file.stem for file in directory.glob("*.npz")}
    if len(wanted) < len(linears):
        raise PackError(f"{directory / RECIPE} lists a linear twice; quantize again")
    for names, what in (
        (wanted - found, "has no pack for"),
        (found - wanted, f"holds packs that {RECIPE} does not list:"),
    ):
        if names:
            shown = listed(sorted(names), 3)
            raise PackError(f"{directory} {what} {shown}; copy the directory whole or quantize again")


def _check_float_weights(directory: Path, weights: dict[str, torch.Tensor], checkpoint) -> None:
    for name, tensor in weights.items():
        original = checkpoint.weights.get(name)
        if original is None or original.shape != tensor.shape:
            there = "does not have it" if original is None else f"has {list(original.shape)}"
            raise PackError(f"{directory / FLOAT_WEIGHTS}: {name} is {list(tensor.shape)}, but {checkpoint.path} {there}")
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise PackError(f"{directory / FLOAT_WEIGHTS}: {name} is {tensor.dtype} or not finite; quantize again")


def _check_value_transforms(directory: Path, transforms: dict[int, LinearTransform], checkpoint) -> None:
    gemma = checkpoint.config.llm
    channels = gemma.kv_heads * gemma.head_dim
    for layer, transform in transforms.items():
        scale, block = transform.input_scale, transform.block_size
        assert scale is not None, "_load_value_transforms reads one for each"
        good = (
            scale.dtype == np.float32
            and scale.shape == (channels,)
            and bool(np.isfinite(scale).all())
            and bool((scale > 0).all())
        )
        if not good or not 0 <= layer < gemma.depth or block < 1 or block & (block - 1) or channels % block:
            raise PackError(
                f"{directory / VALUE_SCALES}: layer {layer} has {scale.dtype} {list(scale.shape)} in blocks of {block}; "
                f"expected positive float32 [{channels}] for layers 0 to {gemma.depth - 1}; quantize again"
            )


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
    return present(directory / RECIPE, PackError)


def _shape(checkpoint, name: str) -> tuple[int, int]:
    weight = checkpoint.weights.get(f"{name}.weight")
    if weight is None:
        raise PackError(f"there is a pack for {name}, which {checkpoint.path} does not have")
    return tuple(weight.shape)


def _save_value_transforms(quantization: Quantization, directory: Path) -> None:
    """They are all a scale and a Hadamard of a block size that the layers share."""
    transforms = quantization.value_transforms
    scales = {str(layer): each.input_scale for layer, each in transforms.items() if each.input_scale is not None}
    block_size = max((transform.block_size for transform in transforms.values()), default=0)
    save_numpy(scales, directory / VALUE_SCALES, {"block_size": str(block_size)})


def _load_value_transforms(directory: Path) -> dict[int, LinearTransform]:
    with safe_open(directory / VALUE_SCALES, "np") as file:
        block_size = int((file.metadata() or {})["block_size"])
        scales = {int(layer): file.get_tensor(layer) for layer in file.keys()}
    return {
        layer: LinearTransform(input_scale=scales[layer], rotation="hadamard", block_size=block_size)
        for layer in sorted(scales)
    }
