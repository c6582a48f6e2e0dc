"""INT4 packing against ONNX's own and against plain arithmetic."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from plugins.errors import LayoutError
from plugins.layout import pack_int4, unpack_int4

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
