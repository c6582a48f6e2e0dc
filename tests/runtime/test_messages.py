"""Messages against openpi-client's own encoder and decoder, and against everything a stranger may send."""

import tracemalloc

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from openpi_client import msgpack_numpy

from duq.runtime.errors import MessageError
from duq.runtime.messages import MAX_COLLECTIONS, pack, unpack

DTYPES = st.one_of(
    arrays.boolean_dtypes(), arrays.integer_dtypes(), arrays.floating_dtypes(), arrays.unicode_string_dtypes()
)
ARRAYS = DTYPES.flatmap(lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, min_side=0)))
SCALARS = st.one_of(arrays.boolean_dtypes(), arrays.integer_dtypes(), arrays.floating_dtypes()).flatmap(arrays.from_dtype)
PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
MESSAGES = st.recursive(
    ARRAYS | SCALARS | PLAIN, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)


def same(left, right) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, (np.ndarray, np.generic)):
        kind = [(type(each), each.dtype, each.shape) for each in (left, right)]
        return kind[0] == kind[1] and left.tobytes() == right.tobytes()
    return type(left) is type(right) and (left == right or left != left)


@settings(max_examples=50)
@given(MESSAGES)
def test_what_openpi_client_sends_is_understood_and_the_other_way_round(message):
    data = msgpack_numpy.packb(message)
    assert pack(message) == data and same(unpack(data), msgpack_numpy.unpackb(data))


@settings(max_examples=50)
@given(st.binary() | MESSAGES.map(pack).flatmap(lambda data: st.integers(0, len(data)).map(lambda end: data[:end])))
def test_any_bytes_are_a_message_or_an_error(data):
    try:
        unpack(data)
    except MessageError as error:
        assert "\n" not in str(error)


@given(
    st.binary(max_size=16),
    st.text() | st.integers() | st.sampled_from(["<f4", "|b1", "<U2", ">i8"]),
    st.lists(st.integers(-1, 9)),
)
def test_any_array_accounts_for_its_bytes_or_is_an_error(data, dtype, shape):
    if isinstance(dtype, int) and not -(2**63) <= dtype < 2**64:
        dtype = 0
    try:
        array = unpack(msgpack.packb({b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}))
    except MessageError:
        return
    assert (
        array.tobytes() == data and list(array.shape) == shape and not array.flags.writeable and array.tolist() is not None
    )


def array(**fields) -> bytes:
    whole = {"__ndarray__": True, "data": b"\0" * 8, "dtype": "<f4", "shape": [2]} | fields
    return msgpack.packb({key.encode(): value for key, value in whole.items()})


def scalar(data, dtype) -> bytes:
    return msgpack.packb({b"__npgeneric__": True, b"data": data, b"dtype": dtype})


@pytest.mark.parametrize("data, message", [
    (b"", "incomplete input"),
    (b"\xc1", "FormatError"),
    (pack({}) + b"\0", "extra data"),
    (b"\xa2\xff\xfe", "can't decode byte"),
    (b"\x91" * 10_000, "StackError"),
    (b"\xdd\xff\xff\xff\xff", "exceeds max_array_len"),
    (b"\xdf\xff\xff\xff\xff", "exceeds max_map_len"),
    (b"\xdc\x03\xff" + b"\x80" * 1023, f"more than {MAX_COLLECTIONS} maps and lists"),
    (array(dtype="|O"), r"dtype '\|O', expected bool, integer, floating point or text"),
    (array(dtype="|V8"), r"dtype '\|V8'"),
    (array(dtype="<c8"), "dtype '<c8'"),
    (array(dtype="<f4,<f4"), "dtype '<f4,<f4'"),
    (array(dtype="(2,)f4"), r"dtype '\(2,\)f4'"),
    (array(dtype="<f3"), "'<f3', which numpy does not know"),
    (array(dtype="<U0"), "dtype '<U0'"),
    (array(dtype=["<f4"]), r"dtype \['<f4'\]"),
    (array(shape=[3]), r"has 8 bytes, but float32 \[3\] takes 12"),
    (array(shape=[-1, -2]), r"shape \[-1, -2\]"),
    (array(shape=[True, 2]), "shape .True, 2."),
    (array(shape="12"), "shape '12', expected a list"),
    (array(shape=[2**40, 2**40]), "has 8 bytes, but"),
    (array(shape=[2**63, 0], data=b""), "is not possible"),
    (array(shape=[1] * 100, data=b"\0" * 4), "100 dimensions, which is not possible"),
    (array(shape=[2**64 - 1] * 32), "has 8 bytes, but float32"),
    (array(shape=["x" * 60_000] * 1000), r"shape \['xxxxxxxxx.*, \.\.\.\], expected a list"),
    (array(dtype=b"\0" * 100_000), "dtype 100000 bytes"),
    (msgpack.packb({"x" * 129: 1}), "has a key of 129 characters, expected at most 128"),
    (msgpack.packb({b"x" * 129: 1}), "has a key of 129 characters"),
    (msgpack.packb("x" * 65_537), "has a text of 65537 bytes, expected at most 65536"),
    (b"\xdb\xff\xff\xff\xff", "incomplete input"),
    (b"\xc6\xff\xff\xff\xff", "incomplete input"),
    (msgpack.packb([msgpack.ExtType(5, b"")]), "has an extension type"),
    (msgpack.packb([msgpack.ExtType(5, b"abc")]), "has an extension type, expected plain values and arrays"),
    (msgpack.packb([msgpack.Timestamp(1, 1)]), "has an extension type"),
    (b"\x81\x01\x02", "int is not allowed for map key"),
    (array(data="text"), "data is a str, expected bytes"),
    (array(data=b"\0\2", dtype="|b1"), "bytes other than 0 and 1"),
    (array(data=b"\xff" * 8, dtype="<U2", shape=[1]), "no characters"),
    (scalar("x", "<f4"), "'x' is no float32"),
    (scalar(300, "|u1"), "300 is no uint8"),
    (scalar([1], "<f4"), "is a list, expected a number or text"),
    (scalar(1, "|O"), "dtype '|O'"),
], ids=lambda each: each if isinstance(each, str) else f"{len(each)} bytes")  # fmt: skip
def test_hostile_messages(data, message):
    with pytest.raises(MessageError, match=message):
        unpack(data)


def test_an_error_costs_no_more_than_its_message():
    """Whatever it repeats of the message is short before it is shown."""
    for data in (array(dtype=bytes(16 << 20)), array(shape=[bytes(16 << 20)]), scalar(bytes(16 << 20), "<f4")):
        tracemalloc.start()
        with pytest.raises(MessageError) as error:
            unpack(data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2 * len(data) and len(str(error.value)) < 300


@pytest.mark.parametrize("value", [np.array([object()]), np.zeros(2, complex), np.zeros(1, "V4"), object(), {1, 2}])
def test_only_plain_values_are_sent(value):
    with pytest.raises(TypeError, match="cannot be sent"):
        pack({"value": value})
