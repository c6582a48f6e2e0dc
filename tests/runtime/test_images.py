"""Resized images: openpi's rule against Pillow bit for bit, LeRobot's against torch; compiled loops and without."""

from __future__ import annotations

import math
import multiprocessing

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from duq.runtime import images
from duq.runtime.errors import ObservationError
from duq.runtime.images import FLOAT_RULES, resize_all, resize_float, resize_with_pad

COMPILED = images._compiled
LOOPS = [pytest.param(COMPILED, id="compiled", marks=pytest.mark.skipif(COMPILED is None, reason="not compiled")), None]
LAYOUTS = ["dense", "planes", "upside down", "mirrored", "every second", "in a wider one"]


@pytest.fixture(params=LOOPS)
def loops(request, monkeypatch):
    """Both ways to compute, one after the other."""
    monkeypatch.setattr(images, "_compiled", request.param)


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch):
    monkeypatch.setattr(images.os, "sched_getaffinity", lambda _: range(request.param), raising=False)


def sides(most: int) -> st.SearchStrategy[int]:
    return st.one_of(st.integers(1, 8), st.integers(1, most))


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Bytes of all values, many of them the greatest and the least."""
    random = np.random.default_rng([seed, height, width])
    return random.choice(np.array([0, 255, *range(256)], np.uint8), (height, width, 3))


def laid_out(image: np.ndarray, layout: str) -> np.ndarray:
    """The same pixels, elsewhere in memory."""
    match layout:
        case "planes":
            return np.ascontiguousarray(image.transpose(2, 0, 1)).transpose(1, 2, 0)
        case "upside down":
            return image[::-1].copy()[::-1]
        case "mirrored":
            return image[:, ::-1, ::-1].copy()[:, ::-1, ::-1]
        case "every second":
            return image.repeat(2, 0).repeat(2, 1)[::2, ::2]
        case "in a wider one":
            return np.pad(image, ((1, 2), (3, 1), (1, 1)), constant_values=77)[1:-2, 3:-1, 1:-1]
    return image


def openpi_peer(image: np.ndarray, height: int, width: int) -> np.ndarray:
    ratio = max(image.shape[1] / width, image.shape[0] / height)
    size = max(1, int(image.shape[1] / ratio)), max(1, int(image.shape[0] / ratio))
    canvas = Image.new("RGB", (width, height))
    resized = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
    canvas.paste(resized, ((width - size[0]) // 2, (height - size[1]) // 2))
    return np.asarray(canvas)


def lerobot_peer(image: np.ndarray, height: int, width: int, rule: str) -> np.ndarray:
    """LeRobot's steps, in torch: [0, 1] in float32, interpolate, clamp, pad, then to [-1, 1]."""
    x = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    x = x.float() / 255 if x.dtype == torch.uint8 else x
    if x.shape[2:] != (height, width):
        ratio = max(x.shape[3] / width, x.shape[2] / height)
        size = int(x.shape[2] / ratio), int(x.shape[3] / ratio)
        x = torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=False)
        rest_h, rest_w = height - size[0], width - size[1]
        centered = (rest_w // 2, rest_w - rest_w // 2, rest_h // 2, rest_h - rest_h // 2)
        sides, value = {
            "lerobot": (centered, 0.0), "lerobot-0.4": (centered, -1.0), "lerobot-0.3": ((rest_w, 0, rest_h, 0), 0.0)
        }[rule]  # fmt: skip
        x = x.clamp(0, 1) if rule == "lerobot" else x.clamp(-1, 1) if rule == "lerobot-0.4" else x
        x = torch.nn.functional.pad(x, sides, value=value)
    return (x * 2.0 - 1.0)[0].permute(1, 2, 0).numpy()


# --- openpi ----------------------------------------------------------------------------------------------------------


@given(sides(700), sides(700), sides(300), sides(300), st.sampled_from(LAYOUTS))
@example(480, 640, 224, 224, "dense")
@example(480, 640, 224, 224, "planes")
@example(1, 1, 224, 224, "dense")
@example(1, 1000, 224, 224, "dense")  # nothing is left of its height but the one row that openpi keeps
@example(1000, 1, 224, 224, "planes")
@example(223, 225, 224, 224, "dense")
@example(1080, 1920, 224, 224, "dense")
@settings(max_examples=150, deadline=None)
@pytest.mark.skipif(COMPILED is None, reason="not compiled")
def test_openpi_is_pillow_bit_for_bit(height, width, out_height, out_width, layout):
    image = noise(height, width)
    resized = resize_with_pad(laid_out(image, layout), out_height, out_width)
    assert resized.dtype == np.uint8 and np.array_equal(resized, openpi_peer(image, out_height, out_width))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(480, 640), (31, 224), (300, 17), (9, 9), (224, 224)])
def test_openpi_both_ways(size, layout, loops, threads):
    image = noise(*size)
    assert np.array_equal(resize_with_pad(laid_out(image, layout), 224, 224), openpi_peer(image, 224, 224))


@given(st.integers(1, 3000), st.integers(1, 300))
def test_weights_of_bytes_add_up(inputs, outputs):
    """So that a sum, rounded, is a byte: the compiled loops rely on it; and stays below 2**31."""
    axis = images._antialiased(inputs, outputs)
    assert axis.first.min() >= 0 and axis.first.max() + axis.taps <= inputs and (axis.weights >= 0).all()
    assert (abs(axis.weights.sum(1) - (1 << 22)) < axis.taps).all() and 255 * axis.taps < 1 << 21


# --- LeRobot ---------------------------------------------------------------------------------------------------------


@given(
    sides(700), sides(700), sides(300), sides(300), st.sampled_from(list(FLOAT_RULES)), st.booleans(),
    st.sampled_from(LAYOUTS),
)  # fmt: skip
@example(480, 640, 224, 224, "lerobot", False, "dense")
@example(480, 640, 224, 224, "lerobot-0.4", True, "planes")
@example(1080, 1920, 224, 224, "lerobot-0.3", False, "dense")
@settings(max_examples=150, deadline=None)
def test_lerobot_is_torch(height, width, out_height, out_width, rule, floats, layout):
    image = noise(height, width)
    if floats:
        image = np.random.default_rng(width).random(image.shape, np.float32)
    ratio = max(width / out_width, height / out_height)
    if not (int(height / ratio) and int(width / ratio)):
        with pytest.raises(ObservationError, match=f"{height} x {width} pixels are too narrow.*crop"):
            resize_float(image, out_height, out_width, rule)
        return
    resized = resize_float(laid_out(image, layout), out_height, out_width, rule)
    assert resized.dtype == np.float32
    np.testing.assert_allclose(resized, lerobot_peer(image, out_height, out_width, rule), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", FLOAT_RULES)
@pytest.mark.parametrize("floats", [False, True])
@pytest.mark.parametrize("size", [(480, 640), (31, 200), (300, 17), (9, 9), (1, 5), (224, 224), (2000, 9)])
def test_lerobot_both_ways_are_the_same_bits(size, floats, rule, threads, monkeypatch):
    image = noise(*size).astype(np.float32) / np.float32(255) if floats else noise(*size)
    found = resize_float(image, 224, 224, rule)
    assert np.abs(found - lerobot_peer(image, 224, 224, rule)).max() <= 1e-6
    monkeypatch.setattr(images, "_compiled", None)
    assert np.array_equal(found, resize_float(image, 224, 224, rule))


@pytest.mark.parametrize("rule", FLOAT_RULES)
def test_lerobot_takes_images_of_the_size_as_they_are(rule, loops):
    image = np.resize(np.arange(256, dtype=np.uint8), (28, 28, 3))
    expected = image / np.float32(255) * np.float32(2) - np.float32(1)
    assert np.array_equal(resize_float(image, 28, 28, rule), expected)
    assert np.array_equal(resize_float(image / np.float32(255), 28, 28, rule), expected)
    assert np.array_equal(expected, image / np.float32(127.5) - np.float32(1))  # of bytes, as the models' own way


@pytest.mark.parametrize("rule", FLOAT_RULES)
def test_padding_by_version(rule, loops):
    resized = resize_float(np.full((20, 40, 3), 255, np.uint8), 40, 40, rule)
    padding = resized[:20] if rule == "lerobot-0.3" else resized[np.r_[:10, 30:40]]
    assert (padding == (-3 if rule == "lerobot-0.4" else -1)).all() and (resized == 1).sum() == 20 * 40 * 3


@pytest.mark.parametrize("rule", FLOAT_RULES)
@pytest.mark.parametrize("size", [(20, 30), (28, 28)])
def test_values_beyond_the_range_are_clamped_as_in_that_version(size, rule, loops):
    image = np.resize(np.float32([-2, -0.5, 0, 0.5, 1, 2, np.nan]), (*size, 3))
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(resize_float(image, 28, 28, rule), lerobot_peer(image, 28, 28, rule), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int64, bool, ">f4"])
def test_lerobot_refuses_other_types(dtype):
    with pytest.raises(ObservationError, match="has dtype .*expected uint8 or float32"):
        resize_float(np.zeros((4, 4, 3), dtype), 28, 28, "lerobot")


def test_unaligned_floats(loops):
    image = np.frombuffer(b"\0" + np.random.default_rng(0).random((9, 7, 3), np.float32).tobytes(), np.uint8)[1:]
    image = image.view(np.float32).reshape(9, 7, 3)
    assert not image.flags.aligned
    assert np.array_equal(resize_float(image, 28, 28, "lerobot"), resize_float(image.copy(), 28, 28, "lerobot"))


# --- several images --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", images.RULES)
def test_each_image_as_alone(rule, loops, threads):
    three = [noise(48, 64), None, laid_out(noise(100, 30), "planes")]
    resized = resize_all(three, 28, 28, rule)
    alone = [resize_with_pad(each, 28, 28) if rule == "openpi" else resize_float(each, 28, 28, rule) for each in three[::2]]
    assert np.array_equal(resized[::2], alone) and not resized[1].any()
    assert resized.dtype == (np.uint8 if rule == "openpi" else np.float32)


def test_many_threads_at_once(monkeypatch):
    """Callers share the pool, and their results do not mix."""
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr(images.os, "sched_getaffinity", lambda _: range(4), raising=False)
    many = [noise(48, 64, seed) for seed in range(40)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda image: resize_all([image, image], 28, 28), many))
    assert all(np.array_equal(each, [openpi_peer(image, 28, 28)] * 2) for each, image in zip(found, many, strict=True))


def test_a_library_of_another_version_is_not_used(monkeypatch):
    monkeypatch.setattr(images, "_VERSION", -1)
    assert images._load() is None


def test_a_library_that_does_not_load_is_not_used(monkeypatch, tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"\x7fELF for another machine")
    monkeypatch.setattr(images.importlib.util, "find_spec", lambda _: type("Spec", (), {"origin": str(broken)}))
    assert images._load() is None


def _in_child(queue) -> None:
    queue.put(resize_all([noise(48, 64)] * 3, 28, 28))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_works_in_a_forked_process(threads):
    expected = resize_all([noise(48, 64)] * 3, 28, 28)  # starts the threads, which the child then lacks
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,), daemon=True)
    child.start()
    try:
        assert np.array_equal(queue.get(timeout=30), expected)
    finally:
        child.kill()


def test_an_image_does_not_change_and_need_not_be_writable(loops):
    image = noise(48, 64)
    image.flags.writeable = False
    before = image.copy()
    for rule in images.RULES:
        resize_all([image], 28, 28, rule)
    assert np.array_equal(image, before) and math.isfinite(resize_float(image, 28, 28, "lerobot").sum())
