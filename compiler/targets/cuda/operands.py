"""Operands of a product on this machine's GPU, to time tactics on and to compare their results.

They are random integers, whose sums are exact in any order, in float32 too, where they stay below 2^24.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from functools import partial

import numpy as np

from duq.compiler.targets.cuda.problems import FloatGemm, Gemm, IntegerTactic, Problem
from duq.compiler.targets.cuda.program import BYTES
from duq.compiler.targets.cuda.weights import to_bf16
from duq.plugins.driver import Memory, Stream
from duq.plugins.kernels import GemmFloat, Generated
from duq.plugins.layout import (
    activation_slabs,
    interleave_gate_up,
    pack_bitblas,
    pack_float_fragments,
    pack_fragments,
    pack_int4_fragments,
)
from duq.plugins.timing import copies_of

HEAD_DIMS = 256  # gemm_float.cu
INT4, INT8 = range(-8, 8), range(-128, 128)
NULL = ctypes.c_void_p(0)
NO_NORM = NULL, NULL, NULL  # program.py


class _Operands:
    """y, and of all else the forms that the tactics ask for; of the weight as many copies as a timing walks through."""

    def __init__(self, problem: Problem, weight_bytes: int):
        self.problem, self.copies, self._weight_bytes = problem, copies_of(weight_bytes), weight_bytes
        self._y_bytes = problem.m * problem.n * BYTES[problem.out]
        self._held = {"y": Memory(self._y_bytes)}

    def result(self, enqueue: Callable[[Stream], None]) -> np.ndarray:
        """The bytes of y behind the work that is enqueued."""
        stream, y = Stream(), np.empty(self._y_bytes, np.uint8)
        stream.clear(self._held["y"].address, y.nbytes)
        enqueue(stream)
        stream.download(y.ctypes.data, self._held["y"].address, y.nbytes)
        stream.synchronize()
        return y

    def _address(self, name: str, make: Callable[[], np.ndarray], copies: int = 1) -> ctypes.c_void_p:
        """Of an array that is made and uploaded when it is first asked for."""
        if name not in self._held:
            self._held[name] = _upload(make(), copies)
        return ctypes.c_void_p(self._held[name].address)

    def _weight(self, layout: str, make: Callable[[], np.ndarray], copy: int) -> ctypes.c_void_p:
        return ctypes.c_void_p(self._address(layout, make, self.copies).value + copy * self._weight_bytes)

    def _residual(self) -> ctypes.c_void_p:
        """Added where the policy does: to what is written into the residual stream."""
        p = self.problem
        if p.out != "float" or p.finish != "NONE":
            return NULL
        return self._address("residual", partial(np.ones, (p.m, p.n), np.float32))


class IntegerOperands(_Operands):
    """Of a Gemm; `clusters`: whether the blocks that share K meet in each other's shared memory, else in a workspace."""

    def __init__(self, gemm: Gemm, clusters: bool):
        super().__init__(gemm, gemm.n * gemm.k * gemm.bits // 8)
        self._clusters, self._x = clusters, _integers(gemm.m, gemm.k, INT8)

    def arguments(self, tactic: IntegerTactic, copy: int) -> list[list]:
        """Of each launch. Gate and up of a GeGLU lie in pairs, or where another launch finishes the sums, one behind the other."""
        p, slabs, apart = self.problem, tactic.slab_tokens, self.problem.is_finished_apart(tactic)
        in_pairs = p.finish == "GEGLU" and not apart

        x = self._address(f"x {slabs}", lambda: activation_slabs(self._x, slabs) if slabs else self._x)
        x_scale = self._address("x_scale", partial(_scales, p.m, False))
        weight_scale = self._address(f"weight_scale {in_pairs}", partial(_scales, p.n, in_pairs))
        weight = self._weight(tactic.layout, partial(_weight, p.n, p.k, p.bits, tactic.layout, in_pairs), copy)
        y, residual = ctypes.c_void_p(self._held["y"].address), self._residual()
        if isinstance(tactic, Generated):
            sums = self._address("sums", partial(np.zeros, (p.m, p.n), np.int32)) if apart else y
            own = [x, weight, sums, ctypes.c_int(p.m)]
            sizes = map(ctypes.c_int, (p.n, 1, 0))
            return [own, [sums, x_scale, weight_scale, NULL, NULL, NULL, residual, y, *sizes]] if apart else [own]
        workspace = NULL
        if tactic.split > 1 and not self._clusters:
            words = p.workspace_words(tactic)
            workspace = self._address(f"workspace {words}", partial(np.zeros, words, np.int32))
        sizes = map(ctypes.c_int, (p.m, p.n, p.k))
        return [[x, x_scale, weight, weight_scale, NULL, residual, y, workspace, *sizes, *NO_NORM]]


class FloatOperands(_Operands):
    """Of a FloatGemm. Its rotary embedding turns by angles of zero, and its norm divides by one: neither rounds."""

    def __init__(self, gemm: FloatGemm):
        super().__init__(gemm, _float_fragments(gemm.n, gemm.k, gemm.bits).nbytes)

    def arguments(self, tactic: GemmFloat, copy: int) -> list[list]:
        p, y = self.problem, self._held["y"].address
        x = self._address("x", lambda: to_bf16(np.float32(_integers(p.m, p.k, INT4))))
        squares = NULL
        if p.norm:
            squares = self._address("squares", partial(np.full, (p.m, p.k // 16), 16, np.float32))
        weight = self._weight("fragments", partial(_float_fragments, p.n, p.k, p.bits), copy)
        columns, kv_stride, rotary = p.n // 2 if p.finish == "GEGLU" else p.n, 0, [NULL] * 4
        if p.finish == "ROTARY":  # keys and values beside the queries
            own = [ctypes.c_void_p(y + (p.n - heads * HEAD_DIMS) * BYTES[p.out]) for heads in (2, 1)]
            tables = [self._address(f"all {of}", partial(np.full, (p.m, HEAD_DIMS // 2), of, np.float32)) for of in (1, 0)]
            kv_stride, rotary = p.n, [*own, *tables]
        addresses = [x, squares, weight, NULL, NULL, self._residual(), ctypes.c_void_p(y), *rotary, NULL]
        sizes = map(ctypes.c_int, (p.m, p.n, p.k, columns, kv_stride, 0, 0))
        return [[*addresses, *sizes, ctypes.c_float(0), *NO_NORM]]


def _upload(array: np.ndarray, copies: int) -> Memory:
    memory, stream, array = Memory(copies * array.nbytes), Stream(), np.ascontiguousarray(array)
    for copy in range(copies):
        stream.upload(memory.address + copy * array.nbytes, array.ctypes.data, array.nbytes)
    stream.synchronize()
    return memory


def _integers(rows: int, columns: int, values: range) -> np.ndarray:
    return np.random.default_rng(0).integers(values.start, values.stop, (rows, columns), np.int8)


def _scales(size: int, in_pairs: bool) -> np.ndarray:
    scales = np.random.default_rng(0).uniform(1e-4, 1e-3, size).astype(np.float32)
    return interleave_gate_up(*np.split(scales, 2)) if in_pairs else scales


@functools.lru_cache(maxsize=2)
def _weight(n: int, k: int, bits: int, layout: str, in_pairs: bool) -> np.ndarray:
    values = _integers(n, k, INT4 if bits == 4 else INT8)
    values = interleave_gate_up(*np.split(values, 2)) if in_pairs else values
    return pack_bitblas(values) if layout == Generated.layout else pack_fragments(values, bits, layout)


@functools.lru_cache(maxsize=1)
def _float_fragments(n: int, k: int, bits: int) -> np.ndarray:
    values = _integers(n, k, INT4)
    return pack_int4_fragments(values) if bits == 4 else pack_float_fragments(to_bf16(np.float32(values)))
