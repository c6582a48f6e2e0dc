"""The linears of a policy that can be quantized, and how they hang together."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from duq.compiler.errors import RecipeError
from duq.compiler.quant.recipe import EVERY_LINEAR, NO_LINEAR, Recipe, openpi_module
from duq.runtime.config import ModelConfig

GEMMA_LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                 "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
_GROUPS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
VISION_LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")


def quantizable_linears(config: ModelConfig) -> list[str]:
    """Canonical names in the order of execution.

    Of the last prefix layer only the keys and values are ever read, so its other linears are not listed.
    """
    names = [f"vision.encoder.layers.{i}.{leaf}" for i in range(config.vision.depth) for leaf in VISION_LINEARS]
    names.append("projector")
    last = config.llm.depth - 1
    names += [
        f"llm.layers.{i}.{leaf}"
        for i in range(config.llm.depth)
        for leaf in (GEMMA_LINEARS if i < last else GEMMA_LINEARS[1:3])
    ]
    return names + [f"expert.layers.{i}.{leaf}" for i in range(config.expert.depth) for leaf in GEMMA_LINEARS]


def select_linears(recipe: Recipe, config: ModelConfig) -> dict[str, int]:
    """Canonical name -> weight bits (4 or 8) of the linears that the recipe quantizes."""
    bits = {name: recipe.bits(name) for name in quantizable_linears(config)}
    return {name: b for name, b in bits.items() if b < 16}


def check_selection(recipe: Recipe, config: ModelConfig) -> None:
    """RecipeError where the recipe selects none of the policy's linears, or gives bits to none, without saying so.

    A mistyped pattern would leave the policy in float, or at other bits. ``--quant none`` says so.
    """
    names = quantizable_linears(config)
    selection = replace(recipe, weight_bits=4, layer_bits=())
    if recipe.include != NO_LINEAR and not any(selection.bits(name) == 4 for name in names):
        raise RecipeError(
            f"the recipe selects none of the policy's linears (scope {recipe.scope!r}, include {recipe.include!r}, exclude "
            f"{recipe.exclude!r}), named like {names[-1]} or {openpi_module(names[-1])}; say --quant none for float"
        )
    every = Recipe(include=EVERY_LINEAR, weight_bits=16)
    for pattern, bits in recipe.layer_bits:
        if not any(replace(every, layer_bits=((pattern, 4),)).bits(name) == 4 for name in names):
            raise RecipeError(f"layer_bits {pattern}:{bits} is for none of the policy's linears, named like {names[-1]}")


class Linear(NamedTuple):
    """Where a linear is in the policy; the only place that takes canonical names apart.

    Attributes:
        stack: ``vision``, ``projector``, ``llm``, ``expert``.
        block: the module that it is part of, e.g. ``llm.layers.3.mlp``; "" at the top.
        leaf: its name in it, e.g. ``up_proj``.
    """

    stack: str
    block: str
    leaf: str

    def sibling(self, leaf: str) -> str:
        """The canonical name of another linear of the block."""
        return f"{self.block}.{leaf}" if self.block else leaf


def linear(name: str) -> Linear:
    block, _, leaf = name.rpartition(".")
    return Linear(name.partition(".")[0], block, leaf)


def input_group(name: str) -> str:
    """One key for all linears that read the same tensor: q, k, v share their input, and so do gate and up."""
    own = linear(name)
    return own.sibling(_GROUPS.get(own.leaf, own.leaf))
