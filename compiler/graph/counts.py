"""How often each pass must match, from a policy's dimensions and packs; the graphs are never looked at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch

from duq.compiler.graph.export import Graphs
from duq.compiler.quant.linears import GEMMA_LINEARS, VISION_LINEARS
from duq.compiler.quant.pack import LinearPack
from duq.runtime.solver import Solver

NORMS_OF_A_LAYER = 2
CACHED = ("self_attn.k_proj", "self_attn.v_proj")


class Input(NamedTuple):
    """A tensor that linears read when the policy runs: by what it is made, and the canonical names of its readers."""

    norm: Literal["rms", "layer", "adaptive", "none"]
    readers: tuple[str, ...]


def inputs(policy: Graphs) -> Iterator[Input]:
    """Of all linears that are left once only the needed tokens are computed, in both graphs.

    The last layer of the prefix, and of pi0's state token, ends at its keys and values. What comes before the residual
    stream of the expert is left out: it reads no norm, and no two of its linears read the same tensor.
    """
    config = policy.config
    for index in range(config.vision.depth):
        yield from _layer(f"vision.encoder.layers.{index}", VISION_LINEARS, "layer", qkv=3, mlp=1)
    yield Input("layer", ("projector",))
    yield from _gemma("llm", config.llm.depth, "rms", whole=False)
    if not config.pi05:
        yield from _gemma("expert", config.expert.depth, "rms", whole=False)
    yield from _gemma("expert", config.expert.depth, "adaptive" if config.pi05 else "rms", whole=True)
    yield Input("adaptive" if config.pi05 else "rms", ("action_out_proj",))


def _gemma(stack: str, depth: int, norm: Literal["rms", "adaptive"], whole: bool) -> Iterator[Input]:
    for index in range(depth if whole else depth - 1):
        yield from _layer(f"{stack}.layers.{index}", GEMMA_LINEARS, norm, qkv=3, mlp=2)
    if not whole:
        yield Input(norm, tuple(f"{stack}.layers.{depth - 1}.{leaf}" for leaf in CACHED))


def _layer(
    name: str, leaves: tuple[str, ...], norm: Literal["rms", "layer", "adaptive"], qkv: int, mlp: int
) -> Iterator[Input]:
    linears = tuple(f"{name}.{leaf}" for leaf in leaves)
    yield Input(norm, linears[:qkv])
    yield Input("none", linears[qkv : qkv + 1])
    yield Input(norm, linears[qkv + 1 : qkv + 1 + mlp])
    yield Input("none", linears[qkv + 1 + mlp :])


def once(policy: Graphs) -> int:
    return 1


def linears_and_gains(policy: Graphs) -> int:
    """Every linear of the exported model, and the gain of every norm that has one."""
    config = policy.config
    linears = len(VISION_LINEARS) * config.vision.depth + 1
    linears += len(GEMMA_LINEARS) * (config.llm.depth + config.expert.depth)
    of_expert = NORMS_OF_A_LAYER * config.expert.depth + 1
    head = 4 if config.pi05 else 5  # actions in and out, the two of the time, and pi0's state
    return linears + head + NORMS_OF_A_LAYER * config.llm.depth + 1 + of_expert  # an adaptive norm has a linear instead


def bfloat16_embeddings(policy: Graphs) -> int:
    return int(policy.weights["llm.embed_tokens.weight"].dtype == torch.bfloat16)


def masked_inputs(policy: Graphs) -> int:
    return 3  # images, prompt, prefix


def sums_over_masks(policy: Graphs) -> int:
    return 2  # the positions of the prefix, and the first position of the suffix


def masks_always_true(policy: Graphs) -> int:
    """The mask of each attention, but for pi0's suffix: its state token does not see the actions."""
    config = policy.config
    return config.llm.depth + (config.expert.depth if config.pi05 else 0)


def rotary_tables(policy: Graphs) -> int:
    return 4  # a cosine and a sine in each graph, which all layers share


def state_tokens(policy: Graphs) -> int:
    return 0 if policy.config.pi05 else 1


def quantized_linears(policy: Graphs) -> int:
    """Each pack's linear; pi0's state token runs the expert's in the prefix as well, of the last layer k and v only."""
    last = policy.config.expert.depth - 1
    again = 0 if policy.config.pi05 else sum(name in policy.packs for name in _of_state_token(last))
    return len(policy.packs) + again


def _of_state_token(last: int) -> list[str]:
    layers = [(index, GEMMA_LINEARS if index < last else CACHED) for index in range(last + 1)]
    return [f"expert.layers.{index}.{leaf}" for index, leaves in layers for leaf in leaves]


def time_and_action_linears(policy: Graphs) -> int:
    return 0 if policy.config.pi05 else 1  # action_time_mlp_in


def linear_chains(policy: Graphs) -> int:
    return 0 if policy.config.pi05 else 1  # action_in_proj and the action half of action_time_mlp_in


def time_tables(policy: Graphs) -> int:
    """pi0: the time half of action_time_mlp_in. pi0.5: scale, shift, gate of each adaptive norm; the last has no gate."""
    depth = policy.config.expert.depth
    return 3 * NORMS_OF_A_LAYER * depth + 2 if policy.config.pi05 else 1


def steps_with_history(policy: Graphs) -> int:
    return int(Solver(policy.solver, policy.num_steps).history > 0)


def norms_with_folds(policy: Graphs) -> int:
    """RMS norms before float linears lose their gain; norms before one quantizer with a scale take that scale."""
    count = 0
    for norm, readers in inputs(policy):
        packs = [policy.packs[name] for name in readers if name in policy.packs]
        if norm == "rms" and not packs:
            count += 1
        elif norm != "none" and len(packs) == len(readers):
            count += packs[0].input_scale is not None and all(_equal(p.input_scale, packs[0].input_scale) for p in packs)
    return count


def float_groups(policy: Graphs) -> int:
    """Tensors that more than one float linear reads."""
    return sum(sum(name not in policy.packs for name in readers) > 1 for _, readers in inputs(policy))


def quantized_groups(policy: Graphs) -> int:
    """Groups of quantized linears with one input, one prologue and one form."""
    count = 0
    for _, readers in inputs(policy):
        forms = Counter(_form(policy, name) for name in readers if name in policy.packs)
        count += sum(members > 1 for members in forms.values())
    return count


def _form(policy: Graphs, name: str) -> tuple:
    pack = policy.packs[name]
    block = 0 if pack.output_rotation is None else pack.output_rotation.shape[-1]
    return pack.weight_bits, pack.activation_bits, f"{name}.bias" in policy.weights, block, *map(_bytes, _prologue(pack))


def _prologue(pack: LinearPack) -> list:
    return [pack.input_scale, pack.permutation, pack.rotation, pack.block_size, pack.activation_scale]


def _bytes(value: np.ndarray | str | int | None) -> bytes | str | int | None:
    return value.tobytes() if isinstance(value, np.ndarray) else value


def _equal(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is not None and b is not None and np.array_equal(a, b)


def rotary_embeddings(policy: Graphs) -> int:
    """Of queries and keys in each layer; the last layer of the prefix, and of pi0's state token, has keys only."""
    depth = policy.config.llm.depth
    return 2 * depth + (2 * depth - 1) * (1 if policy.config.pi05 else 2)
