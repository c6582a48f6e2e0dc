"""A GPU of host memory that takes down what it is asked to do, and notices what would touch memory that is not its own."""

from __future__ import annotations

import ctypes
import hashlib
from typing import Any

from cuda.bindings import driver as real

from tests.fuzz.judge import WRONG, Failure
from tests.support.fake_driver import FakeDriver

NOT_FOUND = real.CUresult.CUDA_ERROR_NOT_FOUND


class ObservedDriver(FakeDriver):
    """`digest` is of every image that was loaded, every byte uploaded, and every launch with its arguments: with equal digests
    a GPU computes the same. Raises Failure for a copy, or a pointer of a launch, outside of the memory that was allocated."""

    def __init__(self, *schedules: Any):
        super().__init__(*schedules)
        self._digest = hashlib.sha256()
        self._blocks: dict[
            int, tuple[int, int]
        ] = {}  # address -> how many came before, bytes; freed ones are not in _memory
        self._count = 0

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()

    def place(self, address: int, size: int = 0) -> tuple[int, int] | None:
        """The number of the block that an address lies in, and where in it; None for a null pointer."""
        if not address:
            return None
        for start in self._memory:
            number, length = self._blocks[start]
            if start <= address and address + size <= start + length:
                return number, address - start
        raise Failure(WRONG, f"{size} bytes at {address:#x} are outside of the GPU's memory")

    def note(self, *what: Any) -> None:
        self._digest.update(repr(what).encode())

    def _cuMemAlloc(self, size: int) -> int:
        block = (ctypes.c_uint8 * size)()
        address = ctypes.addressof(block)
        self._memory[address] = block
        self._blocks[address] = self._count, size
        self._count += 1
        return address

    def _cuMemcpyHtoDAsync(self, to: int, source: int, size: int, stream: int) -> None:
        where = self.place(to, size), self.place(source, size) and None

        def work() -> None:
            self.note("upload", where, ctypes.string_at(source, size))
            ctypes.memmove(to, source, size)

        self._later(work)

    def _cuMemcpyDtoHAsync(self, to: int, source: int, size: int, stream: int) -> None:
        self.note("download", self.place(source, size), self.place(to, size))
        self._later(lambda: ctypes.memmove(to, source, size))

    def _cuMemsetD8Async(self, to: int, value: int, size: int, stream: int) -> None:
        self.note("clear", self.place(to, size), value, size)
        self._later(lambda: ctypes.memset(to, value, size))

    def _cuModuleLoadData(self, image: bytes) -> None:
        self.note("image", image)

    def _cuModuleGetFunction(self, module: int, symbol: bytes) -> Any:
        name = symbol.decode()
        return name if name in self._parameters else (NOT_FOUND, None)

    def _cuLaunchKernelEx(self, config: Any, function: str, arguments: int, extra: int) -> None:
        sizes = self._parameters[function]
        values = []
        for address, size in zip((ctypes.c_void_p * len(sizes)).from_address(arguments), sizes, strict=True):
            value = int.from_bytes(ctypes.string_at(address, size), "little")
            values.append(self.place(value) if size == 8 else value)  # all that has 8 bytes is a pointer
        grid = config.gridDimX, config.gridDimY, config.gridDimZ, config.blockDimX, config.sharedMemBytes
        self.note("launch", function, grid, values)


class ObservedLibrary:
    """cuBLASLt in its place."""

    def __init__(self, driver: ObservedDriver):
        self._driver = driver

    def prepare(self, problem: Any, algorithm: int) -> None:
        self._driver.note("prepare", problem, algorithm)

    def matmul(self, problem: Any, algorithm: int, *, workspace: int, stream: int, **operands: int) -> None:
        places = {name: self._driver.place(address) for name, address in operands.items()}
        self._driver.note("matmul", problem, algorithm, places)

    def close(self) -> None:
        pass
