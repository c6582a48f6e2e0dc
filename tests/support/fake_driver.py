"""NVIDIA's driver in main memory: keeps count of what is held, and fails where it is told to. Kernels do nothing."""

from __future__ import annotations

import ctypes
import re
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

from cuda.bindings import driver as real

from duq.plugins.kernel import as_scalar

SUCCESS = real.CUresult.CUDA_SUCCESS
OUT_OF_MEMORY = real.CUresult.CUDA_ERROR_OUT_OF_MEMORY
ILLEGAL_ADDRESS = real.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
# What makes a handle -> what gives it back.
PAIRS = {
    "cuMemAlloc": "cuMemFree", "cuMemHostAlloc": "cuMemFreeHost", "cuStreamCreate": "cuStreamDestroy",
    "cuEventCreate": "cuEventDestroy", "cuModuleLoadData": "cuModuleUnload", "cuStreamEndCapture": "cuGraphDestroy",
    "cuGraphInstantiate": "cuGraphExecDestroy",
}  # fmt: skip
GIVES_BACK = {*PAIRS.values(), "cuCtxPushCurrent", "cuCtxPopCurrent", "cuGetErrorString"}  # whose status nobody asks for


class FakeDriver:
    """In place of cuda.bindings.driver. schedules: of the plans that run on it, for the parameters of their kernels.

    `calls` counts by function; `fail(name, call, status)`; `held` has what was not given back: handle -> what made it.
    """

    def __init__(self, *schedules: Mapping[str, Any]):
        self.calls: Counter[str] = Counter()
        self.held: dict[int, str] = {}
        self.gpu = {"sm": 90, "shared": 227 << 10, "free": 1 << 36}
        self._failures: dict[tuple[str, int], tuple[Any, bool]] = {}
        self._broken: Any = None
        self._memory: dict[int, Any] = {}
        self._handles, self._recording = count(1), None
        self._graphs: dict[int, list[Callable[[], None]]] = {}
        self._parameters = {
            each["symbol"]: [ctypes.sizeof(as_scalar(kind, 0)) for _, kind in each["parameters"]]
            for schedule in schedules
            for each in schedule["kernels"]
        }

    def fail(self, name: str, call: int, status: Any = ILLEGAL_ADDRESS, for_good: bool = False) -> None:
        """The call-th call of a function from now on, the first being 1, fails; for_good: and all that follow it."""
        self._failures[name, self.calls[name] + call] = status, for_good

    def mend(self) -> None:
        """As a new process finds it."""
        self._failures, self._broken = {}, None

    def __getattr__(self, name: str) -> Any:
        if not re.match("cu[A-Z]", name):
            return getattr(real, name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls[name] += 1
            if self._broken and name != "cuGetErrorString":
                return self._broken, None
            if (name, self.calls[name]) in self._failures:
                status, for_good = self._failures[name, self.calls[name]]
                self._broken = status if for_good else None
                if name == "cuStreamEndCapture":
                    self._recording = None
                return status, None
            return self._perform(name, arguments)

        return call

    def _perform(self, name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if name in PAIRS.values():
            made = self.held.pop(int(arguments[0]))
            assert PAIRS[made] == name, f"{name} of what {made} made"
            self._memory.pop(int(arguments[0]), None)
            return (SUCCESS,)
        known = getattr(self, f"_{name}", None)
        found = known(*arguments) if known else None
        if name in PAIRS:
            found = next(self._handles) if found is None else found
            self.held[found] = name
        if found is None:
            return (SUCCESS, None) if name == "cuCtxPopCurrent" else (SUCCESS,)
        return (found[0], *found[1:]) if isinstance(found, tuple) else (SUCCESS, found)

    def _later(self, work: Callable[[], None]) -> None:
        """Now, or when the graph that is being recorded is launched."""
        if self._recording is None:
            work()
        else:
            self._recording.append(work)

    def _cuDriverGetVersion(self) -> int:
        return 13000

    def _cuDeviceGet(self, ordinal: int) -> int:
        return ordinal

    def _cuDeviceGetAttribute(self, attribute: Any, device: int) -> int:
        of = real.CUdevice_attribute
        return {
            of.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: self.gpu["sm"] // 10,
            of.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: self.gpu["sm"] % 10,
            of.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: self.gpu["shared"],
        }[attribute]

    def _cuDevicePrimaryCtxRetain(self, device: int) -> str:
        return "context"

    def _cuMemGetInfo(self) -> tuple[Any, int, int]:
        return SUCCESS, self.gpu["free"], 1 << 37

    def _cuMemAlloc(self, size: int) -> int:
        block = (ctypes.c_uint8 * size)()
        self._memory[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def _cuMemHostAlloc(self, size: int, flags: int) -> int:
        return self._cuMemAlloc(size)

    def _cuMemcpyHtoDAsync(self, to: int, source: int, size: int, stream: int) -> None:
        self._later(lambda: ctypes.memmove(to, source, size))

    _cuMemcpyDtoHAsync = _cuMemcpyHtoDAsync

    def _cuMemsetD8Async(self, to: int, value: int, size: int, stream: int) -> None:
        self._later(lambda: ctypes.memset(to, value, size))

    def _cuStreamBeginCapture(self, stream: int, mode: Any) -> None:
        self._recording = []

    def _cuStreamEndCapture(self, stream: int) -> int:
        graph, self._recording = next(self._handles), None if self._recording is None else self._take()
        return graph

    def _take(self) -> None:
        self._recorded = self._recording

    def _cuGraphInstantiate(self, graph: int, flags: int) -> int:
        executable = next(self._handles)
        self._graphs[executable] = self._recorded
        return executable

    def _cuGraphLaunch(self, executable: int, stream: int) -> None:
        for work in self._graphs[executable]:
            work()

    def _cuModuleGetFunction(self, module: int, symbol: bytes) -> str:
        return symbol.decode()

    def _cuFuncGetParamInfo(self, function: str, index: int) -> tuple[Any, int, int]:
        sizes = self._parameters[function]
        return (SUCCESS, 0, sizes[index]) if index < len(sizes) else (real.CUresult.CUDA_ERROR_INVALID_VALUE, 0, 0)

    def _cuEventElapsedTime(self, earlier: int, later: int) -> float:
        return 1.0

    def _cuGetErrorString(self, status: Any) -> tuple[Any, bytes]:
        return SUCCESS, status.name.removeprefix("CUDA_ERROR_").replace("_", " ").lower().encode()
