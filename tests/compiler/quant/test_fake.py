"""The integer arithmetic against numpy's int64, and the fake-quantized policy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from duq.compiler.quant.fake import IntegerLinear, integer_matmul, quantize_activations
from duq.compiler.quant.pack import LinearPack, pack_weight


@st.composite
def integer_operands(draw):
    rows, inner, columns = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 64, 1025])), draw(st.integers(1, 4))
    low, high = draw(st.sampled_from([(-8, 7), (-128, 127)]))
    x = draw(hnp.arrays(np.int8, (rows, inner), elements=st.integers(-128, 127)))
    return x, draw(hnp.arrays(np.int8, (columns, inner), elements=st.integers(low, high)))


@settings(deadline=None)
@given(integer_operands())
def test_integer_matmul_equals_int64(operands):
    x, weight = operands
    exact = x.astype(np.int64) @ weight.astype(np.int64).T
    found = integer_matmul(torch.from_numpy(x).float(), torch.from_numpy(weight))
    np.testing.assert_array_equal(found.numpy(), exact.astype(np.float32))


@pytest.mark.parametrize("x, weight", [(-128, -8), (127, 7), (-128, -128), (127, -128)])
def test_integer_matmul_is_exact_at_its_largest(x, weight):
    inner = 16384
    rows = torch.full((1, inner), float(x))
    found = integer_matmul(rows, torch.full((1, inner), weight, dtype=torch.int8))
    assert int(found) == int(np.float32(x * weight * inner))


def test_halves_round_to_even_and_the_extremes_clamp():
    x_q, scale = quantize_activations(torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 300.0, -300.0]]), torch.tensor(1.0))
    assert x_q.tolist() == [[0, 2, 2, 0, -2, 127, -128]]


def test_a_row_of_zeros_stays_zero():
    x_q, scale = quantize_activations(torch.zeros(2, 4), None)
    assert not x_q.any() and torch.isfinite(scale).all() and (scale > 0).all()


@settings(deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from([4, 8]), st.sampled_from([None, 0.02]), st.booleans())
def test_integer_linear_equals_numpy(seed, bits, static, with_bias):
    random = np.random.default_rng(seed)
    rows, columns, block = 6, 16, 8
    low, high = (-8, 7) if bits == 4 else (-128, 127)
    weight = random.integers(low, high + 1, (rows, columns)).astype(np.int8)
    rotation, output = (np.linalg.qr(random.standard_normal((n, s, s)))[0].astype(np.float32) for n, s in ((2, 8), (3, 2)))
    pack = LinearPack(
        name="llm.layers.0.mlp.down_proj",
        weight_q=pack_weight(weight, bits),
        weight_bits=bits,
        weight_scale=random.uniform(0.01, 0.1, rows).astype(np.float32),
        activation_scale=None if static is None else np.array(static, np.float32),
        input_scale=random.uniform(0.5, 2.0, columns).astype(np.float32),
        permutation=random.permutation(columns),
        rotation=rotation,
        block_size=block,
        output_rotation=output,
    )
    bias = random.standard_normal(rows).astype(np.float32) if with_bias else None
    x = random.standard_normal((3, columns)).astype(np.float32)

    layer = IntegerLinear(pack, None if bias is None else torch.from_numpy(bias))
    found = layer(torch.from_numpy(x)).numpy()

    moved = pack.transform_input(torch.from_numpy(x)).numpy()  # its own test covers the transform
    scale = (
        np.float32(static)
        if static
        else np.maximum(np.abs(moved).max(-1, keepdims=True), np.float32(1e-12)) / np.float32(127)
    )
    x_q = np.clip(np.rint(moved / scale), -128, 127).astype(np.int64)
    y = (x_q @ weight.astype(np.int64).T).astype(np.float32) * pack.weight_scale * scale
    expected = np.concatenate([y[:, 2 * i : 2 * i + 2] @ output[i] for i in range(3)], axis=1)
    np.testing.assert_allclose(found, expected if bias is None else expected + bias, rtol=1e-5, atol=1e-5)


def test_float_activations():
    pack = LinearPack(
        name="projector",
        weight_q=np.array([[1, -2], [3, 4]], np.int8),
        weight_bits=8,
        weight_scale=np.array([0.5, 2.0], np.float32),
        activation_bits=0,
    )
    assert IntegerLinear(pack, None)(torch.tensor([[0.1, 0.3]])).flatten().tolist() == pytest.approx([-0.25, 3.0])


def test_per_channel_activation_scales_stay_inside_the_sum():
    pack = LinearPack(
        name="projector",
        weight_q=np.array([[1, 2]], np.int8),
        weight_bits=8,
        weight_scale=np.array([1.0], np.float32),
        activation_scale=np.array([0.1, 1.0], np.float32),
    )
    assert IntegerLinear(pack, None)(torch.tensor([[0.26, 1.4]])).item() == pytest.approx(0.3 + 2.0)
