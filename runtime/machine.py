"""What this machine has: GPUs and their driver, asked without any package of NVIDIA's, memory, and libraries that load."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from duq.plugins.driver import OLDEST_12
from duq.plugins.errors import KernelError
from duq.plugins.libraries import Version

_MULTIPROCESSORS, _MAJOR, _MINOR, _SHARED_OPTIN = 16, 75, 76, 97  # CUdevice_attribute
_NAME_BYTES = 256


@dataclass(frozen=True)
class Device:
    """A GPU. block_shared_bytes: that one thread block can have."""

    name: str
    sm: int
    multiprocessors: int
    memory_bytes: int
    block_shared_bytes: int


@dataclass(frozen=True)
class Gpus:
    """The GPUs and their driver; problem: why there are none to use, in the user's words, or nothing.

    Attributes:
        cuda: the version of CUDA that the driver is for.
        driver: its own version, "580.65.06".
    """

    devices: tuple[Device, ...] = ()
    cuda: Version | None = None
    driver: str | None = None
    problem: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"cuda": None if self.cuda is None else str(self.cuda)}


def find_gpus(load: Callable[[str], Any] = ctypes.CDLL, proc: Path = Path("/proc/driver/nvidia/version")) -> Gpus:
    """What the NVIDIA driver says. Never raises: a machine without one has a `problem`.

    load: opens a library by its name; proc: where the kernel module says its version.
    """
    version = _driver_version(proc)
    try:
        library = load("libcuda.so.1")
    except OSError:
        return Gpus(driver=version, problem="no NVIDIA driver (libcuda.so.1 is not found)")
    try:
        _call(library, "cuInit", 0)
        cuda = Version.of(_integer(library, "cuDriverGetVersion"))
        devices = tuple(_device(library, ordinal) for ordinal in range(_integer(library, "cuDeviceGetCount")))
    except KernelError as error:
        return Gpus(driver=version, problem=f"the NVIDIA driver does not work: {error}")
    problem = "" if devices else "the NVIDIA driver finds no GPU"
    if cuda < OLDEST_12:
        problem = f"the NVIDIA driver is for CUDA {cuda}, {Version(*OLDEST_12)} is the oldest"
    return Gpus(devices, cuda, version, problem)


def free_device_bytes(load: Callable[[str], Any] = ctypes.CDLL, ordinal: int = 0) -> int | None:
    """Free memory of a GPU that `find_gpus` found; None where the driver does not say. Takes a context for a moment."""
    try:
        library = load("libcuda.so.1")
        with _context(library, ordinal):
            free, total = ctypes.c_size_t(), ctypes.c_size_t()
            _call(library, "cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
            return free.value
    except (KernelError, OSError):
        return None


@contextmanager
def _context(library: Any, ordinal: int) -> Iterator[None]:
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _call(library, "cuInit", 0)
    _call(library, "cuDeviceGet", ctypes.byref(device), ordinal)
    _call(library, "cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    try:
        _call(library, "cuCtxSetCurrent", context)
        yield
    finally:
        _call(library, "cuDevicePrimaryCtxRelease_v2", device)


def _device(library: Any, ordinal: int) -> Device:
    device, memory, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(_NAME_BYTES)
    _call(library, "cuDeviceGet", ctypes.byref(device), ordinal)
    _call(library, "cuDeviceGetName", name, _NAME_BYTES, device)
    _call(library, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)

    def attribute(number: int) -> int:
        return _integer(library, "cuDeviceGetAttribute", number, device)

    sm = 10 * attribute(_MAJOR) + attribute(_MINOR)
    shown = name.value.decode(errors="replace").removeprefix("NVIDIA ")
    return Device(shown, sm, attribute(_MULTIPROCESSORS), memory.value, attribute(_SHARED_OPTIN))


def _integer(library: Any, function: str, *arguments: Any) -> int:
    """What a function of the driver writes to its first argument, an int."""
    value = ctypes.c_int()
    _call(library, function, ctypes.byref(value), *arguments)
    return value.value


def _call(library: Any, function: str, *arguments: Any) -> None:
    """Raises KernelError with the driver's name of the error."""
    status = getattr(library, function)(*arguments)
    if status:
        text = ctypes.c_char_p()
        library.cuGetErrorName(status, ctypes.byref(text))
        raise KernelError(f"{function}: {text.value.decode() if text.value else f'error {status}'}")


def _driver_version(proc: Path) -> str | None:
    """From the first line: "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 ..."."""
    try:
        words = proc.read_text(errors="replace").partition("\n")[0].split()
    except OSError:
        return None
    return next((word for word in words if word[0].isdigit() and "." in word), None)


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def available_bytes() -> int | None:
    """Memory that a new program can have without swapping; None where the kernel does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None
