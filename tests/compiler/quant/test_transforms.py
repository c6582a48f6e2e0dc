"""Linear transforms: inverses, invariance of the function, and what each part is for."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duq.compiler.quant.transforms import (
    LinearTransform,
    balance,
    block_size_for,
    greedy_rotation,
    hadamard,
    interleaving_permutation,
    rotate,
    weight_rotation,
    zigzag_permutation,
)


def dense_hadamard(size):
    """Sylvester's H[i, j] = (-1)^popcount(i & j)."""
    return np.array([[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]) / size**0.5


def random_rotation(random, channels, size):
    return np.linalg.qr(random.standard_normal((channels // size, size, size)))[0].astype(np.float32)


@st.composite
def linears(draw):
    """(W [N, K], x [M, K], a transform with any subset of its parts)."""
    random = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    block, out_block = draw(st.sampled_from([2, 4, 16])), draw(st.sampled_from([2, 8]))
    columns, rows = block * draw(st.integers(1, 4)), out_block * draw(st.integers(1, 3))
    rotation = draw(st.sampled_from([None, "hadamard", random_rotation(random, columns, block)]))
    transform = LinearTransform(
        input_scale=draw(st.sampled_from([None, np.exp(random.standard_normal(columns)).astype(np.float32)])),
        permutation=draw(st.sampled_from([None, random.permutation(columns)])),
        rotation=rotation,
        block_size=0 if rotation is None else block,
        output_rotation=draw(st.sampled_from([None, random_rotation(random, rows, out_block)])),
    )
    weight, x = (random.standard_normal((n, columns)).astype(np.float32) for n in (rows, 3))
    return torch.from_numpy(weight), torch.from_numpy(x), transform


@settings(deadline=None)
@given(linears())
def test_the_function_of_the_linear_does_not_change(case):
    weight, x, transform = case
    y = transform.restore_output(transform.transform_input(x) @ transform.transform_weight(weight).T)
    torch.testing.assert_close(y, x @ weight.T, rtol=1e-5, atol=1e-4)


@settings(deadline=None)
@given(linears())
def test_restore_input_is_the_inverse(case):
    _, x, transform = case
    restored = transform.restore_input(transform.transform_input(x))
    scale = torch.from_numpy(np.ones(x.shape[1], np.float32) if transform.input_scale is None else transform.input_scale)
    # A rotation adds up channels of different scales, with a rounding of the largest, then scaled back as the smallest.
    assert ((restored - x).abs() <= 1e-6 * (x * scale).norm(dim=1, keepdim=True) / scale).all()


@settings(deadline=None)
@given(linears())
def test_transform_input_equals_dense_matrices(case):
    _, x, transform = case
    dense = np.eye(x.shape[1])
    if transform.input_scale is not None:
        dense = dense * transform.input_scale
    if transform.permutation is not None:
        dense = dense[:, transform.permutation]
    if transform.rotation is not None:
        size = transform.block_size
        full = np.zeros_like(dense)
        for i in range(0, len(dense), size):
            block = dense_hadamard(size) if isinstance(transform.rotation, str) else transform.rotation[i // size]
            full[i : i + size, i : i + size] = block
        dense = dense @ full
    np.testing.assert_allclose(transform.transform_input(x).numpy(), x.numpy() @ dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 16, 256])
def test_hadamard_is_sylvesters(size):
    np.testing.assert_allclose(hadamard(size).numpy(), dense_hadamard(size), atol=1e-7)


@given(st.integers(1, 5000), st.sampled_from([16, 64, 128]))
def test_block_size_divides(channels, wanted):
    block = block_size_for(channels, wanted)
    assert channels % block == 0 and block <= wanted and (block == wanted or channels % (2 * block))


def test_balance_equalises_spread_and_survives_dead_channels():
    input_rms = torch.tensor([100.0, 1.0, 0.01, 0.0], dtype=torch.float64)
    weight_rms = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    factors = balance(input_rms, weight_rms)
    assert torch.isfinite(factors).all() and (factors > 0).all()
    spread = (input_rms / factors)[:2] / (weight_rms * factors)[:2]
    torch.testing.assert_close(spread[0], spread[1], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(balance(torch.zeros(3), torch.zeros(3)), torch.ones(3))


@settings(deadline=None)
@given(st.integers(1, 6), st.sampled_from([2, 4, 8]), st.integers(0, 1000))
def test_zigzag_deals_large_channels_to_all_blocks(blocks, size, seed):
    magnitude = torch.from_numpy(np.random.default_rng(seed).permutation(blocks * size) + 1.0)
    dealt = magnitude[torch.from_numpy(zigzag_permutation(magnitude, size))].view(blocks, size)
    assert sorted(dealt.flatten().tolist()) == list(range(1, blocks * size + 1))
    largest = dealt.amax(1)  # the first round deals one of the `blocks` largest to each block
    assert largest.min() > blocks * (size - 1)
    assert dealt.sum(1).max() - dealt.sum(1).min() <= blocks


def test_interleaving_permutation():
    assert interleaving_permutation(torch.tensor([1.0, 5.0, 3.0, 4.0, 2.0])).tolist() == [1, 0, 3, 4, 2]


def test_weight_rotation_holds_the_left_singular_vectors():
    weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    rotation = weight_rotation(weight, 8)
    for i, block in enumerate(weight.split(8, dim=1)):
        u = torch.linalg.svd(block.T).U
        np.testing.assert_allclose(np.abs(rotation[i].T @ u.numpy()), np.eye(8), atol=1e-4)  # equal up to signs


def test_greedy_rotation_is_orthogonal_and_removes_outliers():
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 50
    rotation = greedy_rotation(x, 16)
    np.testing.assert_allclose(rotation @ rotation.swapaxes(1, 2), np.tile(np.eye(16), (2, 1, 1)), atol=1e-5)
    assert rotate(x, rotation, 16).abs().max() < 0.5 * x.abs().max()
