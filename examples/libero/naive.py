"""Quantization as a beginner would do it, in PyTorch: what a benchmark has to tell from a good scheme."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from duq.runtime.config import ModelConfig

if TYPE_CHECKING:  # whoever evaluates plans alone needs no PyTorch
    from torch import Tensor, nn

BITS = re.compile(r"W([2-8])A([2-8])")


def bits_of(text: str) -> tuple[int, int] | None:
    """Bits of weights and of activations in "W4A8"; None where it says something else."""
    found = BITS.fullmatch(text)
    return (int(found[1]), int(found[2])) if found else None


def rounded(x: Tensor, bits: int) -> Tensor:
    """To the nearest of 2^bits - 1 values, symmetric, with one scale for the whole tensor."""
    most = 2 ** (bits - 1) - 1
    scale = x.abs().max().clamp_min(1e-12) / most
    return (x / scale).round() * scale


def quantize_naively(model: nn.Module, config: ModelConfig, weight_bits: int, activation_bits: int) -> nn.Module:
    """`model`, with the weights of every linear that duq can quantize, and what comes into it, rounded as above."""
    from duq.compiler.quant import load_recipe
    from duq.compiler.quant.linears import select_linears

    for name in select_linears(load_recipe("all", {}, environment={}), config):
        weight = model.get_parameter(f"{name}.weight")
        weight.data = rounded(weight.data, weight_bits)
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0], activation_bits),))
    return model
