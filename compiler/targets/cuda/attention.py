"""Lowering what is between the products of q, k and v and that of the output: rotary embeddings, caches, attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from duq.compiler.targets.cuda.builder import Builder, Joined, expect, pointer
from duq.compiler.targets.cuda.patterns import past_views, readers_of, views_between
from duq.compiler.targets.cuda.program import Float, Matrix, Weight
from duq.plugins import kernels, tactics
from duq.plugins.gpu import gpu_of


@dataclass(frozen=True)
class Rotation:
    """The rotary embedding of a product's q, k, v: widths, the values that result, the nodes that it covers; the first
    position, counted from *past if that is given; where keys and values go if not beside the queries."""

    columns: list[int]
    dims: int
    results: list[ir.Value]
    nodes: list[ir.Node]
    tables: list[Weight]
    first: int
    past: Matrix | None
    key: Matrix | None
    value: Matrix | None


def rotation_of(builder: Builder, name: str, parts: Sequence[ir.Value], rows: int) -> Rotation:
    """What becomes of the q, k and v (or k and v) of a product: a rotary embedding of q and k, perhaps the cache."""
    columns = [part.shape[-1] for part in parts]
    turned = [past_views(part) for part in parts]
    nodes = [readers_of(value)[0] for value in turned[:-1]]
    expect(len(parts) in (2, 3) and all(node.op_type == "RotaryEmbedding" for node in nodes), name)
    results = [*(node.outputs[0] for node in nodes), turned[-1]]
    dims = nodes[-1].inputs[0].shape[-1]
    expect(columns[-2:] == [dims, dims], name)  # one head of keys and values
    positions = builder.integer(nodes[0].inputs[3]).reshape(-1)
    expect((np.diff(positions) == 1).all() and len(positions) == rows, name)
    behind = int(positions[0]) > 0  # tokens behind the prefix are counted from the end of its real tokens
    first = int(positions[0]) - builder.prefix_rows if behind else 0
    key, value = (_cache(builder, result) for result in results[-2:])
    tables = [builder.weights.float32(operand) for operand in nodes[0].inputs[1:3]]
    views = [view for part, last in zip(parts, turned) for view in views_between(part, last)]
    past = builder.past if behind else None
    return Rotation(columns, dims, results, [*nodes, *views], tables, first, past, key, value)


def rotary(builder: Builder, name: str, parts: Sequence[ir.Value], y: Matrix) -> None:
    """The rotary embedding as a launch of its own: q and k in place, or k and v into the cache."""
    r = rotation_of(builder, name, parts, y.rows)
    heads = (sum(r.columns) - 2 * r.dims) // r.dims
    arguments = [y.pointer, *r.tables, pointer(r.key), pointer(r.value), pointer(r.past)]
    arguments += [r.first, y.stride, r.key.stride if r.key else 0]
    reads, writes = [y, *([r.past] if r.past else [])], [y, *([r.key, r.value] if r.key else [])]
    builder.kernel(f"{name} (rotary)", kernels.rotary(y.rows, heads, r.dims), arguments, reads, writes)
    bind_rotation(builder, r, y)


def bind_rotation(builder: Builder, r: Rotation, y: Matrix) -> None:
    """After the launch that computed it into y, and into the cache if there is one for it."""
    pieces = y.split(r.columns)
    if r.key is not None:  # the prefix's rows, or the one behind them
        start, stop = (0, builder.prefix_rows) if r.past is None else (builder.prefix_rows, builder.prefix_rows + 1)
        pieces[-2:] = [each.slice_rows(start, stop) for each in (r.key, r.value)]
    builder.covered |= set(r.nodes)
    builder.values |= dict(zip(r.results, pieces))


def _cache(builder: Builder, value: ir.Value) -> Matrix | None:
    """The cache that keys or values belong in: those that the prefix hands to the steps."""
    joined = [reader.outputs[0] for reader in readers_of(value) if reader.op_type == "Concat"]
    names = [each.name for each in [value, *joined] if each.is_graph_output()]
    return builder.cache(names[0]) if names else None


def join(builder: Builder, node: ir.Node) -> None:
    """A Concat of keys or of values. If the prefix hands it to the steps, both pieces are in the cache already."""
    if node.outputs[0].is_graph_output():
        builder.values[node.outputs[0]] = builder.caches[node.outputs[0].name]
    else:
        builder.values[node.outputs[0]] = Joined(*map(builder.value, node.inputs))


def attention(builder: Builder, node: ir.Node) -> None:
    """Bidirectional attention: of each image's tokens, of the prefix, or of the suffix to the cache and itself."""
    q, k, v = map(builder.value, node.inputs[:3])
    expect(all(operand is None for operand in node.inputs[3:]), node)
    batch, heads, _, dims = node.inputs[0].shape
    kv_heads = node.inputs[1].shape[1]
    own_k, own_v = (k.own, v.own) if isinstance(k, Joined) else (None, None)
    k, v = (k.past, v.past) if isinstance(k, Joined) else (k, v)
    images = 1 if batch == 1 else builder.cameras
    rows, own_rows = q.rows // images, own_k.rows if own_k else 0
    # Of the cache the first *past rows are real; the state token's row is behind them.
    in_cache = any(k.buffer is cache.buffer for cache in builder.caches.values())
    past = builder.past if in_cache else None
    keys = k.rows - builder.prefix_rows if in_cache else k.rows // images
    out = builder.new(node.outputs[0].name, q.rows, q.columns, "Bf16")
    expect(k.stride == v.stride and (own_k is None or own_k.stride == own_v.stride), node)

    best = tactics.best_attention(dims, rows, images, gpu_of(builder.sm), k.rows // images, own_rows)
    how = replace(best, heads=heads // kv_heads).instance(rows, kv_heads, images)
    arguments = [q.pointer, k.pointer, v.pointer, pointer(own_k), pointer(own_v), out.pointer, pointer(past)]
    arguments += [rows, keys, own_rows, q.stride, k.stride, own_k.stride if own_k else 0, out.stride]
    arguments.append(int(in_cache and builder.caches_complete))  # may be read before the launch ahead has ended
    arguments.append(Float(node.attributes.get_float("scale", dims**-0.5)))
    reads = [each for each in (q, k, v, own_k, own_v, past) if each]
    work = 4.0 * q.rows * (k.rows // images + own_rows) * q.columns
    builder.kernel(_name(builder, q), how, arguments, reads, [out], work)
    builder.values[node.outputs[0]] = out


def _name(builder: Builder, q: Matrix) -> str:
    """`llm.layers.0.self_attn.q_proj+k_proj+v_proj (rotary)` -> `llm.layers.0.self_attn.attention`."""
    return builder.writer(q).name.partition(" (")[0].rpartition(".")[0] + ".attention"
