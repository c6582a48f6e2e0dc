"""Float activations to INT8, with the norm or GeGLU in front and the rotation: rotate_quantize.cu."""

from __future__ import annotations

import numpy as np

from duq.plugins.kernel import Instance, Kernel, Shape
from duq.plugins.kernels.reference import Launched, Pointer, affine, gelu, hadamard, rms_norm, rotate_blocks
from duq.plugins.kernels.row import row_in_registers
from duq.plugins.layout import activation_slabs


def reference(
    launch: Launched,
    x: Pointer,
    gain: Pointer | None,
    shift: Pointer | None,
    input_scale: Pointer | None,
    permutation: Pointer | None,
    rotation: Pointer | None,
    activation_scale: Pointer | None,
    x_q: Pointer,
    x_scale: Pointer | None,
    depth: int,
    padded_depth: int,
    row_stride: int,
    block: int,
    slab_tokens: int,
    epsilon: float,
) -> None:
    source, how, m = launch["SOURCE"], launch["BLOCK"], launch.grid[0]
    assert 8 * launch.number("VECTORS") * launch.threads >= padded_depth >= depth
    v = x.read(launch["In"], m, depth, stride=row_stride)
    if source == "GEGLU":
        v = gelu(v) * x.read(launch["In"], m, depth, stride=row_stride, at=depth)
    if source == "LAYER_NORM":
        v -= v.mean(-1, keepdims=True)
    if source in ("RMS_NORM", "LAYER_NORM"):
        v = rms_norm(v, epsilon)
    v = affine(affine(v, gain, shift), input_scale)
    if permutation is not None:
        v = v[:, permutation.read("int", depth)]
    if how == "DENSE":
        assert rotation is not None
        v = rotate_blocks(v, rotation, block)
    else:
        v = rotated(v, how)

    if launch["Out"] == "Bf16":
        x_q.write("Bf16", v)
        return
    assert x_scale is not None
    fixed = activation_scale.read("float", 1) if activation_scale is not None else None
    write_quantized(v, x_q, x_scale, slab_tokens, padded_depth, fixed)


def rotated(v: np.ndarray, block: str) -> np.ndarray:
    """v by a block Hadamard, or as it is; `block` as C++ spells it."""
    return v if block in ("NONE", "0") else (v.reshape(len(v), -1, int(block)) @ hadamard(int(block))).reshape(v.shape)


def write_quantized(
    v: np.ndarray,
    x_q: Pointer,
    x_scale: Pointer,
    slab_tokens: int,
    padded_depth: int = 0,
    fixed_scale: np.ndarray | None = None,
) -> None:
    """Rows as INT8 with a scale each, or with the given one, and zeros up to `padded_depth`."""
    m, depth = v.shape
    scale = np.maximum(np.abs(v).max(-1, keepdims=True), np.float32(1e-12)) / np.float32(127)
    if fixed_scale is not None:
        scale = np.broadcast_to(fixed_scale, (m, 1))
    x_scale.write("float", scale[:, 0])
    with np.errstate(invalid="ignore"):  # rows of padding are NaN, and so is their scale
        values = np.clip(np.round(v / scale), -128, 127).astype(np.int8)
    values = np.pad(values, ((0, 0), (0, max(padded_depth - depth, 0))))
    if slab_tokens:
        slabs = activation_slabs(values, slab_tokens)[:, :m]
        x_q.write("signed char", slabs.reshape(len(slabs), -1), slab_tokens * 128)
    else:
        x_q.write("signed char", values)


ROTATE_QUANTIZE = Kernel(
    "rotate_quantize.cu",
    "rotate_quantize",
    "class In, int SOURCE, int BLOCK, int VECTORS, class Out",
    """const In* x, const float* gain?, const float* shift?, const float* input_scale?, const int* permutation?,
    const float* rotation?, const float* activation_scale?, Out* x_q, float* x_scale?, int depth, int padded_depth,
    int row_stride, int block, int slab_tokens, float epsilon""",
    reference,
)


def rotate_quantize(
    tokens: int, depth: int, in_type: str, source: str, rotation: str | int, padded: int = 0, out: str = "signed char"
) -> Instance:
    """`source` is PLAIN, RMS_NORM, LAYER_NORM or GEGLU; `rotation` is NONE, DENSE or the block size of a Hadamard.

    padded: the channels that are written, zeros beyond `depth`. out: "signed char", or "Bf16" for what would be quantized,
    for which x_scale is null.
    """
    vectors, threads = row_in_registers(max(depth, padded))
    shape = Shape((tokens, 1, 1), threads, 4 * depth * (rotation == "DENSE"))
    return ROTATE_QUANTIZE.instance(shape, In=in_type, SOURCE=source, BLOCK=rotation, VECTORS=vectors, Out=out)
