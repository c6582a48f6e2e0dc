"""LayerNorm and RMSNorm: normalize.cu."""

from __future__ import annotations

from duq.plugins.kernel import Instance, Kernel, Shape
from duq.plugins.kernels.reference import Launched, Pointer, affine, rms_norm
from duq.plugins.kernels.row import row_in_registers


def reference(
    launch: Launched,
    x: Pointer,
    gain: Pointer | None,
    shift: Pointer | None,
    y: Pointer,
    depth: int,
    x_stride: int,
    y_stride: int,
    epsilon: float,
) -> None:
    assert 8 * launch.number("VECTORS") * launch.threads >= depth
    v = x.read(launch["In"], launch.grid[0], depth, stride=x_stride)
    if launch["CENTER"] == "true":
        v -= v.mean(-1, keepdims=True)
    y.write(launch["Out"], affine(rms_norm(v, epsilon), gain, shift), y_stride)


NORMALIZE = Kernel(
    "normalize.cu",
    "normalize",
    "class In, class Out, bool CENTER, int VECTORS",
    """const In* x, const float* gain?, const float* shift?, Out* y, int depth, int x_stride, int y_stride,
    float epsilon""",
    reference,
)


def normalize(tokens: int, depth: int, in_type: str, out_type: str, center: bool) -> Instance:
    """LayerNorm (`center`) or RMSNorm of `tokens` rows of `depth` channels; types "float", "Bf16" or "Half"."""
    vectors, threads = row_in_registers(depth)
    shape = Shape((tokens, 1, 1), threads)
    return NORMALIZE.instance(shape, In=in_type, Out=out_type, CENTER=center, VECTORS=vectors)
