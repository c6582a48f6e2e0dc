"""Which transform every linear gets, and which factors of it the linears before it absorb.

The input of ``down_proj`` and of ``o_proj`` comes out of other linears, through operations that let some factors pass:

    gelu(gate) * up         a scale of its channels passes into the rows of up, a permutation into those of gate and up
    softmax(q k^T) v        any matrix applied to each head of v passes into the rows of v, since attention mixes tokens
                            and never channels

What passes costs nothing online; the rest of a transform stays with the linear's pack. SigLIP's fc2 reads gelu(fc1),
which lets nothing but a permutation pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from duq.compiler.quant.calibrate import InputStatistics
from duq.compiler.quant.linears import linear
from duq.compiler.quant.recipe import Recipe
from duq.compiler.quant.transforms import (
    LinearTransform,
    balance,
    block_size_for,
    greedy_rotation,
    interleaving_permutation,
    weight_rotation,
    zigzag_permutation,
)

Weights = Callable[[str], Tensor]  # canonical module name -> float32 weight [N, K]


def input_transform(recipe: Recipe, statistics: InputStatistics, weights: list[Tensor]) -> LinearTransform:
    """The transform of one input that the linears with these weights [N_i, K] share."""
    channels = weights[0].shape[1]
    block = block_size_for(channels, recipe.block_size)
    if recipe.scheme == "balanced":
        factors = balance(statistics.rms, _channel_rms(weights))
        return LinearTransform(
            input_scale=factors.reciprocal().cpu().numpy(),
            permutation=zigzag_permutation(statistics.rms / factors, block) if recipe.permute else None,
            rotation="hadamard",
            block_size=block,
        )
    if recipe.scheme == "duquant":
        permutation = zigzag_permutation(statistics.absmax, block) if recipe.permute else np.arange(channels)
        rotation = greedy_rotation(statistics.fitting_rows[:, permutation], block)
    else:
        energy = _channel_rms(weights)
        permutation = interleaving_permutation(energy) if recipe.permute else np.arange(channels)
        rotation = weight_rotation(torch.cat(weights)[:, permutation], block)
    return LinearTransform(permutation=permutation if recipe.permute else None, rotation=rotation, block_size=block)


def value_transform(inputs: list[tuple[InputStatistics, Tensor]], kv_heads: int, head_dim: int) -> LinearTransform:
    """Balance factors and one Hadamard within a head, for the output of v_proj.

    The language model's values are read by its own o_proj and, through the expert's attention, by the expert's. Hence
    one transform for both, from all o_proj that are quantized: ``inputs`` are the statistics and weight of each.
    """
    logs = []
    for statistics, weight in inputs:  # query heads that share a key and value head lie side by side
        per_head = [rms.view(kv_heads, -1, head_dim) for rms in (statistics.rms, _channel_rms([weight]))]
        input_rms, weight_rms = (rms.square().mean(1).sqrt().flatten() for rms in per_head)
        logs.append(balance(input_rms, weight_rms).log())
    factors = torch.stack(logs).mean(0).exp()
    return LinearTransform(
        input_scale=factors.reciprocal().cpu().numpy(), rotation="hadamard", block_size=block_size_for(head_dim, head_dim)
    )


def repeat_for_queries(transform: LinearTransform, kv_heads: int, head_dim: int, heads: int) -> LinearTransform:
    """A value transform as o_proj's input sees it: every query head carries the channels of its value head."""
    assert transform.input_scale is not None, "value_transform makes one"
    scale = transform.input_scale.reshape(kv_heads, 1, head_dim).repeat(heads // kv_heads, axis=1).reshape(-1)
    return replace(transform, input_scale=scale)


def fold(name: str, transform: LinearTransform) -> tuple[LinearTransform, dict[str, LinearTransform]]:
    """Splits the input transform of linear ``name`` into what stays online and what the outputs of others absorb.

    Returns the online part and, by the name of each absorbing linear, the change of its output's basis.
    """
    scale, permutation, own = transform.input_scale, transform.permutation, linear(name)
    if own.leaf == "down_proj":
        absorbed = {"up_proj": (scale, permutation), "gate_proj": (None, permutation)}
        online = replace(transform, input_scale=None, permutation=None)
    elif own.leaf == "fc2":
        absorbed = {"fc1": (None, permutation)}
        # The scale stays, and comes after the permutation now.
        reordered = scale if scale is None or permutation is None else scale[permutation]
        online = replace(transform, input_scale=reordered, permutation=None)
    elif own.leaf == "out_proj":  # every head of SigLIP has values of its own
        absorbed, online = {"v_proj": (scale, None)}, replace(transform, input_scale=None)
    else:
        absorbed, online = {}, transform
    return online, {
        own.sibling(leaf): LinearTransform(input_scale=s, permutation=p)
        for leaf, (s, p) in absorbed.items()
        if s is not None or p is not None
    }


def change_output(transform: LinearTransform, tensor: Tensor) -> Tensor:
    """The weight [N, K] or bias [N] of a linear whose output is to be ``transform.transform_input(y)``."""
    return transform.transform_input(tensor.movedim(0, -1)).movedim(-1, 0).contiguous()


def _channel_rms(weights: list[Tensor]) -> Tensor:
    """Root mean square per input channel over the rows of all ``weights``, float64 [K]."""
    rows = sum(len(weight) for weight in weights)
    squares = functools.reduce(torch.add, (weight.square().sum(0, dtype=torch.float64) for weight in weights))
    return (squares / rows).sqrt()
