"""Camera images, resized without distortion as the policy saw them in training, padded where they leave room.

Rules differ by who trained the policy, and so do pixels. "openpi" stays in bytes; LeRobot's are floats throughout:

    rule           interpolation                           the image lies   padding, as the model sees it
    openpi         antialiased, rounded to bytes           in the center    -1
    lerobot        of the 4 nearest pixels, not rounded    in the center    -1   (LeRobot 0.5 and later)
    lerobot-0.4    the same                                in the center    -3   (the value -1 of 0..1, doubled, less 1)
    lerobot-0.3    the same                                at right bottom  -1

The loops are in resize.c, compiled when duq is installed. Where there is no C compiler, Pillow and numpy compute the very
same values, more slowly.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from PIL import Image

from duq.runtime.errors import ObservationError

MAX_THREADS = 4
_FRACTION = 22  # bits behind the point of Pillow's integer weights
_VERSION, _BLOCK, _ROWS = 1, 32, 4  # resize_version, BLOCK and ROWS of resize.c


@dataclass(frozen=True)
class FloatRule:
    """padding: in the model's units; low, high: what values of 0..1 are clamped to; centered: or else at right bottom."""

    padding: float
    low: float
    high: float
    centered: bool


FLOAT_RULES = {
    "lerobot": FloatRule(-1.0, 0.0, 1.0, True),
    "lerobot-0.4": FloatRule(-3.0, -1.0, 1.0, True),
    "lerobot-0.3": FloatRule(-1.0, -math.inf, math.inf, False),
}
RULES = ("openpi", *FLOAT_RULES)


def resize_with_pad(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes uint8 [H, W, 3] to [height, width, 3] by openpi's rule; may return the image itself.

    Bit for bit what openpi's client does to an image before sending it.
    """
    if image.shape[:2] == (height, width):
        return image
    return resize_all([image], height, width)[0]


def resize_float(image: np.ndarray, height: int, width: int, rule: str) -> np.ndarray:
    """Resizes uint8, or float32 in [0, 1], of [H, W, 3] to float32 [height, width, 3] in [-1, 1], by a rule of FLOAT_RULES.

    Padding may lie outside of [-1, 1]. Each operation is rounded to float32; LeRobot's own results differ by what its
    processor fuses, less than 1e-6. ObservationError: another dtype, or an image so narrow that nothing of it is left.
    """
    return resize_all([image], height, width, rule)[0]


def resize_all(images: Sequence[np.ndarray | None], height: int, width: int, rule: str = "openpi") -> np.ndarray:
    """Resizes images side by side, on up to MAX_THREADS threads -> [N, height, width, 3]; zeros for None.

    rule: "openpi", uint8 -> uint8 as resize_with_pad; or one of FLOAT_RULES, -> float32 as resize_float.
    """
    resized = np.empty((len(images), height, width, 3), np.uint8 if rule == "openpi" else np.float32)
    work: list[Callable[[], None]] = []
    for image, out in zip(images, resized, strict=True):
        if image is None:
            out[:] = 0
        elif rule == "openpi":
            work += _openpi(image, out)
        else:
            work += _lerobot(image, out, FLOAT_RULES[rule])
    if work:
        _run(work)
    return resized


def copy(image: np.ndarray, to: np.ndarray) -> None:
    """Copies [H, W, 3]; a view of [3, H, W] plane by plane, in a sixth of the time numpy takes for pixel by pixel."""
    if image.strides[2] == image.itemsize:
        to[:] = image
    else:
        for channel in range(3):
            to[..., channel] = image[..., channel]


# --- the rules -------------------------------------------------------------------------------------------------------


def _openpi(image: np.ndarray, out: np.ndarray) -> list[Callable[[], None]]:
    """What writes the image into `out`, in parts that may run at the same time; so does _lerobot."""
    if image.shape == out.shape:
        copy(image, out)
        return []
    height, width = (max(1, size) for size in _resized(image, *out.shape[:2]))
    inside = _inside(out, height, width, centered=True, padding=0)
    if _compiled is None:
        return [partial(_resize_by_pillow, image, inside)]
    rows, columns = _antialiased(image.shape[0], height), _antialiased(image.shape[1], width)
    return _strips(height, partial(_resize_bytes, image, rows, columns, inside))


def _lerobot(image: np.ndarray, out: np.ndarray, rule: FloatRule) -> list[Callable[[], None]]:
    if image.dtype not in (np.uint8, np.float32):
        raise ObservationError(f"image: has dtype {image.dtype}, expected uint8 or float32")
    check_shape(image, out.shape[0], out.shape[1], "lerobot")
    height, width = _resized(image, *out.shape[:2])
    inside = _inside(out, height, width, rule.centered, rule.padding)
    rows, columns = _nearest_two(image.shape[0], height), _nearest_two(image.shape[1], width)
    limits = (-math.inf, math.inf) if image.shape == out.shape else (rule.low, rule.high)
    resize = _resize_by_numpy if _compiled is None else _resize_floats
    return _strips(height, partial(resize, image, rows, columns, limits, inside))


def check_shape(image: np.ndarray, height: int, width: int, rule: str) -> None:
    """ObservationError if so little of the image fits into height x width that nothing is left; openpi leaves a line."""
    if rule != "openpi" and 0 in _resized(image, height, width):
        raise ObservationError(
            f"image: {image.shape[0]} x {image.shape[1]} pixels are too narrow, nothing of them is left in "
            f"{height} x {width}; crop the image"
        )


def _resized(image: np.ndarray, height: int, width: int) -> tuple[int, int]:
    """Height and width of what fits: 6.999 becomes 6, in openpi and in LeRobot."""
    ratio = max(image.shape[1] / width, image.shape[0] / height)
    return int(image.shape[0] / ratio), int(image.shape[1] / ratio)


def _inside(out: np.ndarray, height: int, width: int, centered: bool, padding: float) -> np.ndarray:
    """The view of `out` where the image goes; what is around it becomes `padding`."""
    top, left = out.shape[0] - height, out.shape[1] - width
    if centered:
        top, left = top // 2, left // 2
    out[:top] = out[top + height :] = padding
    out[:, :left] = out[:, left + width :] = padding
    return out[top : top + height, left : left + width]


# --- weights ---------------------------------------------------------------------------------------------------------


class Axis(NamedTuple):
    """Output i is the sum of inputs first[i] .. first[i] + taps - 1, times weights[i]; as resize.c and as numpy take it."""

    first: np.ndarray  # int32 [size]
    weights: np.ndarray  # int32 or float32 [size, taps]

    @property
    def taps(self) -> int:
        return self.weights.shape[1]


def _axis(first: np.ndarray, weights: np.ndarray, inputs: int) -> Axis:
    """Without what no output needs; windows that end beyond the last input begin earlier instead."""
    taps = int(np.flatnonzero(weights.any(0))[-1]) + 1
    weights, last = weights[:, :taps], inputs - taps
    for index in np.flatnonzero(first > last):
        weights[index] = np.roll(weights[index], first[index] - last)  # the weights beyond are zeros
    return Axis(np.minimum(first, last).astype(np.int32), np.ascontiguousarray(weights))


@lru_cache(64)
def _antialiased(inputs: int, outputs: int) -> Axis:
    """Pillow's weights for a triangle as wide as an output, or as an input if that is wider: integers, of which
    2 ** _FRACTION stands for 1."""
    scale = inputs / outputs
    support = max(scale, 1.0)
    center = (np.arange(outputs) + 0.5) * scale
    first = np.maximum((center - support + 0.5).astype(int), 0)
    end = np.minimum((center + support + 0.5).astype(int), inputs)
    taps = np.arange((end - first).max())
    weights = np.maximum(1 - np.abs((taps + first[:, None] - center[:, None] + 0.5) * (1 / support)), 0)
    weights[taps >= (end - first)[:, None]] = 0
    total = np.cumsum(weights, axis=1)[:, -1:]  # one after the other
    return _axis(first, (weights / total * (1 << _FRACTION) + 0.5).astype(np.int32), inputs)


@lru_cache(64)
def _nearest_two(inputs: int, outputs: int) -> Axis:
    """torch's weights (bilinear, align_corners=False): the two inputs around an output's place, in float32."""
    scale = np.float32(inputs) / np.float32(outputs)
    place = np.float64(scale) * (np.arange(outputs) + 0.5) - 0.5  # rounded once, as torch's fused multiply-add
    place = np.maximum(np.float32(place), 0)
    first = np.minimum(place.astype(int), inputs - 1)
    second = np.where(first < inputs - 1, np.clip(place - np.float32(first), 0, 1), np.float32(0))
    return _axis(first, np.stack([1 - second, second], 1).astype(np.float32), inputs)


# --- the loops -------------------------------------------------------------------------------------------------------


class _CImage(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("height", "width", "row", "column", "channel")),
    ]


class _CAxis(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_int64), ("taps", ctypes.c_int64), ("first", ctypes.c_void_p), ("weights", ctypes.c_void_p)
    ]  # fmt: skip


def _load() -> ctypes.CDLL | None:
    """resize.c, or None where it was not compiled, or compiled from another version of the source."""
    spec = importlib.util.find_spec("duq.runtime._resize")
    if spec is None or spec.origin is None:
        return None
    try:
        library = ctypes.CDLL(spec.origin)
        if ctypes.c_int32.in_dll(library, "resize_version").value != _VERSION:
            return None
    except (OSError, ValueError):  # for another machine; without a version
        return None
    images, axes, rows = [ctypes.POINTER(_CImage)], 2 * [ctypes.POINTER(_CAxis)], 2 * [ctypes.c_int64]
    out: list[type[ctypes.c_void_p | ctypes.c_int64]] = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    library.resize_bytes.argtypes = [*images, *axes, *rows, *out]
    library.resize_floats.argtypes = [*images, ctypes.c_int, *axes, *rows, ctypes.c_float, ctypes.c_float, *out]
    library.resize_bytes.restype = library.resize_floats.restype = None
    return library


_compiled = _load()


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _c_image(image: np.ndarray) -> _CImage:
    return _CImage(_address(image), *image.shape[:2], *image.strides)


def _c_axis(axis: Axis) -> _CAxis:
    return _CAxis(*axis.weights.shape, _address(axis.first), _address(axis.weights))


def _resize_bytes(image: np.ndarray, rows: Axis, columns: Axis, out: np.ndarray, begin: int, end: int) -> None:
    assert _compiled is not None
    width, inputs = 3 * out.shape[1], rows.first[end - 1] + rows.taps - rows.first[begin]
    work = np.empty(4 * _ROWS * (3 * image.shape[1] + width + 2) + width * int(inputs) + _BLOCK, np.uint8)
    _compiled.resize_bytes(
        _c_image(image), _c_axis(rows), _c_axis(columns), begin, end, _address(out), out.strides[0], _address(work)
    )


def _resize_floats(
    image: np.ndarray, rows: Axis, columns: Axis, limits: tuple[float, float], out: np.ndarray, begin: int, end: int
) -> None:
    assert _compiled is not None
    image = np.require(image, requirements="A")
    work = np.empty(3 * image.shape[1] + 1 + 2 * (3 * out.shape[1] + 1), np.float32)
    _compiled.resize_floats(
        _c_image(image), image.dtype == np.float32, _c_axis(rows), _c_axis(columns), begin, end, *limits,
        _address(out), out.strides[0] // 4, _address(work),
    )  # fmt: skip


def _resize_by_pillow(image: np.ndarray, out: np.ndarray) -> None:
    if not image.flags.c_contiguous:
        dense = np.empty(image.shape, np.uint8)
        copy(image, dense)
        image = dense
    out[:] = Image.fromarray(image).resize(out.shape[1::-1], Image.Resampling.BILINEAR)


def _resize_by_numpy(
    image: np.ndarray, rows: Axis, columns: Axis, limits: tuple[float, float], out: np.ndarray, begin: int, end: int
) -> None:
    def narrow(lines: np.ndarray) -> np.ndarray:
        values = (lines[:, columns.first + tap] for tap in range(columns.taps))
        values = (each if each.dtype == np.float32 else each / np.float32(255) for each in values)
        return sum(each * weight[:, None] for each, weight in zip(values, columns.weights.T, strict=True))

    first, weights = rows.first[begin:end], rows.weights[begin:end].T
    values = sum(narrow(image[first + tap]) * weight[:, None, None] for tap, weight in enumerate(weights))
    out[begin:end] = np.clip(values, *limits) * np.float32(2) - np.float32(1)


# --- threads ---------------------------------------------------------------------------------------------------------


def _strips(height: int, resize: Callable[[int, int], None]) -> list[Callable[[], None]]:
    """resize(begin, end) for the upper and the lower half of the rows, so that three images keep two threads busy."""
    bounds = [0, height // 2, height] if height > 1 else [0, height]
    return [partial(resize, *part) for part in pairwise(bounds)]


def _run(work: list[Callable[[], None]]) -> None:
    """On this thread, and on those of the pool that get to it before; the loops do not hold the interpreter's lock."""
    left = deque(work)
    others = min(MAX_THREADS, _cores(), len(work)) - 1 if len(work) > 1 else 0
    helpers = [_pool(os.getpid()).submit(_run_what_is_left, left) for _ in range(others)]
    try:
        _run_what_is_left(left)
    finally:
        left.clear()
        for helper in helpers:
            if not helper.cancel():
                helper.result()


def _run_what_is_left(work: deque[Callable[[], None]]) -> None:
    while True:
        try:
            task = work.popleft()
        except IndexError:
            return
        task()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Of the process: a fork has none of its parent's threads."""
    return ThreadPoolExecutor(MAX_THREADS - 1, thread_name_prefix="resize")
