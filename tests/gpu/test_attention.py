"""The attention kernels against softmax(q k^T / sqrt(d)) v in float64, rotary embeddings against their definition."""

from __future__ import annotations

import math

import pytest
import torch

from duq.plugins import tactics
from duq.plugins.kernels import SplitAttention
from tests.support import launch

DIMS, HEADS, WIDTH = 256, 8, 1024
GUARD = 8  # rows past the last token, which are poison where read and must stay as they are where written

# ||out - exact|| / ||exact||. bf16 rounds with a relative error of at most 2^-9, rms about 0.4 of that: once in the
# probabilities and once in the output, together 1.1e-3 to 2.4e-3 with values of mean zero.
BOUND = 3e-3


def random(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, device="cuda", generator=generator).bfloat16()


def guarded(x: torch.Tensor) -> torch.Tensor:
    """x with rows of NaN behind it in memory."""
    return torch.cat([x, x.new_full((GUARD, x.shape[1]), math.nan)])[: len(x)]


def poisoned(rows: int, columns: int) -> torch.Tensor:
    return torch.full((rows + GUARD, columns), math.nan, dtype=torch.bfloat16, device="cuda")


def definition(q, k, v, heads: int, kv_heads: int) -> torch.Tensor:
    """q [T, heads D], k, v [S, kv_heads D] -> [T, heads D], float64."""
    q, k, v = (x.double().unflatten(1, (n, -1)).transpose(0, 1) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    k, v = (x.repeat_interleave(heads // kv_heads, 0) for x in (k, v))
    out = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), -1) @ v
    return out.transpose(0, 1).flatten(1)


def check(out: torch.Tensor, exact: torch.Tensor) -> None:
    written, rest = out[: len(exact)].double(), out[len(exact) :]
    error = (written - exact).norm() / exact.norm()
    assert error <= BOUND, f"relative error {float(error):.2e}"
    worst = (written - exact).abs().amax() / exact.abs().amax()
    assert worst <= 4 * BOUND, f"greatest error {float(worst):.2e} of the greatest value"
    assert rest.isnan().all()


def skip_unless_fits(config) -> None:
    if not config.fits(launch.gpu()):
        pytest.skip("the tile does not fit this GPU")


@pytest.mark.parametrize("tokens", [1, 17, 306, 817, 1018])
@pytest.mark.parametrize("config", [*tactics.MANY_QUERIES, tactics.FEWER_ROWS], ids=str)
def test_prefix(config, tokens):
    """Slices of one qkv matrix, K and V shared by all heads."""
    skip_unless_fits(config)
    qkv = guarded(random(tokens, (HEADS + 2) * DIMS, seed=tokens))
    q, k, v = qkv.split([HEADS * DIMS, DIMS, DIMS], 1)
    out = poisoned(tokens, HEADS * DIMS)
    launch.attention(config, q, k, v, out[:tokens])
    check(out, definition(q, k, v, HEADS, 1))


@pytest.mark.parametrize(("tokens", "keys"), [(50, 306), (50, 817), (50, 1018), (51, 5), (1, 816), (3, 0)])
@pytest.mark.parametrize("config", [*tactics.FEW_QUERIES, *tactics.SPLIT_KEYS], ids=str)
def test_suffix(config, tokens, keys):
    """The cache and the suffix's own keys and values, where they are."""
    skip_unless_fits(config)
    cache = guarded(random(keys, 2 * DIMS, seed=keys))
    qkv = guarded(random(tokens, (HEADS + 2) * DIMS, seed=tokens))
    (k, v), (q, own_k, own_v) = cache.split(DIMS, 1), qkv.split([HEADS * DIMS, DIMS, DIMS], 1)
    on_device = torch.tensor(keys, dtype=torch.int32, device="cuda")  # the number of keys: an argument, or read there
    for past in (None, on_device):
        out = poisoned(tokens, HEADS * DIMS)
        launch.attention(config, q, k, v, out[:tokens], own_k, own_v, past=past, cache_ready=past is None)
        check(out, definition(q, torch.cat([k, own_k]), torch.cat([v, own_v]), HEADS, 1))


@pytest.mark.parametrize(("tokens", "keys"), [(50, 306), (50, 817), (50, 1018), (64, 100), (65, 300), (1, 816), (3, 0)])
def test_suffix_with_its_output_projection(tokens, keys):
    """Parts that sum to the projection, the same bits call after call; nothing beside them is touched."""
    tactic = projected(keys, tokens)
    cache = guarded(random(keys, 2 * DIMS, seed=keys))
    qkv = guarded(random(tokens, (HEADS + 2) * DIMS, seed=tokens))
    (k, v), (q, own_k, own_v) = cache.split(DIMS, 1), qkv.split([HEADS * DIMS, DIMS, DIMS], 1)
    weight = random(WIDTH, HEADS * DIMS, seed=9)
    packed, on_device = launch.pack_head_weight(weight, tactic), torch.tensor(keys, dtype=torch.int32, device="cuda")
    attended = definition(q, torch.cat([k, own_k]), torch.cat([v, own_v]), HEADS, 1).unflatten(1, (HEADS, DIMS))
    exact = torch.einsum("mhk,nhk->hmn", attended, weight.double().unflatten(1, (HEADS, DIMS)))
    outputs = []
    for past in (None, on_device, on_device):
        whole = torch.full((HEADS * tokens + GUARD, WIDTH), math.nan, device="cuda")
        parts = whole[: HEADS * tokens].view(HEADS, tokens, WIDTH)
        launch.projected_attention(tactic, q, k, v, packed, parts, own_k, own_v, past=past, cache_ready=past is None)
        check(whole, exact.flatten(0, 1))
        outputs.append(parts)
    assert all(torch.equal(each, outputs[0]) for each in outputs)


@pytest.mark.parametrize("order", ["rising", "outlier"])
def test_output_projection_of_extreme_scores(order):
    tokens, keys = 40, 301
    tactic = projected(keys, 0)
    q, k, v = random(tokens, HEADS * DIMS, seed=1), random(keys, DIMS, seed=2), random(keys, DIMS, seed=3)
    ramp = torch.linspace(-1, 1, keys, device="cuda")[:, None]
    q, k = (1 + 0.1 * q).bfloat16(), (0.1 * k + 30 * (ramp if order == "rising" else ramp == 1)).bfloat16()
    weight = random(WIDTH, HEADS * DIMS, seed=9)
    parts = torch.full((HEADS, tokens, WIDTH), math.nan, device="cuda")
    launch.projected_attention(tactic, q, k, v, launch.pack_head_weight(weight, tactic), parts)
    exact = definition(q, k, v, HEADS, 1) @ weight.double().T
    check(parts.sum(0), exact)


def projected(cached: int, own: int):
    tactic = tactics.projected_attention(HEADS, WIDTH, cached, own, launch.gpu())
    return tactic or pytest.skip("attention and the output projection are two launches on this GPU")


@pytest.mark.parametrize("tokens", [256, 100])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("config", tactics.VISION, ids=str)
def test_vision(config, images, tokens):
    """16 heads of 72, each with its own K and V; images do not see each other."""
    skip_unless_fits(config)
    heads, dims = 16, 72
    qkv = guarded(random(images * tokens, 3 * heads * dims, seed=tokens))
    q, k, v = qkv.split(heads * dims, 1)
    out = poisoned(images * tokens, heads * dims)
    launch.attention(config, q, k, v, out[: images * tokens], images=images)
    per_image = zip(*(x.split(tokens) for x in (q, k, v)), strict=True)
    check(out, torch.cat([definition(*operands, heads, heads) for operands in per_image]))


@pytest.mark.parametrize("tokens", [1, 50])
@pytest.mark.parametrize("config", tactics.SPLIT_KEYS, ids=str)
def test_split_keys_meet_in_memory(config, tokens):
    """The same bits call after call, whichever block is last; counters zero afterwards; nothing written past `partial`."""
    skip_unless_fits(config)
    cache, qkv = random(817, 2 * DIMS, seed=1), random(tokens, (HEADS + 2) * DIMS, seed=2)
    q, own_k, own_v = qkv.split([HEADS * DIMS, DIMS, DIMS], 1)
    words, groups = config.partial_words(tokens), config.groups(tokens)
    partial = torch.full((words + GUARD,), math.nan, device="cuda")
    counters = torch.zeros(groups + GUARD, dtype=torch.int32, device="cuda")
    outputs = []
    for _ in range(50):
        out = poisoned(tokens, HEADS * DIMS)
        launch.attention(config, q, *cache.split(DIMS, 1), out[:tokens], own_k, own_v, meeting=(partial, counters))
        outputs.append(out)
        partial[:words] = math.nan  # nobody relies on what an earlier launch has left
    check(
        outputs[0], definition(q, *(torch.cat(x) for x in zip(cache.split(DIMS, 1), (own_k, own_v), strict=True)), HEADS, 1)
    )
    assert all(torch.equal(out[:tokens], outputs[0][:tokens]) for out in outputs)
    assert not counters.any() and partial[words:].isnan().all()


@pytest.mark.parametrize("images", [1, 3])
def test_split_keys_of_many_heads_and_images(images):
    """A counter for each KV head of each image."""
    config, tokens, kv_heads = SplitAttention(8, 2, 64, 3), 40, 2
    q, k, v = random(images * tokens, 10 * kv_heads * DIMS, seed=images).split(
        [8 * kv_heads * DIMS, kv_heads * DIMS, kv_heads * DIMS], 1
    )
    out = poisoned(images * tokens, 8 * kv_heads * DIMS)
    launch.attention(config, q, k, v, out[: images * tokens], images=images)
    per_image = zip(*(x.split(tokens) for x in (q, k, v)), strict=True)
    check(out, torch.cat([definition(*operands, 8 * kv_heads, kv_heads) for operands in per_image]))


EXTREME = [*tactics.MANY_QUERIES[:2], *tactics.MANY_QUERIES[5:], tactics.FEW_QUERIES[0], *tactics.SPLIT_KEYS[3:5]]


@pytest.mark.parametrize("config", EXTREME, ids=str)
@pytest.mark.parametrize("order", ["rising", "falling", "equal", "outlier"])
def test_extreme_scores(config, order):
    """Scores far beyond exp's range, whose maximum is found late, early, everywhere or in one key."""
    skip_unless_fits(config)
    tokens, keys = 40, 301
    q, k, v = random(tokens, HEADS * DIMS, seed=1), random(keys, DIMS, seed=2), random(keys, DIMS, seed=3)
    ramp = torch.linspace(-1, 1, keys, device="cuda")[:, None]
    shift = {"rising": ramp, "falling": -ramp, "equal": 0 * ramp, "outlier": (ramp == 1).float()}[order]
    q, k = (1 + 0.1 * q).bfloat16(), (0.1 * k * (order != "equal") + 30 * shift).bfloat16()
    out = poisoned(tokens, HEADS * DIMS)
    launch.attention(config, q, k, v, out[:tokens])
    check(out, definition(q, k, v, HEADS, 1))


@pytest.mark.parametrize("to_cache", [False, True])
@pytest.mark.parametrize(("tokens", "first_position", "past"), [(1, 0, 817), (50, 817, None), (50, 1, 816), (818, 0, None)])
def test_rotary(tokens, first_position, past, to_cache):
    qkv = poisoned(tokens, (HEADS + 2) * DIMS)
    qkv[:tokens] = before = random(tokens, (HEADS + 2) * DIMS, seed=tokens)
    on_device = None if past is None else torch.tensor(past, dtype=torch.int32, device="cuda")
    position = first_position + (past or 0)
    cache = poisoned(position + tokens, 2 * DIMS)
    tables = launch.rotary_tables(position + tokens, DIMS)
    caches = cache.split(DIMS, 1) if to_cache else None
    launch.rotary(qkv[:tokens], tables, first_position, caches, heads=HEADS, dims=DIMS, past=on_device)

    cos, sin = (table[position:, None].double() for table in tables)
    first, second = before[:, : (HEADS + 1) * DIMS].double().unflatten(1, (-1, DIMS)).chunk(2, -1)
    exact = torch.cat([first * cos - second * sin, second * cos + first * sin], -1).flatten(1)
    q, k, v = qkv[:tokens].split([HEADS * DIMS, DIMS, DIMS], 1)
    assert torch.equal(v, before[:, -DIMS:])
    if to_cache:
        assert torch.equal(k, before[:, -2 * DIMS : -DIMS])
        k, v = (part[position : position + tokens] for part in caches)
        assert cache[:position].isnan().all()
        assert torch.equal(v, before[:, -DIMS:])
    torch.testing.assert_close(torch.cat([q, k], 1).double(), exact, rtol=2**-8, atol=1e-6)
    assert qkv[tokens:].isnan().all() and cache[position + tokens if to_cache else 0 :].isnan().all()


@pytest.mark.parametrize("config", [tactics.MANY_QUERIES[1], *tactics.FEW_QUERIES, *tactics.SPLIT_KEYS[2:6]], ids=str)
def test_overlapped_launches_wait_for_their_inputs(config):
    """Chains of rotary embedding and attention, each started before the one ahead has ended, give the same bits."""
    skip_unless_fits(config)
    tokens, keys = 50, 306
    cache, tables = random(keys, 2 * DIMS, seed=1), launch.rotary_tables(keys + tokens, DIMS)
    outputs = []
    for overlap in (False, True):
        qkv, out = random(tokens, (HEADS + 2) * DIMS, seed=2), poisoned(tokens, HEADS * DIMS)
        q, own_k, own_v = qkv.split([HEADS * DIMS, DIMS, DIMS], 1)
        for _ in range(20):
            launch.rotary(qkv, tables, keys, heads=HEADS, dims=DIMS, overlap=overlap)
            launch.attention(
                config, q, *cache.split(DIMS, 1), out[:tokens], own_k, own_v, cache_ready=True, overlap=overlap
            )
            launch.attention(config, out[:tokens], own_k, own_v, q, overlap=overlap)  # q depends on the output before
        outputs.append(out[:tokens].clone())
    assert torch.equal(*outputs)


def test_overlapped_launches_of_attention_and_projection_wait_for_their_inputs():
    """Chains of rotary embedding, attention with its output projection, and the quantizer that sums its parts."""
    tokens, keys = 50, 306
    tactic = projected(keys, tokens)
    packed = launch.pack_head_weight(random(WIDTH, HEADS * DIMS, seed=9), tactic)
    cache, tables = random(keys, 2 * DIMS, seed=1), launch.rotary_tables(keys + tokens, DIMS)
    parts = torch.full((HEADS, tokens, WIDTH), math.nan, device="cuda")
    x_q, x_scale = torch.empty(64 * WIDTH, dtype=torch.int8, device="cuda"), torch.empty(tokens, device="cuda")
    outputs = []
    for overlap in (False, True):
        qkv, x = random(tokens, (HEADS + 2) * DIMS, seed=2), random(tokens, WIDTH, seed=3).float()
        q, own_k, own_v = qkv.split([HEADS * DIMS, DIMS, DIMS], 1)
        for _ in range(20):
            launch.rotary(qkv, tables, keys, heads=HEADS, dims=DIMS, overlap=overlap)
            launch.projected_attention(
                tactic, q, *cache.split(DIMS, 1), packed, parts, own_k, own_v, cache_ready=True, overlap=overlap
            )
            launch.residual_quantize(x, parts, x, x_q, x_scale, hadamard=64, slab_tokens=64, overlap=overlap)
        outputs.append((x.clone(), x_q.clone()))
    assert all(torch.equal(*each) for each in zip(*outputs, strict=True))
