"""The messages of openpi's policy server: msgpack with numpy arrays. Only plain values come out of them, never objects.

ndarray       {b"__ndarray__": True, b"data": bytes in C order, b"dtype": dtype.str, b"shape": [...]}
numpy scalar  {b"__npgeneric__": True, b"data": its value, b"dtype": dtype.str}
"""

from __future__ import annotations

import math
import re
import reprlib
import sys
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np

from duq.runtime.errors import MessageError
from duq.runtime.server_limits import one_line

KINDS = "biufU"  # bool, integers, floating point, text: what observations and actions consist of
MAX_LENGTH = 1024  # of a map or list that is not an ndarray
MAX_COLLECTIONS = 256  # maps and lists in a message; an observation has about twenty
MAX_TEXT = 64 << 10  # bytes of one text; a prompt has a few hundred
MAX_KEY = 128  # characters or bytes of a map's key
MAX_DIMS = 32  # of an array: numpy 1 knows no more
_DTYPE = re.compile(rf"[<>|=]?[{KINDS}]0*[1-9]\d{{0,4}}")


def pack(message: object) -> bytes:
    """Encodes dicts, lists, str, numbers and numpy values. TypeError for anything else (arrays of objects, complex)."""
    return msgpack.packb(message, default=_encode)


def unpack(data: bytes) -> Any:
    """Decodes one message from a stranger. Arrays are read-only views of what was received.

    Raises MessageError, before an array is made, unless its dtype is plain and its shape accounts for every byte.
    The memory used is a small multiple of `data`, whatever it holds.
    """
    decoder = _Decoder()
    hooks = {"object_hook": decoder.map, "list_hook": decoder.list, "ext_hook": _refuse_extension}
    limits = {"max_map_len": MAX_LENGTH, "max_array_len": MAX_LENGTH, "max_str_len": MAX_TEXT, "max_ext_len": 0}
    try:
        return msgpack.unpackb(data, **limits, **hooks)
    except MessageError:
        raise
    except ValueError as error:  # the root of all errors of msgpack's
        reason = one_line(str(error) or type(error).__name__, 150)
        if found := re.fullmatch(r"(\d+) exceeds max_(str|ext)_len\((\d+)\)", reason):
            what = {"str": f"a text of {found[1]} bytes", "ext": "an extension type"}[found[2]]
            expected = {"str": f"at most {found[3]}", "ext": "plain values and arrays"}[found[2]]
            raise MessageError(f"message: has {what}, expected {expected}") from error
        raise MessageError(f"message: is not msgpack as openpi-client sends it ({reason})") from error


class _Decoder:
    """The hooks for one message. It counts collections: an empty one takes a byte to send and a hundred to hold."""

    def __init__(self) -> None:
        self._room = MAX_COLLECTIONS

    def list(self, value: list[Any]) -> list[Any]:
        self._count()
        return value

    def map(self, value: dict[bytes | str, Any]) -> object:
        self._count()
        for key in value:
            if len(key) > MAX_KEY:
                raise MessageError(f"message: has a key of {len(key)} characters, expected at most {MAX_KEY}")
        if b"__ndarray__" in value:
            return _array(value)
        if b"__npgeneric__" in value:
            return _scalar(value)
        return value

    def _count(self) -> None:
        self._room -= 1
        if self._room < 0:
            raise MessageError(f"message: has more than {MAX_COLLECTIONS} maps and lists; send numbers as arrays")


class _Brief(reprlib.Repr):
    """Shows a stranger's value at a cost that does not grow with the value."""

    def repr_bytes(self, value: bytes, level: int) -> str:
        return f"{len(value)} bytes"

    def repr_ndarray(self, value: np.ndarray, level: int) -> str:
        return f"{value.dtype} {list(value.shape)}"


_brief = _Brief().repr


def _refuse_extension(code: int, data: bytes) -> object:
    raise MessageError("message: has an extension type, expected plain values and arrays")


def _array(fields: Mapping[Any, Any]) -> np.ndarray:
    dtype, shape, data = _dtype(fields), fields.get(b"shape"), fields.get(b"data")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise MessageError(f"array: has shape {_brief(shape)}, expected a list of sizes")
    if len(shape) > MAX_DIMS:
        raise MessageError(f"array: has {len(shape)} dimensions, which is not possible; at most {MAX_DIMS} are")
    if not isinstance(data, bytes):
        raise MessageError(f"array: its data is a {type(data).__name__}, expected bytes")
    if len(data) != (expected := math.prod(shape) * dtype.itemsize):
        raise MessageError(f"array: has {len(data)} bytes, but {dtype} {shape} takes {expected}")
    if dtype.kind == "b" and data.strip(b"\0\1"):  # numpy trusts a bool to be 0 or 1, also when it indexes with it
        raise MessageError("array: of bools holds bytes other than 0 and 1")
    if dtype.kind == "U":
        code_points = np.ndarray(len(data) // 4, np.dtype(np.uint32).newbyteorder(dtype.byteorder), data)
        if code_points.max(initial=0) > sys.maxunicode:
            raise MessageError("array: of text holds numbers that are no characters")
    try:
        return np.ndarray(shape, dtype, data)
    except ValueError as error:  # more dimensions than numpy has, a size beyond its range
        raise MessageError(f"array: {dtype} {_brief(shape)} is not possible ({error})") from error


def _scalar(fields: Mapping[Any, Any]) -> np.generic:
    dtype, value = _dtype(fields), fields.get(b"data")
    if not isinstance(value, (bool, int, float, str)):
        raise MessageError(f"scalar: is a {type(value).__name__}, expected a number or text")
    if dtype.kind in "iu" and not isinstance(value, str):
        limits = np.iinfo(dtype)
        if not limits.min <= value <= limits.max:  # numpy 1 wraps around
            raise MessageError(f"scalar: {_brief(value)} is no {dtype}")
    try:
        return dtype.type(value)
    except (ValueError, OverflowError) as error:
        raise MessageError(f"scalar: {_brief(value)} is no {dtype} ({error})") from error


def _dtype(fields: Mapping[Any, Any]) -> np.dtype:
    name = fields.get(b"dtype")
    if not isinstance(name, str) or not _DTYPE.fullmatch(name):
        raise MessageError(f"array: has dtype {_brief(name)}, expected bool, integer, floating point or text")
    try:
        return np.dtype(name)
    except TypeError as error:
        raise MessageError(f"array: has dtype {name!r}, which numpy does not know") from error


def _encode(value: object) -> dict[bytes, Any]:
    if not isinstance(value, (np.ndarray, np.generic)) or value.dtype.kind not in KINDS:
        kind = getattr(value, "dtype", type(value).__name__)
        raise TypeError(f"{kind} cannot be sent")
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
