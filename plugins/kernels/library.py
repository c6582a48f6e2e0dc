"""cuBLASLt's matrix multiplication, described as the kernels are: plugins/cublas.py calls it."""

from __future__ import annotations

from duq.plugins.kernel import Instance, Kernel, Shape
from duq.plugins.kernels.reference import Launched, Pointer
from duq.plugins.kernels.reference import gelu as gelu_tanh

_Y_TYPES = {4: "float", 2: "Bf16"}  # y_type: bytes of an element


def reference(
    launch: Launched,
    weight: Pointer,
    x: Pointer,
    bias: Pointer | None,
    addend: Pointer | None,
    y: Pointer,
    algorithm: int,
    n: int,
    m: int,
    k: int,
    x_stride: int,
    y_stride: int,
    batch: int,
    addend_batch_stride: int,
    y_type: int,
    gelu: int,
) -> None:
    """y[m, n] = gelu?(x[m, k] weight[n, k]^T + bias[n]) + addend[m, n], accumulated in float32."""
    out_type, w = _Y_TYPES[y_type], weight.read("Bf16", n, k)
    for index in range(batch):
        v = x.read("Bf16", m, k, stride=x_stride, at=index * m * x_stride) @ w.T
        if bias is not None:
            v = v + bias.read(out_type, n)
        v = gelu_tanh(v) if gelu else v
        if addend is not None:
            v = v + addend.read(out_type, m, n, stride=y_stride, at=index * addend_batch_stride)
        y.write(out_type, v, y_stride, at=index * m * y_stride)


MATMUL = Kernel(
    "cublaslt",
    "matmul",
    "",
    """const Bf16* weight, const Bf16* x, const void* bias?, const void* addend?, void* y, int algorithm, int n, int m,
    int k, int x_stride, int y_stride, int batch, int addend_batch_stride, int y_type, int gelu""",
    reference,
    waits=False,
)
"""`batch` multiplications one after the other in x and y, with one weight. x and weight are bf16; y, bias and addend of
`y_type`, bytes of an element: 2 for bf16 or 4 for float32. All are dense but for the strides given, in elements.
`algorithm`: the place of the one to use in the library's own order of preference."""


def matmul() -> Instance:
    """The call. It has no grid: the library launches what it wants."""
    return MATMUL.instance(Shape((0, 0, 0), 0))
