"""The choice of tile shapes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duq.plugins import tactics
from duq.plugins.errors import KernelError
from duq.plugins.gpu import CARDS, Gpu, gpu_named, gpu_of
from duq.plugins.kernels import SplitAttention
from duq.plugins.tactics import SMALL_M, best, best_attention, best_float, candidates, fits, projected_attention, split_keys

H100, A40 = gpu_of(90), gpu_of(86)
EXPERT = [(2560, 1024), (1024, 2048), (8192, 1024), (1024, 4096)]
PREFIX = [(2560, 2048), (2048, 2048), (32768, 2048), (2048, 16384)]
PROBLEMS = [(m, *s) for m in (50, 51, 64) for s in EXPERT] + [(m, *s) for m in (256, 306, 562, 818, 968) for s in PREFIX]
EVERY_GPU = pytest.mark.parametrize("gpu", CARDS, ids=lambda gpu: gpu.name)


@EVERY_GPU
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("m", "n", "k"), PROBLEMS)
def test_every_gemm_of_the_policy_has_a_tactic(m, n, k, bits, gpu):
    tactic = best(m, n, k, bits, gpu)
    assert fits(tactic, m, n, k, bits, gpu)
    assert tactic.shape(m, n, bits).shared_bytes <= gpu.block_shared_bytes
    assert tactic.instance(m, n, bits, "Bf16").shape == tactic.shape(m, n, bits)
    assert gpu.has_wgmma or not tactic.needs_wgmma


@given(
    st.integers(1, 2000),
    st.integers(1, 300),
    st.integers(1, 100),
    st.sampled_from([4, 8]),
    st.sampled_from(CARDS),
)
def test_every_gemm_of_whole_tiles_has_a_tactic(m: int, rows16: int, chunks: int, bits: int, gpu: Gpu):
    """N in multiples of 16 and K of 64, those of a fragment (plugins/layout.py)."""
    n, k = 16 * rows16, 64 * chunks
    found = candidates(m, n, k, bits, gpu)
    assert found and all(fits(tactic, m, n, k, bits, gpu) for tactic in found)


@pytest.mark.parametrize("bits", [4, 8])
def test_an_h200_has_the_tactics_of_an_h100(bits):
    """The table's, for 132 multiprocessors."""
    for problem in PROBLEMS:
        assert candidates(*problem, bits, gpu_named("H200")) == candidates(*problem, bits, H100)


@EVERY_GPU
@pytest.mark.parametrize(("n", "k"), EXPERT)
def test_a_small_m_has_about_as_many_blocks_as_multiprocessors(n, k, gpu):
    """At least half as many, and at most twice, but for what even the largest tiles have; a cluster of WgmmaSmall is free."""
    tactic = best(50, n, k, 4, gpu)
    blocks = math.prod(tactic.shape(50, n, 4).grid)
    assert min(64, gpu.multiprocessors // 2) <= blocks
    assert blocks <= 2.2 * gpu.multiprocessors or (tactic.split == 1 and (tactic.needs_wgmma or tactic.tile_rows == 64))


def busiest(tactic, m: int, n: int, k: int, multiprocessors: int) -> float:
    """Multiply-adds and epilogue of the multiprocessor with the most tiles, which are dealt out one by one."""
    work = [0.0] * multiprocessors
    for tile in range(-(-m // tactic.tile_tokens) * (n // tactic.tile_rows)):
        work[tile % multiprocessors] += tactic.tile_tokens * tactic.tile_rows * (k + 256)
    return max(work)


@pytest.mark.parametrize("name", ["A100", "A40", "RTX 3090", "AGX Orin 64 GB", "Orin NX 16 GB", "RTX 4090", "RTX 5090"])
@pytest.mark.parametrize(("n", "k"), PREFIX)
def test_a_large_m_has_the_least_work_on_the_busiest_multiprocessor(n, k, name):
    gpu = gpu_named(name)
    work = [busiest(tactic, 818, n, k, gpu.multiprocessors) for tactic in candidates(818, n, k, 4, gpu)]
    assert len(work) > 3 and work[0] == min(work)


def test_cards_of_one_sm_may_differ():
    tactics_of = [[best(818, n, k, 4, gpu_named(name)) for n, k in PREFIX] for name in ("L40S", "RTX 4090")]
    assert tactics_of[0] != tactics_of[1]


def test_timed_tactics_are_chosen():
    for (n, k, bits), rows in tactics._timed().items():
        for m, tactic in rows:
            assert tactic in candidates(m, n, k, bits, H100) and best(m, n, k, bits, H100) == tactic


def test_the_first_candidate_of_large_m_is_mostly_the_fastest():
    timed = [
        (m, n, k, bits, tactic) for (n, k, bits), rows in tactics._timed().items() for m, tactic in rows if m > SMALL_M
    ]
    first = [candidates(*problem, H100)[0] == tactic for *problem, tactic in timed]
    assert len(timed) == 24 and sum(first) >= 18


def test_says_when_nothing_fits():
    with pytest.raises(KernelError, match="100, 24, 1024 at 4 bits on SM 90"):
        best(100, 24, 1024, 4, H100)
    with pytest.raises(KernelError, match="65, 1024, 1024"):
        best_float(65, 1024, 1024, H100)
    with pytest.raises(KernelError, match="50, 24, 1024"):
        best_float(50, 24, 1024, H100)


@EVERY_GPU
@pytest.mark.parametrize("m", [1, 50, 64])
@pytest.mark.parametrize(("n", "k"), [*EXPERT, (1024, 1024), (16, 64), (256, 16)])
def test_every_float_gemm_of_the_expert_has_a_tactic(n, k, m, gpu):
    tactic = best_float(m, n, k, gpu)
    shape = tactic.shape(m, n)
    assert tactic.divides(n, k) and shape.shared_bytes <= gpu.block_shared_bytes
    assert shape.grid[2] == 1 and (gpu.has_clusters or shape.on(gpu).cluster == (1, 1, 1))


@EVERY_GPU
@pytest.mark.parametrize(("dims", "tokens", "images"), [(256, 1, 1), (256, 50, 1), (256, 306, 1), (256, 1018, 1)] + [
    (72, 256, images) for images in (1, 2, 3, 4)
])  # fmt: skip
def test_every_attention_of_the_policy_has_a_kernel(dims, tokens, images, gpu):
    tactic = best_attention(dims, tokens, images, gpu)
    shape = tactic.instance(tokens, 1 if dims == 256 else 16, images).shape
    assert tactic.dims == dims and shape.shared_bytes <= gpu.block_shared_bytes
    assert gpu.has_clusters or shape.cluster == (1, 1, 1)


@pytest.mark.parametrize(
    ("cached", "own", "keys"), [(833, 50, 112), (577, 50, 80), (321, 51, 48), (969, 50, 80), (3, 1, 32), (0, 0, 32)]
)
def test_a_suffix_has_tiles_of_its_share_of_the_keys(cached, own, keys):
    assert best_attention(256, 50, 1, H100, cached, own).keys == keys


@pytest.mark.parametrize(("cached", "own", "keys"), [(833, 50, 112), (577, 50, 80), (321, 51, 48), (0, 0, 32)])
def test_the_projection_joins_attention_where_there_is_room_for_its_weight(cached, own, keys):
    tactic = projected_attention(8, 1024, cached, own, H100)
    assert tactic is not None and tactic.keys == keys
    shape = tactic.shape(50, 8, 1024)
    assert (shape.grid, shape.cluster) == ((8, 8, 1), (8, 1, 1))
    assert H100.block_shared_bytes / 2 < shape.shared_bytes <= H100.block_shared_bytes


@pytest.mark.parametrize(
    ("heads", "width", "gpu"),
    [(9, 1024, H100), (8, 2048, H100), (8, 1000, H100), (8, 1024, A40), (8, 1024, gpu_of(120))],
    ids=["heads", "width", "columns", "SM 86", "SM 120"],
)
def test_elsewhere_the_projection_is_a_launch_of_its_own(heads, width, gpu):
    assert projected_attention(heads, width, 833, 50, gpu) is None


@pytest.mark.parametrize(
    ("sm", "tokens", "cached", "blocks"),
    [(86, 50, 833, 78), (80, 50, 833, 100), (89, 50, 833, 130), (87, 50, 833, 26), (86, 1, 833, 16)]
    + [(86, 50, 305, 75), (89, 50, 817, 125), (120, 50, 817, 150), (87, 50, 305, 26)],
)
def test_without_clusters_few_queries_split_the_keys_over_the_multiprocessors(sm, tokens, cached, blocks):
    """13 row tiles of 32 or 25 of 16 (state token: one) times the split: about as many blocks as multiprocessors, but at least
    two a tile; 16 rows where three or more share the keys and have room for their share."""
    gpu = gpu_of(sm)
    tactic = best_attention(256, tokens, 1, gpu, cached, tokens)
    assert isinstance(tactic, SplitAttention) and tactic.fits(gpu)
    assert tactic.shape(tokens).grid == (blocks, 1, 1)


@EVERY_GPU
@pytest.mark.parametrize("tokens", [1, 50])
def test_keys_are_split_in_memory_only_without_clusters(tokens, gpu):
    tactic = best_attention(256, tokens, 1, gpu, 833, tokens)
    assert not (gpu.has_clusters and isinstance(tactic, SplitAttention))


def test_refuses_heads_without_a_kernel():
    with pytest.raises(KernelError, match="heads of 128.*72 and 256"):
        best_attention(128, 50, 1, H100)


@pytest.mark.parametrize(("sm", "token_tiles"), [(80, 1), (86, 1), (87, 1), (89, 2), (120, 2)])
def test_down_of_the_expert_halves_its_tokens_where_there_is_a_multiprocessor_for_each_block(sm, token_tiles):
    gpu = gpu_of(sm)
    assert best(50, 1024, 4096, 4, gpu).shape(50, 1024, 4).grid[2] == token_tiles
    assert best(50, 8192, 1024, 4, gpu).shape(50, 8192, 4).grid[2] == 1  # there are enough blocks without


@pytest.mark.parametrize(("keys", "pieces"), [(0, 1), (355, 1), (867, 1), (1018, 2), (4000, 5)])
def test_split_keys_are_one_piece_where_shared_memory_holds_it(keys, pieces):
    tactic = split_keys(50, keys, A40)
    units = -(-keys // 16)
    share = max(1, -(-units // tactic.split))  # of 16 keys
    assert -(-16 * share // tactic.keys) == pieces and tactic.fits(A40)


@pytest.mark.parametrize(("n", "k"), [(2560, 1024), (1024, 2048), (8192, 1024), (1024, 4096)])
def test_float_k_is_split_in_memory_only_where_tiles_are_too_few(n, k):
    assert best_float(50, n, k, A40).split == 1
    assert best_float(50, 16, 4096, A40).split > 1  # one tile of rows: its blocks can only share K
