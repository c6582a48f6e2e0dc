"""Writes made weights as openpi's JAX trainer does: zarr arrays in an OCDBT database that Orbax reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from duq.compiler.checkpoint.jax import ROWS, RULES, Rule
from duq.compiler.checkpoint.synthetic.statistics import Distribution
from duq.compiler.errors import CheckpointError
from duq.compiler.parallel import in_order, thread_pool
from duq.runtime.config import ModelConfig

IN_FLIGHT = 1 << 29  # bytes that threads are ahead


def write_orbax(
    params: Path,
    described: dict[str, Distribution],
    config: ModelConfig,
    seed: int,
    dtype: torch.dtype,
    advance: Callable[[int], None],
) -> None:
    """Creates the folder `params`; a layer of an array is a chunk, and is in memory by itself.

    `advance(bytes)` is called as arrays grow. Raises CheckpointError when tensorstore is not installed.
    """
    try:
        import tensorstore
    except ImportError as error:
        raise CheckpointError("writing Orbax's form needs tensorstore: pip install '.[jax]'") from error
    params.mkdir(parents=True)
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 1 << 26}})
    keys = {name: ["params", *name.split("/"), "value"] for name, rule in RULES.items() if _source(rule, 0) in described}

    def tasks() -> Iterator[tuple[Callable[[], int], int]]:
        for name in keys:
            rule, layers = RULES[name], _layers(RULES[name], described)
            example = _inverse(name, [_meta(described[part]) for part in _sources(rule, 0)], config)
            shape = (layers, *example.shape) if rule.by == "layer" else tuple(example.shape)
            chunk = (1 if rule.by == "layer" else min(ROWS, shape[0]), *shape[1:])
            store = tensorstore.open(_spec(params, keys[name], shape, chunk, dtype), context=context).result()
            for index in range(layers):
                if rule.by == "row":
                    yield _row_writer(store, described[rule.targets[0]], seed, rule.targets[0], dtype), example.nbytes
                else:
                    yield _writer(store, name, index, described, config, seed, dtype), 3 * example.nbytes

    with thread_pool() as pool:
        for written in in_order(pool, tasks(), IN_FLIGHT):
            advance(written)
    (params / "_METADATA").write_text(json.dumps(_metadata(keys)), encoding="utf-8")
    (params / "_CHECKPOINT_METADATA").write_text(json.dumps({"item_handlers": None, "metrics": {}}), encoding="utf-8")


def _inverse(name: str, tensors: list[Tensor], config: ModelConfig) -> Tensor:
    """The array (of one layer) that the policy's `tensors` come from."""
    gemma = config.expert if "_1" in name else config.llm
    first = tensors[0]
    if name.endswith("embedding/kernel"):
        return first.permute(2, 3, 1, 0)
    if name.endswith("pos_embedding"):
        return first[None]
    if "MultiHeadDotProductAttention" in name:
        heads = config.vision.heads
        if name.endswith("out/kernel"):
            return first.T.unflatten(0, (heads, -1))
        if not name.endswith("out/bias"):
            return (first.T if name.endswith("kernel") else first).unflatten(-1, (heads, -1))
    if "q_einsum" in name:
        return first.unflatten(0, (gemma.heads, -1)).transpose(1, 2)
    if "kv_einsum" in name:
        return torch.stack([tensor.unflatten(0, (gemma.kv_heads, -1)).transpose(1, 2) for tensor in tensors])
    if "attn_vec_einsum" in name:
        return first.T.unflatten(0, (gemma.heads, -1))
    if name.endswith("gating_einsum"):
        return torch.stack([tensor.T for tensor in tensors])
    return first.T if name.endswith(("/kernel", "/linear")) else first


def _writer(
    store, name: str, index: int, described: dict[str, Distribution], config: ModelConfig, seed: int, dtype: torch.dtype
):
    rule = RULES[name]

    def write() -> int:
        parts = [_drawn(described[part], seed, part) for part in _sources(rule, index)]
        return _put(store, index if rule.by == "layer" else ..., _inverse(name, parts, config), dtype)

    return write


def _row_writer(store, distribution: Distribution, seed: int, name: str, dtype: torch.dtype):
    def write() -> int:
        start, written, pending = 0, 0, []
        for block in distribution.blocks(seed, name):
            pending.append(torch.from_numpy(block))
            if (rows := sum(map(len, pending))) >= ROWS:
                written += _put(store, slice(start, start + rows), torch.cat(pending), dtype)
                start, pending = start + rows, []
        if pending:
            written += _put(store, slice(start, start + sum(map(len, pending))), torch.cat(pending), dtype)
        return written

    return write


def _put(store, index, values: Tensor, dtype: torch.dtype) -> int:
    values = values.to(dtype).contiguous()
    array = values.view(torch.uint16).numpy().view(store.dtype.numpy_dtype) if dtype == torch.bfloat16 else values.numpy()
    store[index].write(array).result()
    return values.nbytes


def _drawn(distribution: Distribution, seed: int, name: str) -> Tensor:
    return torch.from_numpy(np.concatenate(list(distribution.blocks(seed, name)))).view(distribution.shape)


def _meta(distribution: Distribution) -> Tensor:
    return torch.empty(distribution.shape, device="meta")


def _source(rule: Rule, layer: int) -> str:
    return rule.targets[0].format(layer)


def _sources(rule: Rule, layer: int) -> list[str]:
    return [target.format(layer) for target in rule.targets]


def _layers(rule: Rule, described: dict[str, Distribution]) -> int:
    if rule.by != "layer":
        return 1
    return next(layer for layer in range(len(described)) if _source(rule, layer) not in described)


def _spec(params: Path, keys: list[str], shape: tuple[int, ...], chunk: tuple[int, ...], dtype: torch.dtype) -> dict:
    return {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": f"file://{params.resolve()}/", "path": ".".join(keys) + "/"},
        "metadata": {
            "shape": list(shape),
            "chunks": list(chunk),
            "dtype": "bfloat16" if dtype == torch.bfloat16 else "<f4",
            "compressor": {"id": "zstd", "level": 1},
        },
        "store_data_equal_to_fill_value": True,
        "create": True,
    }


def _metadata(keys: dict[str, list[str]]) -> dict:
    value = {"value_type": "np.ndarray", "skip_deserialize": False}
    tree = {
        str(tuple(path)): {"key_metadata": [{"key": key, "key_type": 2} for key in path], "value_metadata": value}
        for path in keys.values()
    }
    return {
        "tree_metadata": tree,
        "use_ocdbt": True,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
