"""openpi's JAX parameters -> canonical weights, layer by layer, with LoRA merged.

In JAX the layers of a stack are one array with a first axis, kernels are [in, out], and attention has an axis for heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from duq.compiler.checkpoint.orbax import OrbaxArray, array_files, open_arrays
from duq.compiler.checkpoint.ranges import checked
from duq.compiler.checkpoint.scratch import Scratch
from duq.compiler.checkpoint.shapes import listing
from duq.compiler.checkpoint.stored import Progress, Stored
from duq.compiler.errors import CheckpointError
from duq.compiler.parallel import in_order, thread_pool
from duq.runtime.config import ModelConfig
from duq.runtime.reading import reading

ROWS = 1 << 14  # of an array without layers that are read at a time
IN_FLIGHT = 1 << 29  # bytes that threads have read ahead
STACKS = {"": "llm", "_1": "expert"}  # suffix of the names in JAX -> stack
PUBLISHED_RANKS = {"llm": 16, "expert": 32}  # of openpi's gemma_2b_lora and gemma_300m_lora, whose alpha is their rank


@dataclass(frozen=True)
class Rule:
    """How one array becomes tensors: convert(array, or its part for one layer) -> one tensor for each target."""

    targets: tuple[str, ...]  # canonical names; "{}" is the layer
    rank: int  # axes of what `convert` takes
    convert: Callable[[Tensor], tuple[Tensor, ...]]
    by: str = "layer"  # how it is read: by "layer", by "row" (first axis is that of the target as well), or "whole"


@dataclass(frozen=True)
class Part:
    """A task of reading: some of an array, what is merged into it, and where the results go."""

    array: OrbaxArray
    rule: Rule
    index: int | slice
    adapter: tuple[OrbaxArray, OrbaxArray] | None

    @property
    def nbytes(self) -> int:
        elements = torch.empty(self.array.shape, device="meta")[self.index].numel()
        return elements * (4 if self.adapter else self.array.dtype.itemsize)

    def targets(self) -> list[str]:
        return [target.format(self.index) for target in self.rule.targets]


def _as_is(x: Tensor) -> tuple[Tensor]:
    return (x,)


def _transposed(x: Tensor) -> tuple[Tensor]:
    return (x.T,)


def _rules() -> dict[str, Rule]:
    rules = {}
    image, block, layer = "PaliGemma/img/", "PaliGemma/img/Transformer/encoderblock/", "vision.encoder.layers.{}."
    patch = "vision.embeddings.patch_embedding"
    rules[image + "embedding/kernel"] = Rule((f"{patch}.weight",), 4, lambda x: (x.permute(3, 2, 0, 1),), "whole")
    rules[image + "embedding/bias"] = Rule((f"{patch}.bias",), 1, _as_is, "whole")
    position = ("vision.embeddings.position_embedding.weight",)
    rules[image + "pos_embedding"] = Rule(position, 3, lambda x: (x.flatten(0, 1),), "whole")
    for here, there in (("LayerNorm_0", "layer_norm1"), ("LayerNorm_1", "layer_norm2")):
        rules[f"{block}{here}/scale"] = Rule((f"{layer}{there}.weight",), 1, _as_is)
        rules[f"{block}{here}/bias"] = Rule((f"{layer}{there}.bias",), 1, _as_is)
    for here, there in (("MlpBlock_0/Dense_0", "mlp.fc1"), ("MlpBlock_0/Dense_1", "mlp.fc2")):
        rules[f"{block}{here}/kernel"] = Rule((f"{layer}{there}.weight",), 2, _transposed)
        rules[f"{block}{here}/bias"] = Rule((f"{layer}{there}.bias",), 1, _as_is)
    attention = block + "MultiHeadDotProductAttention_0/"
    for here, there in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        rules[f"{attention}{here}/kernel"] = Rule((f"{layer}self_attn.{there}.weight",), 3, lambda x: (x.flatten(1).T,))
        rules[f"{attention}{here}/bias"] = Rule((f"{layer}self_attn.{there}.bias",), 2, lambda x: (x.flatten(),))
    rules[attention + "out/kernel"] = Rule((f"{layer}self_attn.out_proj.weight",), 3, lambda x: (x.flatten(0, 1).T,))
    rules[attention + "out/bias"] = Rule((f"{layer}self_attn.out_proj.bias",), 1, _as_is)
    rules[image + "Transformer/encoder_norm/scale"] = Rule(("vision.post_layernorm.weight",), 1, _as_is, "whole")
    rules[image + "Transformer/encoder_norm/bias"] = Rule(("vision.post_layernorm.bias",), 1, _as_is, "whole")
    rules["PaliGemma/llm/embedder/input_embedding"] = Rule(("llm.embed_tokens.weight",), 2, _as_is, "row")
    for suffix, stack in STACKS.items():
        rules |= _gemma_rules(suffix, stack)
    heads = ("action_in_proj", "action_out_proj", "state_proj", "time_mlp_in", "time_mlp_out")
    named = {head: head for head in (*heads, "action_time_mlp_in", "action_time_mlp_out")} | {image + "head": "projector"}
    for here, there in named.items():
        rules[f"{here}/kernel"] = Rule((f"{there}.weight",), 2, _transposed, "whole")
        rules[f"{here}/bias"] = Rule((f"{there}.bias",), 1, _as_is, "whole")
    return rules


def _gemma_rules(suffix: str, stack: str) -> dict[str, Rule]:
    here, layer = "PaliGemma/llm/layers/", stack + ".layers.{}."
    attention, mlp = f"{layer}self_attn.", f"{layer}mlp."

    def projection(x: Tensor) -> Tensor:  # [heads, in, head_dim]
        return x.transpose(1, 2).flatten(0, 1)

    rules = {
        f"{here}attn/q_einsum{suffix}/w": Rule((f"{attention}q_proj.weight",), 3, lambda x: (projection(x),)),
        f"{here}attn/kv_einsum{suffix}/w": Rule(
            (f"{attention}k_proj.weight", f"{attention}v_proj.weight"), 4, lambda x: tuple(map(projection, x.unbind()))
        ),
        f"{here}attn/attn_vec_einsum{suffix}/w": Rule((f"{attention}o_proj.weight",), 3, lambda x: (x.flatten(0, 1).T,)),
        f"{here}mlp{suffix}/gating_einsum": Rule(
            (f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"), 3, lambda x: tuple(part.T for part in x.unbind())
        ),
        f"{here}mlp{suffix}/linear": Rule((f"{mlp}down_proj.weight",), 2, _transposed),
    }
    norms = (
        (f"{here}pre_attention_norm{suffix}", f"{layer}input_layernorm", "layer"),
        (f"{here}pre_ffw_norm{suffix}", f"{layer}post_attention_layernorm", "layer"),
        (f"PaliGemma/llm/final_norm{suffix}", f"{stack}.norm", "whole"),
    )
    for name, target, by in norms:
        rules[f"{name}/scale"] = Rule((f"{target}.weight",), 1, _as_is, by)
        rules[f"{name}/Dense_0/kernel"] = Rule((f"{target}.dense.weight",), 2, _transposed, by)
        rules[f"{name}/Dense_0/bias"] = Rule((f"{target}.dense.bias",), 1, _as_is, by)
    return rules


RULES = _rules()


def merge_lora(name: str, base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The weight that computes what openpi's einsum `name` computes with its LoRA, float32.

    `base` [..., in, out], `a` [..., in, rank], `b` [..., rank, out], of one layer. The output projection sums over heads
    between the two, so that every head of `a` meets the sum of `b`. openpi scales the attention's by alpha / rank, which is
    1 in its variants and stored nowhere, and the MLP's not at all.
    """
    b = b.float()
    return base.float() + a.float() @ (b.sum(0, keepdim=True) if "attn_vec_einsum" in name else b)


def open_jax(params: Path, folder: Path) -> Stored:
    """Opens openpi's parameters in `params`; `folder` holds what belongs to them.

    Raises CheckpointError: incomplete files, arrays that pi0 and pi0.5 do not have (all listed), LoRA that does not fit.
    """
    arrays = open_arrays(params)
    try:
        with reading("its arrays", CheckpointError):
            parts, adapters = _plan(arrays)
    except CheckpointError as error:
        raise CheckpointError(f"{params}: {error}") from error
    ranks = {
        stack: sorted({_rank(pair) for name, pair in adapters.items() if _stack(name) == stack})
        for stack in STACKS.values()
    }
    query = arrays.get("PaliGemma/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel")
    layout = _layout(parts)
    return Stored(
        folder=folder,
        form=f"openpi JAX (Orbax), {_dtypes(arrays)}{_lora_form(ranks)}",
        layout="openpi",
        origin="jax",
        files=array_files(params),
        tensors=layout,
        make=lambda progress: _convert(params, parts, layout, progress),
        notes=_lora_notes(ranks),
        vision_heads=query.shape[2] if query else None,
        check=lambda config: _check_heads(config, arrays),
    )


def _plan(arrays: dict[str, OrbaxArray]) -> tuple[list[Part], dict[str, tuple[OrbaxArray, OrbaxArray]]]:
    """The reading to be done, and the LoRA of each array that has one."""
    _check_policy(arrays)
    adapters = {name: pair for name in RULES if name in arrays and (pair := _adapter(arrays, name))}
    known = {*RULES, *(part.name for pair in adapters.values() for part in pair)}
    faults = [
        f"{name} {list(array.shape)}: pi0 and pi0.5 have no such array"
        for name, array in arrays.items()
        if name not in known
    ]
    parts = []
    for name, rule in RULES.items():
        if name in arrays:
            try:
                parts += _parts(arrays[name], rule, adapters.get(name))
            except CheckpointError as error:
                faults.append(str(error))
    if faults:
        raise CheckpointError(f"{len(faults)} arrays do not fit the policy:\n{listing(faults)}")
    return parts, adapters


def _check_policy(arrays: dict[str, OrbaxArray]) -> None:
    """Raises CheckpointError that says which other model the arrays are."""
    if any(name.startswith("action_in_proj") for name in arrays):
        return
    if any(name.startswith("PaliGemma/llm") for name in arrays):
        raise CheckpointError(
            "this is pi0-FAST (or PaliGemma alone): it has no action expert, and only pi0 and pi0.5 can be compiled"
        )
    if any(name.startswith(("llm/", "img/")) for name in arrays):
        raise CheckpointError("this is PaliGemma itself, not a policy trained from it; only pi0 and pi0.5 can be compiled")


def _adapter(arrays: dict[str, OrbaxArray], name: str) -> tuple[OrbaxArray, OrbaxArray] | None:
    stem = name.removesuffix("w") + "lora_" if name.endswith("/w") else f"{name}_lora_"
    pair = [arrays.get(stem + letter) for letter in "ab"]
    if pair == [None, None]:
        return None
    a, b = pair
    base = arrays[name].shape
    if a is None or b is None or a.shape[:-1] != base[:-1] or b.shape != (*base[:-2], a.shape[-1], base[-1]):
        found = " and ".join("none" if part is None else str(list(part.shape)) for part in pair)
        raise CheckpointError(f"LoRA of {name} {list(base)}: lora_a and lora_b do not fit it, they are {found}")
    return a, b


def _parts(array: OrbaxArray, rule: Rule, adapter: tuple[OrbaxArray, OrbaxArray] | None) -> list[Part]:
    axes = rule.rank + (rule.by == "layer")
    example = torch.empty(array.shape, device="meta")
    if example.ndim != axes:
        raise CheckpointError(f"{array.name} has shape {list(array.shape)}, expected {axes} axes")
    if len(rule.convert(example[0] if rule.by == "layer" else example)) != len(rule.targets):
        raise CheckpointError(f"{array.name} has shape {list(array.shape)}, expected {len(rule.targets)} parts")
    if rule.by == "layer":
        checked(len(example), "layers", f"{array.name}: the number of layers")
        return [Part(array, rule, layer, adapter) for layer in range(len(example))]
    rows = len(example)
    step = ROWS if rule.by == "row" else rows
    return [Part(array, rule, slice(start, min(start + step, rows)), adapter) for start in range(0, rows, step)]


def _check_heads(config: ModelConfig, arrays: dict[str, OrbaxArray]) -> None:
    """Once converted, tensors do not tell heads of one size from more heads of another; the arrays do."""
    for suffix, stack in STACKS.items():
        gemma = getattr(config, stack)
        _, _, kv_heads, _, head_dim = arrays[f"PaliGemma/llm/layers/attn/kv_einsum{suffix}/w"].shape
        heads = arrays[f"PaliGemma/llm/layers/attn/q_einsum{suffix}/w"].shape[1]
        if (heads, kv_heads, head_dim) != (gemma.heads, gemma.kv_heads, gemma.head_dim):
            raise CheckpointError(
                f"the {stack} has {heads} heads and {kv_heads} key/value heads of {head_dim}; duq knows heads of 256 (and "
                f"openpi's dummy), so it would compute with {gemma.heads} and {gemma.kv_heads} of {gemma.head_dim}"
            )


def _layout(parts: list[Part]) -> dict[str, Tensor]:
    layout: dict[str, Tensor] = {}
    for part in parts:
        dtype = torch.float32 if part.adapter else part.array.dtype
        example = torch.empty(part.array.shape, dtype=dtype, device="meta")
        example = example[part.index] if part.rule.by == "layer" else example
        layout |= dict(zip(part.targets(), part.rule.convert(example), strict=True))
    return layout


def _convert(
    params: Path, parts: list[Part], layout: dict[str, Tensor], progress: Progress | None
) -> tuple[dict[str, Tensor], bool]:
    scratch = Scratch(layout)
    total, done = sum(part.nbytes for part in parts), 0

    def task(part: Part) -> Callable[[], int]:
        return lambda: _write(scratch, part)

    try:
        with thread_pool() as pool:
            for nbytes in in_order(pool, ((task(part), part.nbytes) for part in _cached(parts)), IN_FLIGHT):
                done += nbytes
                if progress:
                    progress(done, total)
    except CheckpointError as error:
        raise CheckpointError(f"{params}: {error}") from error
    return scratch.tensors(), scratch.finite


def _cached(parts: list[Part]) -> Iterator[Part]:
    """The same parts; those of one array after each other share the chunks that are decoded for them."""
    source = cached = None
    for part in parts:
        if cached is None or part.array is not source:
            rows = 1 if part.rule.by == "layer" else ROWS
            source, cached = part.array, part.array.caching(rows)
        yield replace(part, array=cached)


def _write(scratch: Scratch, part: Part) -> int:
    values = part.array.read(part.index)
    if part.adapter:
        values = merge_lora(part.array.name, values, *(half.read(part.index) for half in part.adapter))
    start = part.index.start * values[0].numel() if isinstance(part.index, slice) and part.rule.by == "row" else 0
    for target, tensor in zip(part.targets(), part.rule.convert(values), strict=True):
        scratch.write(target, tensor, start)
    return part.nbytes


def _stack(name: str) -> str:
    return "expert" if "_1" in name else "llm"


def _rank(pair: tuple[OrbaxArray, OrbaxArray]) -> int:
    return pair[0].shape[-1]


def _dtypes(arrays: dict[str, OrbaxArray]) -> str:
    return " and ".join(sorted({str(array.dtype).removeprefix("torch.") for array in arrays.values()}))


def _lora_form(ranks: dict[str, list[int]]) -> str:
    found = list(dict.fromkeys(str(rank) for stack in ranks.values() for rank in stack))
    return f", LoRA merged (rank {', '.join(found)})" if found else ""


def _lora_notes(ranks: dict[str, list[int]]) -> list[str]:
    return [
        f"LoRA of rank {rank} in the {stack}: the checkpoint does not store alpha; it was merged with alpha = rank, "
        f"as openpi's own variant (rank {PUBLISHED_RANKS[stack]}) has it"
        for stack, found in ranks.items()
        for rank in found
        if rank != PUBLISHED_RANKS[stack]
    ]
