"""The quantizer: a checkpoint, a recipe and calibration observations become packs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from duq.compiler.model import Pi0
from duq.compiler.quant.auto_bits import spend_bits
from duq.compiler.quant.calibrate import InputStatistics, calibrate
from duq.compiler.quant.fake import quantized_product
from duq.compiler.quant.folding import change_output, fold, input_transform, repeat_for_queries, value_transform
from duq.compiler.quant.linears import input_group, linear, select_linears
from duq.compiler.quant.pack import LinearPack, pack_weight
from duq.compiler.quant.recipe import Recipe
from duq.compiler.quant.rounding import error_feedback, round_compensated, round_weights, search_scales
from duq.compiler.quant.transforms import LinearTransform, block_size_for, weight_rotation
from duq.runtime.config import ModelConfig
from duq.runtime.preprocess import ModelInputs


@dataclass
class Quantization:
    """What quantization changes of a policy; everything else stays as the checkpoint has it.

    Attributes:
        packs: by canonical module name, in the order of execution.
        float_weights: canonical tensor name -> float32 tensor replacing the checkpoint's: linears that stay in float but
            absorb a factor of a neighbor's transform, and biases of packed linears which do.
        value_transforms: by layer, the change of basis that the outputs of v_proj of both Gemmas (and so the cached
            values) are in: v' = transform.transform_input(v). o_proj undoes it.
    """

    recipe: Recipe
    packs: dict[str, LinearPack] = field(default_factory=dict)
    float_weights: dict[str, Tensor] = field(default_factory=dict)
    value_transforms: dict[int, LinearTransform] = field(default_factory=dict)


@dataclass
class Placement:
    """Where the transforms go: ``full`` and ``online`` by consumer, ``outputs`` by the linear that absorbs them."""

    full: dict[str, LinearTransform] = field(default_factory=dict)
    online: dict[str, LinearTransform] = field(default_factory=dict)
    outputs: dict[str, LinearTransform] = field(default_factory=dict)
    values: dict[int, LinearTransform] = field(default_factory=dict)


def quantize(
    model: Pi0,
    checkpoint,
    recipe: Recipe,
    inputs: Sequence[ModelInputs],
    progress: Progress,
    transforms: Mapping[str, LinearTransform] | None = None,
) -> Quantization:
    """Calibrates ``model`` (the reference model of ``checkpoint``) on ``inputs`` and quantizes what the recipe selects.

    Everything is computed on the model's device; the result is in main memory.

    Args:
        transforms: for every selected linear the transform to use, from packs made elsewhere; by default the recipe's
            scheme makes them.
    Raises CalibrationError for unusable ``inputs``.
    """
    linears = select_linears(recipe, checkpoint.config)
    if not linears:
        return Quantization(recipe)
    statistics = calibrate(model, checkpoint.config, linears, inputs, recipe.calibration_steps, progress)

    def quantized(bits: Mapping[str, int]) -> Quantization:
        return quantize_weights(model.state_dict(), checkpoint.config, recipe, bits, statistics, progress, transforms)

    quantization = quantized(linears)
    return quantized(spend_bits(quantization.packs, recipe.auto_bits)) if recipe.auto_bits else quantization


def quantize_weights(
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    recipe: Recipe,
    linears: Mapping[str, int],
    statistics: Mapping[str, InputStatistics],
    progress: Progress,
    transforms: Mapping[str, LinearTransform] | None = None,
) -> Quantization:
    """Quantizes ``linears`` (canonical name -> weight bits), one at a time in float32.

    Args:
        weights: canonical tensor name -> tensor in any float type, on the device to compute on.
        statistics: by input group, as :func:`~compiler.quant.calibrate.calibrate` returns them, on that device.
    """

    def weight(name: str) -> Tensor:
        return weights[f"{name}.weight"].to(torch.float32)

    if transforms is None:
        placement = place_transforms(weight, config, recipe, linears, statistics, progress)
    else:  # packs made elsewhere are taken as they are
        placement = Placement(full=dict(transforms), online=dict(transforms))
    quantization = Quantization(recipe, value_transforms=placement.values)
    task = progress.add_task("Quantizing", total=sum(weights[f"{name}.weight"].numel() for name in linears))
    for (group, _), members in groupby(linears, lambda name: (input_group(name), id(placement.full[name]))):
        names = list(members)
        rows = sample_rows(placement.full[names[0]], statistics[group], recipe, ", ".join(names))
        for name in names:
            edited = in_output_basis(weight(name), placement.outputs.get(name))
            quantization.packs[name] = quantize_linear(
                name, edited, placement.full[name], placement.online[name], rows, linears[name], recipe
            )
            progress.advance(task, edited.numel())
    quantization.float_weights = float_edits(weights, linears, placement)
    return quantization


def place_transforms(weight, config, recipe, linears, statistics, progress) -> Placement:
    """Makes one transform for each input and sends its factors where they cost least (see compiler/quant/folding.py)."""
    placement = Placement()
    groups: dict[str, list[str]] = {}
    for name in linears:
        # The original scheme shares nothing between linears.
        groups.setdefault(name if recipe.scheme == "reference" else input_group(name), []).append(name)
    task = progress.add_task("Choosing transforms", total=len(groups))
    for members in groups.values():
        progress.advance(task)
        if recipe.scheme == "balanced" and linear(members[0]).leaf == "o_proj":
            continue  # below: its factors concern both Gemmas
        transform = input_transform(recipe, statistics[input_group(members[0])], [weight(name) for name in members])
        for name in members:
            placement.full[name] = placement.online[name] = transform
            if recipe.scheme != "reference":
                placement.online[name], outputs = fold(name, transform)
                placement.outputs |= outputs
    if recipe.scheme == "balanced":
        for layer in range(config.llm.depth):
            _place_value_transform(placement, layer, weight, config, linears, statistics)
    return placement


def _place_value_transform(placement, layer, weight, config, linears, statistics) -> None:
    readers = {f"{stack}.layers.{layer}.self_attn.o_proj": gemma for stack, gemma in _gemmas(config)}
    quantized = [(statistics[name], weight(name)) for name in readers if name in linears]
    if not quantized:
        return
    heads = config.llm.kv_heads, config.llm.head_dim
    transform = placement.values[layer] = value_transform(quantized, *heads)
    for name, gemma in readers.items():
        placement.outputs[linear(name).sibling("v_proj")] = transform
        placement.full[name] = repeat_for_queries(transform, *heads, gemma.heads)
        placement.online[name] = LinearTransform()


@dataclass(frozen=True)
class SampleRows:
    """What linears with one input and one transform share: rows x', and what follows from them.

    Attributes:
        fitting: [<= 768, K], to fit scales and weights to. held_out: [<= 256, K], to measure on.
        energy: mean square of x' per channel, float32 [K].
        feedback: of `error_feedback`; empty without compensation.
    """

    fitting: Tensor
    held_out: Tensor
    energy: Tensor
    feedback: list[Tensor]


def sample_rows(transform: LinearTransform, statistics: InputStatistics, recipe: Recipe, name: str) -> SampleRows:
    """Of the inputs that `statistics` saw; name: of the linears, for warnings."""
    fitting, held_out = (transform.transform_input(x) for x in (statistics.fitting_rows, statistics.held_out_rows))
    feedback = error_feedback(fitting, recipe.damping, name) if recipe.compensate else []
    return SampleRows(fitting, held_out, fitting.square().mean(0), feedback)


def quantize_linear(
    name: str,
    weight: Tensor,
    full: LinearTransform,
    online: LinearTransform,
    rows: SampleRows,
    bits: int,
    recipe: Recipe,
) -> LinearPack:
    """One pack from W [N, K] float32.

    ``full`` leads from the linear's inputs to x', of which there are ``rows``; ``online`` is what of it remains to be done
    at run time, when the linears before have absorbed their part.
    """
    if recipe.row_rotation == "restore" and full.output_rotation is None:
        output_rotation = weight_rotation(weight.T, block_size_for(len(weight), recipe.block_size))
        full, online = replace(full, output_rotation=output_rotation), replace(online, output_rotation=output_rotation)
    weight = full.transform_weight(weight)
    scale = search_scales(weight, rows.energy, bits)
    if recipe.compensate:
        integers = round_compensated(weight, scale, rows.feedback, bits)
    else:
        integers = round_weights(weight, scale, bits)
    pack = LinearPack(
        name=name,
        weight_q=pack_weight(integers.cpu().numpy(), bits),
        weight_bits=bits,
        weight_scale=scale.cpu().numpy(),
        activation_bits=recipe.activation_bits,
        activation_scale=static_activation_scale(rows.fitting, recipe),
        **online.parts(),
    )
    pack.sqnr_db = sqnr_db(rows.held_out @ weight.T, quantized_product(rows.held_out, pack, integers))
    return pack


def static_activation_scale(x: Tensor, recipe: Recipe) -> np.ndarray | None:
    """The calibrated activation scale for rows x' [M, K]: a scalar, [K] for ``per-channel``, None for dynamic ones."""
    if recipe.activation_bits == 0 or recipe.activation_scale == "per-token":
        return None
    magnitudes = x.abs() if recipe.activation_scale == "per-channel" else x.abs().flatten()
    rank = max(1, round(recipe.activation_percentile / 100 * len(magnitudes)))
    return (magnitudes.kthvalue(rank, dim=0).values.clamp_min(1e-6) / 127).cpu().numpy()


def sqnr_db(signal: Tensor, quantized: Tensor) -> float:
    """10 log10(|signal|^2 / |signal - quantized|^2)."""
    power, noise = (float(t.square().sum(dtype=torch.float64)) for t in (signal, signal - quantized))
    return float(10 * np.log10(max(power, 1e-300) / max(noise, 1e-300)))


def float_edits(weights, linears, placement: Placement) -> dict[str, Tensor]:
    """:attr:`Quantization.float_weights`: what absorbs a factor, or undoes one, and is not packed."""
    edits = {}
    for name in (*placement.outputs, *placement.full):
        for kind in ("weight", "bias"):
            key = f"{name}.{kind}"
            if key not in weights or (kind == "weight" and name in linears):
                continue
            tensor = in_output_basis(weights[key].to(torch.float32), placement.outputs.get(name))
            if kind == "weight" and name in placement.full:
                tensor = placement.full[name].transform_weight(tensor)
            if kind == "weight" or name in placement.outputs:
                edits[key] = tensor.cpu()
    return edits


def in_output_basis(tensor: Tensor, output: LinearTransform | None) -> Tensor:
    """A weight [N, K] or bias [N] with the factors its linear absorbs into its output."""
    return tensor if output is None else change_output(output, tensor)


def _gemmas(config: ModelConfig):
    return ("llm", config.llm), ("expert", config.expert)
