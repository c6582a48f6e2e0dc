"""What enters the transformers, patches of images and rows of the token table: embed.cu."""

from __future__ import annotations

import numpy as np

from duq.plugins.kernel import Instance, Kernel, Shape
from duq.plugins.kernels.reference import Launched, Pointer
from duq.plugins.kernels.row import row_in_registers


def _reference_of_bytes(launch: Launched, images: Pointer, y: Pointer, size: int, pitch: int) -> None:
    pixels = images.read("unsigned char", launch.grid[1], size, size, 3) / np.float32(127.5) - np.float32(1)
    _write_patches(launch, pixels, y, pitch)


def _reference_of_floats(launch: Launched, images: Pointer, y: Pointer, size: int, pitch: int) -> None:
    _write_patches(launch, images.read("float", launch.grid[1], size, size, 3), y, pitch)


def _write_patches(launch: Launched, pixels: np.ndarray, y: Pointer, pitch: int) -> None:
    patch, (count, cameras, _) = launch.number("PATCH"), launch.grid
    across = pixels.shape[1] // patch
    assert count == across**2
    pixels = pixels.reshape(cameras, across, patch, across, patch, 3)
    rows = pixels.transpose(0, 1, 3, 5, 2, 4).reshape(cameras * count, -1)
    y.write("Bf16", np.pad(rows, ((0, 0), (0, pitch - rows.shape[1]))))


def _reference_of_tokens(launch: Launched, rows: Pointer, y: Pointer, depth: int, y_stride: int, scale: float) -> None:
    y.write("float", rows.read("Bf16", launch.grid[0], depth) * np.float32(scale), y_stride)


PATCHES = Kernel(
    "embed.cu",
    "patches",
    "int PATCH",
    "const unsigned char* images, Bf16* y, int size, int pitch",
    _reference_of_bytes,
)
FLOAT_PATCHES = Kernel(
    "embed.cu",
    "float_patches",
    "int PATCH",
    "const float* images, Bf16* y, int size, int pitch",
    _reference_of_floats,
)
TOKENS = Kernel(
    "embed.cu",
    "tokens",
    "",
    "const Bf16* rows, float* y, int depth, int y_stride, float scale",
    _reference_of_tokens,
)


def patches(cameras: int, size: int, patch: int, pixel: str = "unsigned char") -> Instance:
    """Images of `size` x `size` pixels ("unsigned char" or "float") in patches of `patch` x `patch`; a thread takes two."""
    threads = 32 * -(-(patch**2) // (2 * 32))
    kernel = FLOAT_PATCHES if pixel == "float" else PATCHES
    return kernel.instance(Shape(((size // patch) ** 2, cameras, 1), threads), PATCH=patch)


def tokens(count: int, depth: int) -> Instance:
    """`count` rows of the token table, `depth` channels each, scaled to float32."""
    return TOKENS.instance(Shape((count, 1, 1), row_in_registers(depth)[1]))
