"""The attention kernel against softmax(q k^T / sqrt(d)) v in float64, and rotary embeddings against their definition."""
from __future__ import annotations

import math

import pytest
import torch

from plugins import attention
from tests.gpu import launch

DIMS, HEADS = 256, 8
GUARD = 8  # rows past the last token, which are poison where read and must stay as they are where written

# ||out - exact|| / ||exact||. bf16 rounds with a relative error of at most 2^-9, rms about 0.4 of that: once in the
# probabilities and once in the output, together 1.1e-3 to 2e-3 with values of mean zero; twice that when q and k are
# rounded anew, after a rotary embedding, from sums formed in another order.
BOUND = 3e-3
BOUND_ROTARY = 4e-3


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


def rotate(x: torch.Tensor, rotary, first_position: int) -> torch.Tensor:
    """x [T, heads DIMS] bf16 with its rotary embedding, formed in float32 and rounded to bf16."""
    cos, sin = (table[first_position : first_position + len(x), None] for table in rotary)
    first, second = x.float().unflatten(1, (-1, DIMS)).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).flatten(1).bfloat16()


def check(out: torch.Tensor, exact: torch.Tensor, bound: float = BOUND) -> None:
    written, rest = out[: len(exact)].double(), out[len(exact) :]
    error = (written - exact).norm() / exact.norm()
    assert error <= bound, f"relative error {float(error):.2e}"
    worst = (written - exact).abs().amax() / exact.abs().amax()
    assert worst <= 4 * bound, f"greatest error {float(worst):.2e} of the greatest value"
    assert rest.isnan().all()


def skip_unless_fits(config) -> None:
    if not config.fits(launch.compute_capability()):
        pytest.skip("the tile does not fit this GPU")


@pytest.mark.parametrize("tokens", [1, 17, 306, 817, 1018])
@pytest.mark.parametrize("config", attention.PREFIX, ids=str)
def test_prefix(config, tokens):
    """Slices of one qkv matrix, K and V shared by all heads."""
    skip_unless_fits(config)
    qkv = guarded(random(tokens, (HEADS + 2) * DIMS, seed=tokens))
    q, k, v = qkv.split([HEADS * DIMS, DIMS, DIMS], 1)
    out = poisoned(tokens, HEADS * DIMS)
    launch.attention(config, q, k, v, out[:tokens])
    check(out, definition(q, k, v, HEADS, 1))


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize(("tokens", "keys"), [(50, 306), (50, 817), (50, 1018), (51, 5), (1, 816), (3, 0)])
@pytest.mark.parametrize("config", attention.SUFFIX, ids=str)
def test_suffix(config, tokens, keys, rotary):
    """The cache and the suffix's own keys and values, where they are."""
    skip_unless_fits(config)
    cache = guarded(random(keys, 2 * DIMS, seed=keys))
    qkv = guarded(random(tokens, (HEADS + 2) * DIMS, seed=tokens))
    (k, v), (q, own_k, own_v) = cache.split(DIMS, 1), qkv.split([HEADS * DIMS, DIMS, DIMS], 1)
    tables = launch.rotary_tables(keys + tokens, DIMS) if rotary else None
    out = poisoned(tokens, HEADS * DIMS)
    launch.attention(config, q, k, v, out[:tokens], own_k, own_v, rotary=tables, first_position=keys)
    if rotary:
        q, own_k = rotate(q, tables, keys), rotate(own_k, tables, keys)
    exact = definition(q, torch.cat([k, own_k]), torch.cat([v, own_v]), HEADS, 1)
    check(out, exact, BOUND_ROTARY if rotary else BOUND)


@pytest.mark.parametrize("tokens", [256, 100])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("config", attention.VISION, ids=str)
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


@pytest.mark.parametrize("config", [*attention.PREFIX[2:6], attention.SUFFIX[0], attention.SUFFIX[4]], ids=str)
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


@pytest.mark.parametrize(("tokens", "first_position"), [(1, 0), (50, 817), (818, 0)])
def test_keys_and_values_go_to_the_cache(tokens, first_position):
    qkv = guarded(random(tokens, (HEADS + 2) * DIMS, seed=tokens))
    _, k, v = qkv.split([HEADS * DIMS, DIMS, DIMS], 1)
    rotary = launch.rotary_tables(first_position + tokens, DIMS)
    cache = poisoned(tokens, 2 * DIMS)
    k_cache, v_cache = cache.split(DIMS, 1)
    launch.store_keys_values(k, v, k_cache, v_cache, rotary, first_position)
    assert torch.equal(v_cache[:tokens], v)
    cos, sin = (table[first_position:].double() for table in rotary)
    first, second = k.double().chunk(2, -1)
    exact = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    torch.testing.assert_close(k_cache[:tokens].double(), exact, rtol=2**-8, atol=1e-6)
    assert cache[tokens:].isnan().all()
