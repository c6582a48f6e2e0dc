"""INT4 packing against ONNX's own and plain arithmetic; fragments against the documented tensor core operands."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from duq.plugins.errors import LayoutError
from duq.plugins.layout import (
    activation_slabs,
    interleave_gate_up,
    interleave_rotary,
    pack_bitblas,
    pack_float_fragments,
    pack_fragments,
    pack_head_slabs,
    pack_int4,
    pack_int4_fragments,
    unpack_bitblas,
    unpack_float_fragments,
    unpack_fragments,
    unpack_head_slabs,
    unpack_int4,
    unpack_int4_fragments,
)

even_shapes = hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=9).map(lambda s: (*s[:-1], 2 * s[-1]))
int4_arrays = even_shapes.flatmap(lambda s: hnp.arrays(np.int8, s, elements=st.integers(-8, 7)))


@settings(deadline=None)
@given(int4_arrays)
def test_round_trip(values):
    packed = pack_int4(values)
    assert packed.dtype == np.uint8 and packed.shape == (*values.shape[:-1], values.shape[-1] // 2)
    np.testing.assert_array_equal(unpack_int4(packed, values.shape), values)


def test_every_pair_lands_in_its_nibble():
    pairs = np.stack(np.meshgrid(np.arange(-8, 8), np.arange(-8, 8)), -1).reshape(-1, 2).astype(np.int8)
    expected = (pairs[:, 0].astype(int) % 16) + 16 * (pairs[:, 1].astype(int) % 16)
    np.testing.assert_array_equal(pack_int4(pairs)[:, 0], expected)


@settings(deadline=None)
@given(int4_arrays)
def test_equals_the_raw_data_of_onnx(values):
    onnx = pytest.importorskip("onnx")
    import ml_dtypes

    tensor = onnx.numpy_helper.from_array(values.astype(ml_dtypes.int4))
    assert tensor.raw_data == pack_int4(values).tobytes()


@pytest.mark.parametrize(
    "values",
    [
        np.array([0, 8], np.int8),
        np.array([-9, 0], np.int8),
        np.array([1, 2, 3], np.int8),
        np.array([1, 2], np.int16),
        np.array(1, np.int8),
    ],
)
def test_refuses_what_does_not_fit(values):
    with pytest.raises(LayoutError):
        pack_int4(values)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (8,), ()])
def test_refuses_a_shape_that_does_not_match(shape):
    with pytest.raises(LayoutError):
        unpack_int4(np.zeros(2, np.uint8), shape)


weights = st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from([4, 8]), st.sampled_from(["direct", "wgmma"]))


@settings(deadline=None, max_examples=30)
@given(weights.flatmap(lambda w: st.tuples(st.just(w), st.integers(0, 2**32 - 1))))
def test_fragments_round_trip(case):
    (rows, columns, bits, layout), seed = case
    block = (16, 64) if layout == "direct" else (64, 128)
    low = -(2 ** (bits - 1))
    shape = (rows * block[0], columns * block[1])
    values = np.random.default_rng(seed).integers(low, -low, shape).astype(np.int8)
    packed = pack_fragments(values, bits, layout)
    assert packed.dtype == np.uint8 and packed.nbytes * 8 == values.size * bits
    np.testing.assert_array_equal(unpack_fragments(packed, values.shape, bits, layout), values)


def registers(tile, bits, step, lane):
    """What a lane holds for one instruction, times 16 for INT4: a0..a3 as int8 [4, 4], by the kernels' bit tricks."""
    if bits == 8:
        return tile.reshape(2, 32, 16)[step, lane].view(np.int8).reshape(4, 4)
    words = tile.reshape(32, 16)[lane].view(np.uint32)[2 * step : 2 * step + 2]
    halves = np.concatenate([(words << 4) & 0xF0F0F0F0, words & 0xF0F0F0F0]).astype(np.uint32)
    return halves.view(np.int8).reshape(4, 4)


def activations_of(x, column, step, lane, layout):
    """The bytes of one token that a lane feeds to one instruction, as [2 registers, 4]."""
    t = lane % 4
    chunk = x[64 * column : 64 * column + 64]
    if layout == "direct":  # one 16-byte load
        return chunk[16 * t : 16 * t + 16].reshape(2, 2, 4)[step]
    return chunk[32 * step : 32 * step + 32].reshape(2, 4, 4)[:, t]  # the operand as the PTX manual lays it out


def tile_index(row, column, columns, layout):
    """Where the kernels find the tile of 16 rows and 64 columns."""
    if layout == "direct":
        return row * columns + column
    return ((row // 4 * columns // 2 + column // 2) * 4 + row % 4) * 2 + column % 2


@pytest.mark.parametrize("layout", ["direct", "wgmma"])
@pytest.mark.parametrize("bits", [4, 8])
def test_fragments_multiply_as_the_tensor_cores_do(bits, layout):
    """Emulates the data movement: every lane's registers, summed over a row's four lanes as the instruction does."""
    random = np.random.default_rng(0)
    low = -(2 ** (bits - 1))
    weight = random.integers(low, -low, (64, 256)).astype(np.int8)
    weight[0, :5] = low
    x = random.integers(-128, 128, 256).astype(np.int8)
    packed = pack_fragments(weight, bits, layout)
    y = np.zeros(64, np.int64)
    for row, column, step, lane in np.ndindex(4, 4, 2, 32):
        a = registers(packed[tile_index(row, column, 4, layout)], bits, step, lane).astype(np.int64)
        b = activations_of(x, column, step, lane, layout).astype(np.int64)
        y[16 * row + lane // 4] += (a[0] * b[0]).sum() + (a[2] * b[1]).sum()
        y[16 * row + lane // 4 + 8] += (a[1] * b[0]).sum() + (a[3] * b[1]).sum()
    np.testing.assert_array_equal(y, weight.astype(np.int64) @ x * (16 if bits == 4 else 1))


@pytest.mark.parametrize(
    ("values", "bits", "layout"),
    [
        (np.zeros((16, 64), np.int16), 4, "direct"),
        (np.zeros((8, 64), np.int8), 4, "direct"),
        (np.zeros((16, 32), np.int8), 4, "direct"),
        (np.zeros((16, 64), np.int8), 2, "direct"),
        (np.zeros((16, 64), np.int8), 4, "rows"),
        (np.full((64, 128), 8, np.int8), 4, "wgmma"),
        (np.zeros((16, 64), np.int8), 4, "wgmma"),
        (np.zeros(64, np.int8), 4, "direct"),
    ],
)
def test_refuses_fragments_that_do_not_fit(values, bits, layout):
    with pytest.raises(LayoutError):
        pack_fragments(values, bits, layout)


def test_refuses_fragments_of_another_size():
    with pytest.raises(LayoutError):
        unpack_fragments(np.zeros(511, np.uint8), (16, 64), 4)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), st.integers(1, 3), st.sampled_from([8, 16, 24]))
def test_slabs_hold_every_piece_where_the_swizzle_puts_it(tokens, slabs, block):
    x = np.random.default_rng(tokens).integers(-128, 128, (tokens, 128 * slabs)).astype(np.int8)
    packed = activation_slabs(x, block)
    assert packed.shape == (slabs, -(-tokens // block) * block, 128)
    for token in range(tokens):
        for slab in range(slabs):
            for piece in range(8):
                at = 16 * (piece ^ (token % 8))
                expected = x[token, 128 * slab + 16 * piece :][:16]
                np.testing.assert_array_equal(packed[slab, token, at : at + 16], expected)
    assert not packed[:, tokens:].any()


@pytest.mark.parametrize(("k", "block"), [(64, 8), (128, 12)])
def test_refuses_slabs_that_do_not_divide(k, block):
    with pytest.raises(LayoutError):
        activation_slabs(np.zeros((3, k), np.int8), block)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from([8, 24, 32]), st.integers(0, 2**32 - 1))
def test_slabs_of_heads_hold_every_piece_where_the_swizzle_puts_it(heads, blocks, rows, seed):
    values = np.random.default_rng(seed).integers(0, 2**16, (blocks * rows, 256 * heads)).astype(np.uint16)
    packed = pack_head_slabs(values, rows)
    assert packed.dtype == np.uint8 and packed.shape == (heads, blocks, 4, rows, 128)
    for head, block, slab, row, piece in np.ndindex(heads, blocks, 4, rows, 8):
        found = packed[head, block, slab, row].view(np.uint16).reshape(8, 8)[piece ^ row % 8]
        np.testing.assert_array_equal(found, values[block * rows + row, 256 * head + 64 * slab + 8 * piece :][:8])
    np.testing.assert_array_equal(unpack_head_slabs(packed, values.shape, rows), values)


@pytest.mark.parametrize(
    ("values", "rows"),
    [
        (np.zeros((16, 256), np.int16), 8),
        (np.zeros((16, 256), np.uint16), 12),
        (np.zeros((16, 256), np.uint16), 0),
        (np.zeros((24, 256), np.uint16), 16),
        (np.zeros((16, 128), np.uint16), 8),
        (np.zeros(256, np.uint16), 8),
    ],
)
def test_refuses_slabs_of_heads_that_do_not_divide(values, rows):
    with pytest.raises(LayoutError):
        pack_head_slabs(values, rows)


def test_refuses_slabs_of_heads_of_another_size():
    with pytest.raises(LayoutError):
        unpack_head_slabs(np.zeros(16 * 256, np.uint8), (16, 256), 8)


def test_gate_and_up_alternate_every_8_rows():
    gate, up = np.arange(48).reshape(24, 2), 100 + np.arange(48).reshape(24, 2)
    rows = interleave_gate_up(gate, up)
    for row in range(48):
        source = (gate, up)[row // 8 % 2]
        np.testing.assert_array_equal(rows[row], source[row // 16 * 8 + row % 8])
    with pytest.raises(LayoutError):
        interleave_gate_up(gate[:12], up[:12])


def test_both_halves_of_a_head_alternate_every_8_rows():
    heads, dims = 3, 32
    qkv = np.arange((heads + 2) * dims * 2).reshape(-1, 2)
    rows = interleave_rotary(qkv, dims)
    for row in range((heads + 1) * dims):
        head, tile, half, channel = row // dims, row % dims // 16, row // 8 % 2, row % 8
        np.testing.assert_array_equal(rows[row], qkv[head * dims + half * dims // 2 + 8 * tile + channel])
    np.testing.assert_array_equal(rows[-dims:], qkv[-dims:])
    for wrong in (qkv[:-1], qkv[: 2 * dims]):
        with pytest.raises(LayoutError):
            interleave_rotary(wrong, dims)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_float_fragments_round_trip(rows, columns, seed):
    values = np.random.default_rng(seed).integers(0, 2**16, (16 * rows, 16 * columns)).astype(np.uint16)
    packed = pack_float_fragments(values)
    assert packed.dtype == np.uint8 and packed.shape == (rows * columns, 512)
    np.testing.assert_array_equal(unpack_float_fragments(packed, values.shape), values)


def test_float_fragments_multiply_as_the_tensor_cores_do():
    """Emulates the data movement of mma.m16n8k16; integers stand for bf16 values."""
    random = np.random.default_rng(0)
    weight, x = random.integers(0, 1000, (48, 64)), random.integers(0, 1000, 64)
    packed = pack_float_fragments(weight.astype(np.uint16))
    y = np.zeros(48, np.int64)
    for row, column, lane in np.ndindex(3, 4, 32):
        g, t = divmod(lane, 4)
        a = packed[row * 4 + column].view(np.uint16).reshape(32, 4, 2)[lane].astype(np.int64)
        b = x[16 * column + 4 * t :][:4].reshape(2, 2)  # one load: registers b0 and b1
        y[16 * row + g] += (a[0] * b[0]).sum() + (a[2] * b[1]).sum()
        y[16 * row + g + 8] += (a[1] * b[0]).sum() + (a[3] * b[1]).sum()
    np.testing.assert_array_equal(y, weight @ x)


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((16, 16), np.int16),
        np.zeros((8, 16), np.uint16),
        np.zeros((16, 24), np.uint16),
        np.zeros(16, np.uint16),
    ],
)
def test_refuses_float_fragments_that_do_not_fit(values):
    with pytest.raises(LayoutError):
        pack_float_fragments(values)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_int4_fragments_are_those_of_float(rows, columns, seed):
    """Nibble r + 4 i of a lane's word is value i of register a[r], plus 8; four tiles make 16 bytes of a lane."""
    values = np.random.default_rng(seed).integers(-8, 8, (16 * rows, 16 * columns)).astype(np.int8)
    packed = pack_int4_fragments(values)
    assert packed.dtype == np.uint8 and packed.shape == (rows * -(-columns // 4), 512)
    np.testing.assert_array_equal(unpack_int4_fragments(packed, values.shape), values)
    words = packed.view(np.uint32).reshape(rows, -1, 32, 4)
    registers = (
        pack_float_fragments(values.view(np.uint8).astype(np.uint16)).view(np.uint16).reshape(rows, columns, 32, 4, 2)
    )
    for tile, r, i in np.ndindex(columns, 4, 2):
        nibbles = words[:, tile // 4, :, tile % 4] >> np.uint32(4 * (r + 4 * i)) & np.uint32(15)
        np.testing.assert_array_equal(
            nibbles.astype(np.int8) - 8, registers[:, tile, :, r, i].astype(np.uint8).view(np.int8)
        )


@pytest.mark.parametrize(
    "values", [np.zeros((16, 16), np.uint8), np.full((16, 16), 8, np.int8), np.zeros((16, 24), np.int8)]
)
def test_refuses_int4_fragments_that_do_not_fit(values):
    with pytest.raises(LayoutError):
        pack_int4_fragments(values)


def test_refuses_float_fragments_of_another_size():
    with pytest.raises(LayoutError):
        unpack_float_fragments(np.zeros(510, np.uint8), (16, 16))
    with pytest.raises(LayoutError):
        unpack_int4_fragments(np.zeros(510, np.uint8), (16, 16))


matrices = st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(
    lambda s: hnp.arrays(np.int8, (s[0], 2 * s[1]), elements=st.integers(-8, 7))
)


@settings(deadline=None)
@given(matrices)
def test_bitblas_weights_are_nibbles_plus_8(values):
    packed = pack_bitblas(values)
    low, high = packed.astype(int) % 16, packed.astype(int) // 16
    np.testing.assert_array_equal(np.stack([low, high], -1).reshape(values.shape) - 8, values)
    np.testing.assert_array_equal(unpack_bitblas(packed, values.shape), values)
