"""Inputs of a GEMM on this machine's GPU, to time tactics on and to compare their results.

They are random integers, whose sums are exact in any order, in float32 too, where they stay below 2^24.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from duq.compiler.targets.cuda.gemm import AnyGemm, FloatGemm, Gemm
from duq.compiler.targets.cuda.launches import BYTES
from duq.compiler.targets.cuda.weights import rows_in_order, to_bf16
from duq.plugins.driver import Memory, Stream
from duq.plugins.gpu import Gpu
from duq.plugins.kernels import GemmFloat, Generated, Wgmma
from duq.plugins.layout import (
    HEAD_DIMS,
    activation_slabs,
    pack_bitblas,
    pack_float_fragments,
    pack_fragments,
    pack_int4_fragments,
)
from duq.plugins.timing import copies_of

INT4, INT8 = range(-8, 8), range(-128, 128)
Arguments = Mapping[str, int | float | None]  # of a launch, by name


class _Inputs:
    """y, and of all else the forms that the tactics ask for; of the weight as many copies as a timing walks through."""

    def __init__(self, gemm: AnyGemm, weight_bytes: int):
        self.copies, self._weight_bytes = copies_of(weight_bytes), weight_bytes
        self._y_bytes = gemm.m * gemm.n * BYTES[gemm.out]
        self._held = {"y": Memory(self._y_bytes)}
        self.y = self._held["y"].address

    def result(self, enqueue: Callable[[Stream], None]) -> np.ndarray:
        """The bytes of y behind the work that is enqueued."""
        stream, y = Stream(), np.empty(self._y_bytes, np.uint8)
        stream.clear(self.y, y.nbytes)
        enqueue(stream)
        stream.download(y.ctypes.data, self.y, y.nbytes)
        stream.synchronize()
        return y

    def _address(self, name: str, make: Callable[[], np.ndarray], copies: int = 1) -> int:
        """Of an array that is made and uploaded when it is first asked for."""
        if name not in self._held:
            self._held[name] = _upload(make(), copies)
        return self._held[name].address

    def _weight(self, layout: str, make: Callable[[], np.ndarray], copy: int) -> int:
        return self._address(layout, make, self.copies) + copy * self._weight_bytes

    def _residual(self, gemm: AnyGemm) -> int | None:
        """Added where the policy does: to what is written into the residual stream."""
        if gemm.out != "float" or gemm.epilogue != "NONE":
            return None
        return self._address("residual", partial(np.ones, (gemm.m, gemm.n), np.float32))

    def _angles(self, gemm: AnyGemm) -> Arguments:
        """Of zero, which turn nothing and do not round."""
        angles = {"cosine": 1, "sine": 0}
        return {
            name: self._address(name, partial(np.full, (gemm.m, HEAD_DIMS // 2), of, np.float32))
            for name, of in angles.items()
        }

    def _heads(self, gemm: AnyGemm) -> Arguments:
        """What the epilogues ROTARY are told: keys and values lie beside the queries."""
        sizes: Arguments = dict(kv_stride=gemm.n, first_position=0, to_cache=0)
        if gemm.epilogue != "ROTARY":
            return sizes
        key, value = (self.y + (gemm.n - heads * HEAD_DIMS) * BYTES[gemm.out] for heads in (2, 1))
        return dict(k=key, v=value, **self._angles(gemm), **sizes)


class IntegerInputs(_Inputs):
    """Of a Gemm. Blocks that share K meet in each other's shared memory where the GPU has clusters, else in a workspace."""

    def __init__(self, gemm: Gemm, gpu: Gpu):
        super().__init__(gemm, gemm.n * gemm.k * gemm.bits // 8)
        self.gemm, self._clusters, self._x = gemm, gpu.has_clusters, _integers(gemm.m, gemm.k, INT8)

    def arguments(self, tactic: Any, copy: int) -> list[Arguments]:
        """Of each launch. Rows lie in the order of the tactic's epilogue, in front of launches of their own as they are."""
        g, slabs, apart = self.gemm, tactic.slab_tokens, self.gemm.leaves_accumulators(tactic)
        order = g.order(tactic)
        x = self._address(f"x {slabs}", lambda: activation_slabs(self._x, slabs) if slabs else self._x)
        x_scale = self._address("x_scale", partial(_scales, g.m, ""))
        weight_scale = self._address(f"weight_scale {order}", partial(_scales, g.n, order))
        weight = self._weight(f"{tactic.layout} {order}", partial(_weight, g.n, g.k, g.bits, tactic.layout, order), copy)
        scales: Arguments = dict(x_scale=x_scale, weight_scale=weight_scale, residual=self._residual(g))
        if isinstance(tactic, Generated):
            acc = self._address("acc", partial(np.zeros, (g.m, g.n), np.int32)) if apart else self.y
            own: Arguments = dict(x_q=x, weight=weight, y=acc, tokens=g.m)
            behind: Arguments = dict(acc=acc, **scales, y=self.y, rows=g.n, scale_stride=1, block=0)
            return [own, behind, *self._rotary(tactic)] if apart else [own]
        workspace = None
        if tactic.split > 1 and not self._clusters:
            words = g.workspace_words(tactic)
            workspace = self._address(f"workspace {words}", partial(np.zeros, words, np.int32))
        sizes = dict(tokens=g.m, rows=g.n, depth=g.k)
        heads = self._heads(g) if isinstance(tactic, Wgmma) else {}
        return [
            dict(x_q=x, weight=weight, **scales, y=self.y, workspace=workspace, **sizes, **heads),
            *self._rotary(tactic),
        ]

    def _rotary(self, tactic: Any) -> list[Arguments]:
        """Of the rotary embedding's launch, where the tactic leaves it to one."""
        if not self.gemm.leaves_rotation(tactic):
            return []
        return [dict(qkv=self.y, **self._angles(self.gemm), first_position=0, stride=self.gemm.n, cache_stride=0)]


class FloatInputs(_Inputs):
    """Of a FloatGemm. Its norm divides by one, which does not round."""

    def __init__(self, gemm: FloatGemm, gpu: Gpu):
        super().__init__(gemm, _float_fragments(gemm.n, gemm.k, gemm.bits).nbytes)
        self.gemm, self._clusters = gemm, gpu.has_clusters

    def arguments(self, tactic: Any, copy: int) -> list[Arguments]:
        g = self.gemm
        x = self._address("x", lambda: to_bf16(_integers(g.m, g.k, INT4)))
        squares = None
        if g.norm:
            squares = self._address("squares", partial(np.full, (g.m, g.k // 16), 16, np.float32))
        weight = self._weight("fragments", partial(_float_fragments, g.n, g.k, g.bits), copy)
        sizes = dict(tokens=g.m, rows=g.n, depth=g.k, y_stride=g.n // 2 if g.epilogue == "GEGLU" else g.n)
        tensors: Arguments = dict(x=x, squares=squares, weight=weight, residual=self._residual(g), y=self.y)
        return [{**tensors, **self._heads(g), **sizes, **self._meeting_place(tactic), "epsilon": 0.0}]

    def _meeting_place(self, tactic: GemmFloat) -> Arguments:
        """Of blocks that share K, where they are no cluster."""
        if tactic.split == 1 or self._clusters:
            return {}
        words, groups = (count(self.gemm.m, self.gemm.n) for count in (tactic.partial_words, tactic.groups))
        return {
            "partial": self._address(f"partial {words}", partial(np.zeros, words, np.float32)),
            "counters": self._address(f"counters {groups}", partial(np.zeros, groups, np.int32)),
        }


def _upload(array: np.ndarray, copies: int) -> Memory:
    memory, stream, array = Memory(copies * array.nbytes), Stream(), np.ascontiguousarray(array)
    for copy in range(copies):
        stream.upload(memory.address + copy * array.nbytes, array.ctypes.data, array.nbytes)
    stream.synchronize()
    return memory


def _integers(rows: int, columns: int, values: range) -> np.ndarray:
    return np.random.default_rng(0).integers(values.start, values.stop, (rows, columns), np.int8)


def _scales(size: int, order: str) -> np.ndarray:
    return rows_in_order(np.random.default_rng(0).uniform(1e-4, 1e-3, size).astype(np.float32), order)


@functools.lru_cache(maxsize=2)
def _weight(n: int, k: int, bits: int, layout: str, order: str) -> np.ndarray:
    values = rows_in_order(_integers(n, k, INT4 if bits == 4 else INT8), order)
    return pack_bitblas(values) if layout == Generated.layout else pack_fragments(values, bits, layout)


@functools.lru_cache(maxsize=1)
def _float_fragments(n: int, k: int, bits: int) -> np.ndarray:
    values = _integers(n, k, INT4)
    return pack_int4_fragments(values) if bits == 4 else pack_float_fragments(to_bf16(values))
