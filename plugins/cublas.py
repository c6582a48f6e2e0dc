"""cuBLASLt from its pip wheel, for float GEMMs of large M: y = gelu?(x W^T + bias) + addend, bf16 operands.

Thin ctypes over the C API (cublasLt.h). The library sees columns first, so that row-major y [M, N] is its y^T [N, M]:
A = W [N, K] transposed, B = x [M, K] not, C = addend, D = y.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from duq.plugins import libraries
from duq.plugins.driver import Memory, Stream
from duq.plugins.errors import DeviceError, KernelError
from duq.plugins.timing import copies_of, milliseconds

WORKSPACE_BYTES = 32 << 20  # NVIDIA's advice for Hopper
ALGORITHMS = 16  # of the library's suggestions that are looked at
_BF16, _FLOAT = 14, 0  # CUDA_R_16BF, CUDA_R_32F
_COMPUTE_32F = 68
_TRANSA, _EPILOGUE, _BIAS_POINTER = 3, 7, 8  # cublasLtMatmulDescAttributes_t
_BIAS, _GELU, _GELU_BIAS = 4, 32, 36  # cublasLtEpilogue_t; this GELU is the tanh form
_BATCH_COUNT, _BATCH_STRIDE = 5, 6  # cublasLtMatrixLayoutAttribute_t
_MAX_WORKSPACE = 1  # cublasLtMatmulPreferenceAttributes_t


class _Heuristic(ctypes.Structure):
    _fields_ = [
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("status", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


@dataclass(frozen=True)
class Problem:
    """Sizes and types of one GEMM; strides in elements. `y_bytes` is 4 for float32 y, bias and addend, 2 for bf16."""

    n: int
    m: int
    k: int
    x_stride: int
    y_stride: int
    batch: int
    addend_batch_stride: int
    y_bytes: int
    gelu: int
    has_bias: bool
    has_addend: bool

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Problem:
        """Of a call's arguments by name (plugins/kernels/library.py)."""
        sizes = (arguments[name] for name in ("n", "m", "k", "x_stride", "y_stride", "batch", "addend_batch_stride"))
        there = (arguments[name] is not None for name in ("bias", "addend"))
        n, m, k, x_stride, y_stride, batch, addend_batch_stride = sizes
        has_bias, has_addend = there
        gelu, y_bytes = arguments["gelu"], arguments["y_type"]
        return cls(n, m, k, x_stride, y_stride, batch, addend_batch_stride, y_bytes, gelu, has_bias, has_addend)


class CublasLt:
    """A handle of the library. Raises KernelError where it is not installed."""

    def __init__(self) -> None:
        self._library = libraries.load("cublasLt", "running a cuda plan")
        self._handle = ctypes.c_void_p()
        self._call("cublasLtCreate", ctypes.byref(self._handle))
        self._prepared: dict[tuple[Problem, int], tuple[Any, Any, Any]] = {}

    def close(self) -> None:
        """Gives the handle back. Graphs that it recorded may be launched on."""
        if self._handle:
            self._library.cublasLtDestroy(self._handle)
        self._handle = ctypes.c_void_p()

    def matmul(
        self,
        problem: Problem,
        algorithm: int,
        weight: int,
        x: int,
        bias: int,
        addend: int,
        y: int,
        workspace: int,
        stream: int,
    ) -> None:
        """Enqueues one GEMM. Operands are device addresses (bias, addend: 0 where the problem has none)."""
        descriptor, (a, b, c, d), heuristic = self.prepare(problem, algorithm)
        if problem.has_bias:
            self._set("cublasLtMatmulDescSetAttribute", descriptor, _BIAS_POINTER, ctypes.c_void_p(bias))
        one, beta = ctypes.c_float(1), ctypes.c_float(1 if problem.has_addend else 0)
        self._call(
            "cublasLtMatmul", self._handle, descriptor, ctypes.byref(one), ctypes.c_void_p(weight), a, ctypes.c_void_p(x),
            b, ctypes.byref(beta), ctypes.c_void_p(addend or y), c, ctypes.c_void_p(y), d,
            ctypes.byref(heuristic.algorithm), ctypes.c_void_p(workspace), ctypes.c_size_t(WORKSPACE_BYTES),
            ctypes.c_void_p(stream),
        )  # fmt: skip

    def prepare(self, problem: Problem, algorithm: int) -> tuple[Any, Any, Any]:
        """Descriptors and an algorithm: 0 is what the library thinks best. Raises KernelError where it has none."""
        if (problem, algorithm) not in self._prepared:
            descriptor, layouts, found = self._describe(problem)
            if not found:
                raise KernelError(f"cuBLASLt has no algorithm for {problem}")
            chosen = found[min(algorithm, len(found) - 1)]  # another version of the library may know fewer
            self._prepared[problem, algorithm] = descriptor, layouts, chosen
        return self._prepared[problem, algorithm]

    def fastest(self, problem: Problem) -> int:
        """Times the library's algorithms on this GPU, with weights that are not in its cache; returns the best's place."""
        p, rows, weight_bytes = problem, problem.batch * problem.m, 2 * problem.n * problem.k
        self.prepare(p, 0)  # says if there is none
        copies, y_bytes = copies_of(weight_bytes), p.y_bytes * rows * p.y_stride
        sizes = copies * weight_bytes, 2 * rows * p.x_stride, p.y_bytes * p.n, y_bytes, y_bytes, WORKSPACE_BYTES
        weights, *others = memories = [Memory(size) for size in sizes]
        stream = Stream()
        for memory, size in zip(memories, sizes, strict=True):
            stream.clear(memory.address, size)
        stream.synchronize()

        def work(algorithm: int, stream: Stream) -> None:
            for copy in range(copies):
                x, bias, addend, y, workspace = (other.address for other in others)
                weight = weights.address + copy * weight_bytes
                self.matmul(p, algorithm, weight, x, bias, addend, y, workspace, stream.handle)

        times = milliseconds([partial(work, algorithm) for algorithm in range(len(self._describe(p)[2]))])
        return times.index(min(times))

    def _describe(self, p: Problem) -> tuple:
        descriptor = self._create("cublasLtMatmulDescCreate", _COMPUTE_32F, _FLOAT)
        self._set("cublasLtMatmulDescSetAttribute", descriptor, _TRANSA, ctypes.c_int(1))
        epilogue = _GELU_BIAS if p.gelu and p.has_bias else _GELU if p.gelu else _BIAS if p.has_bias else 1
        self._set("cublasLtMatmulDescSetAttribute", descriptor, _EPILOGUE, ctypes.c_int(epilogue))
        out = _FLOAT if p.y_bytes == 4 else _BF16
        layouts = [
            self._layout(_BF16, p.k, p.n, p.k, p.batch, 0),
            self._layout(_BF16, p.k, p.m, p.x_stride, p.batch, p.m * p.x_stride),
            self._layout(out, p.n, p.m, p.y_stride, p.batch, p.addend_batch_stride),
            self._layout(out, p.n, p.m, p.y_stride, p.batch, p.m * p.y_stride),
        ]
        preference = self._create("cublasLtMatmulPreferenceCreate")
        limit = ctypes.c_size_t(WORKSPACE_BYTES)
        self._set("cublasLtMatmulPreferenceSetAttribute", preference, _MAX_WORKSPACE, limit)
        found, count = (_Heuristic * ALGORITHMS)(), ctypes.c_int()
        self._call(
            "cublasLtMatmulAlgoGetHeuristic", self._handle, descriptor, *layouts, preference, ALGORITHMS, found,
            ctypes.byref(count),
        )  # fmt: skip
        self._call("cublasLtMatmulPreferenceDestroy", preference)
        return descriptor, layouts, list(found[: count.value])

    def _layout(self, kind: int, rows: int, columns: int, stride: int, batch: int, batch_stride: int):
        dims = ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(stride)
        layout = self._create("cublasLtMatrixLayoutCreate", kind, *dims)
        if batch > 1:
            self._set("cublasLtMatrixLayoutSetAttribute", layout, _BATCH_COUNT, ctypes.c_int32(batch))
            self._set("cublasLtMatrixLayoutSetAttribute", layout, _BATCH_STRIDE, ctypes.c_int64(batch_stride))
        return layout

    def _create(self, function: str, *arguments) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        self._call(function, ctypes.byref(handle), *arguments)
        return handle

    def _set(self, function: str, handle, attribute: int, value) -> None:
        self._call(function, handle, attribute, ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value)))

    def _call(self, function: str, *arguments) -> None:
        status = getattr(self._library, function)(*arguments)
        if status != 0:
            name = self._library.cublasLtGetStatusString
            name.restype = ctypes.c_char_p
            text = name(status).decode()
            raise DeviceError(f"{function}: {text}", text)
