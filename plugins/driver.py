"""A thin layer over the CUDA driver API (cuda-bindings): load a cubin or PTX, launch its kernels, memory, streams, graphs.

Arguments of kernels are device addresses, whoever's memory it is. Works in the device's primary context, as every library
does.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import weakref
from collections.abc import Callable, Sequence

import numpy as np

from duq.plugins.errors import DeviceError, KernelError
from duq.plugins.kernel import Shape
from duq.plugins.libraries import Version, bindings_version
from duq.plugins.nvrtc import Cubin

OLDEST_12 = (12, 4)  # drivers for CUDA 12 before it lack cuFuncGetParamInfo
PORTABLE_CLUSTER = 8  # blocks of a cluster that every GPU with clusters takes


def _driver():
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise KernelError(f"CUDA needs cuda-bindings ({error}): pip install 'duq-vla[cuda-runtime]'") from error
    return driver


def _call(name: str, *arguments):
    """One driver call; its results without the status. Raises DeviceError with the driver's words."""
    driver = _driver()
    try:
        status, *values = getattr(driver, name)(*arguments)
    except RuntimeError as error:  # the bindings found no libcuda.so.1, or one without this function
        raise KernelError(f"no usable NVIDIA driver on this machine ({error})") from error
    if status != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(f"{name}: {_words(status)}", getattr(status, "name", str(status)))
    return values[0] if len(values) == 1 else values


def _words(status: object) -> str:
    """What the driver says of a status; its name where it says nothing."""
    text = _driver().cuGetErrorString(status)[1]
    return text.decode() if text else repr(status)


def open_device(ordinal: int = 0) -> int:
    """Makes the device's primary context current in this thread and returns its compute capability, e.g. 90.

    Raises KernelError where there is no driver, one too old for the cubins, no such device, or in a process that was forked
    from one that had opened it: CUDA does not work there.
    """
    context, sm, process = _device(ordinal)
    if process != os.getpid():
        raise KernelError(
            f"the GPU was opened by process {process}, which this one was forked from, and CUDA does not outlive a fork; "
            'start this one with multiprocessing\'s "spawn" instead'
        )
    _call("cuCtxSetCurrent", context)
    return sm


def block_shared_bytes(ordinal: int = 0) -> int:
    """Dynamic shared memory that a thread block can have on the device, of which `open_device` was called before."""
    attribute = _driver().CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    return int(_call("cuDeviceGetAttribute", attribute, _call("cuDeviceGet", ordinal)))


def device_properties(ordinal: int = 0) -> tuple[str, int]:
    """The device's name, e.g. "H100 80GB HBM3", and its multiprocessors. Raises KernelError as `open_device` does."""
    open_device(ordinal)
    device = _call("cuDeviceGet", ordinal)
    name = _call("cuDeviceGetName", 256, device).split(b"\0")[0].decode()
    attribute = _driver().CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
    return name.removeprefix("NVIDIA "), _call("cuDeviceGetAttribute", attribute, device)


@functools.cache
def _device(ordinal: int) -> tuple[object, int, int]:
    """The device's primary context, kept from now on, its compute capability, and the process that has it."""
    driver = _driver()
    _call("cuInit", 0)
    _check_driver(cuda_version(), bindings_version().major)
    device = _call("cuDeviceGet", ordinal)
    attribute = driver.CUdevice_attribute
    major = _call("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
    minor = _call("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
    return _call("cuDevicePrimaryCtxRetain", device), 10 * major + minor, os.getpid()


class Module:
    """A loaded cubin or PTX. It stays loaded until `close`, which no graph may outlive that launches its kernels."""

    def __init__(self, image: bytes):
        self.handle = _call("cuModuleLoadData", image)
        self._unload: Callable[[], None] | None = _giver_back("cuModuleUnload", self.handle)

    def close(self) -> None:
        """Unloads it now; once."""
        if self._unload is not None:
            self._unload()
        self._unload = None


def cuda_version() -> Version:
    """The newest CUDA that the driver is for. Raises KernelError where there is no driver."""
    return Version.of(_call("cuDriverGetVersion"))


def _check_driver(found: Version, bindings: int) -> None:
    """Raises KernelError where the driver is older than the CUDA of the bindings and of the libraries beside them."""
    if found.major < bindings:
        release = {12: 525, 13: 580}.get(bindings)
        stay = found.major == 12 and found >= OLDEST_12
        raise KernelError(
            f"the NVIDIA driver is for CUDA {found}; update it to one for CUDA {bindings}.0 ({release} or newer)"
            + (", or stay with it (JetPack 6): pip install 'duq-vla[cuda12]', and compile the plan with that" * stay)
        )


class Kernel:
    """One kernel of a module."""

    def __init__(self, module: Module, symbol: str):
        self.module = module
        self._function = _call("cuModuleGetFunction", module.handle, symbol.encode())
        self._symbol = symbol
        self._sizes = _parameter_sizes(self._function)
        # A multiprocessor divides its memory between cache and shared memory as the kernel on it prefers, and can do so
        # only while it is idle: with one division for all, a kernel's blocks may start beside those of the kernel ahead.
        attribute = _driver().CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        _call("cuFuncSetAttribute", self._function, attribute, 100)  # per cent
        self._shared_bytes = 0
        self._large_clusters = False

    def launch(self, shape: Shape, arguments: Sequence, stream: int = 0, overlap: bool = False) -> None:
        """Enqueues the kernel; capturable in a CUDA graph.

        `arguments` are device addresses or integers as ctypes scalars (`c_void_p`, `c_int`, `c_float`).
        With `overlap` (SM 90) it may start before the kernel ahead of it in the stream has ended; the kernels wait
        for that end themselves before they touch its results (programmatic dependent launch).
        """
        driver = _driver()
        sizes = [ctypes.sizeof(argument) for argument in arguments]
        if sizes != self._sizes:  # the driver would read whatever lies behind the arguments
            raise KernelError(f"{self._symbol} takes arguments of {self._sizes} bytes, not {sizes}")
        if shape.shared_bytes > self._shared_bytes:  # above 48 KB, static included, has to be asked for, once
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _call("cuFuncSetAttribute", self._function, attribute, shape.shared_bytes)
            self._shared_bytes = shape.shared_bytes
        if math.prod(shape.cluster) > PORTABLE_CLUSTER and not self._large_clusters:  # likewise
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
            _call("cuFuncSetAttribute", self._function, attribute, 1)
            self._large_clusters = True
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = shape.grid
        config.blockDimX, config.blockDimY, config.blockDimZ = shape.threads, 1, 1
        config.sharedMemBytes = shape.shared_bytes
        config.hStream = stream
        config.attrs = _attributes(driver, shape.cluster, overlap)
        config.numAttrs = len(config.attrs)
        addresses = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        _call("cuLaunchKernelEx", config, self._function, ctypes.addressof(addresses), 0)


def _parameter_sizes(function: object) -> list[int]:
    sizes: list[int] = []
    while True:
        try:
            _, size = _call("cuFuncGetParamInfo", function, len(sizes))
        except DeviceError as error:
            if error.status == "CUDA_ERROR_INVALID_VALUE":  # past the last
                return sizes
            raise
        sizes.append(size)


def _attributes(driver, cluster: tuple[int, int, int], overlap: bool) -> list:
    attributes = []
    if cluster != (1, 1, 1):
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        attribute.value.clusterDim.x, attribute.value.clusterDim.y, attribute.value.clusterDim.z = cluster
        attributes.append(attribute)
    if overlap:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        attributes.append(attribute)
    return attributes


def load(cubin: Cubin) -> dict[str, Kernel]:
    """Loads a cubin, or PTX that the driver compiles now, into the current context: kernels by their expressions.

    The driver keeps what it compiled on disk (~/.nv/ComputeCache). Raises KernelError for an image not for this GPU.
    """
    if not cubin.image.startswith(b"\x7fELF") and not cubin.image.endswith(b"\0"):  # the driver would read on behind it
        raise KernelError("PTX has to end with a NUL")
    module = Module(cubin.image)
    try:
        return {expression: Kernel(module, symbol) for expression, symbol in cubin.symbols.items()}
    except BaseException:
        module.close()
        raise


def copy(to: int, source: int, size: int, stream: int) -> None:
    """Enqueues a copy within the device; capturable."""
    _call("cuMemcpyDtoDAsync", to, source, size, stream)


def _giver_back(function: str, handle: object) -> Callable[[], None]:
    """What gives a handle back, from whichever thread; in a forked child, whose it is not, it does nothing.

    After an error that left the device unusable the driver frees nothing: what it says then is of no use.
    """
    driver, (context, _, process) = _driver(), _device(0)

    def give_back() -> None:
        if process == os.getpid():
            driver.cuCtxPushCurrent(context)
            getattr(driver, function)(handle)
            driver.cuCtxPopCurrent()

    return give_back


class Resource:
    """Something of the driver's, given back by `close`, or with the object, at the latest while the interpreter stands."""

    def _own(self, function: str, handle: object) -> None:
        """function: what gives the handle back."""
        finalizer = weakref.finalize(self, _giver_back(function, handle))
        self._finalizers = [finalizer, *getattr(self, "_finalizers", [])]

    def close(self) -> None:
        """Gives it back now; once. It must not be used any more."""
        for finalizer in getattr(self, "_finalizers", []):
            finalizer()


class Memory(Resource):
    """Device memory, freed with the object."""

    def __init__(self, size: int):
        self.address = int(_call("cuMemAlloc", max(size, 1)))
        self._own("cuMemFree", self.address)


class PinnedArray(Resource):
    """Host memory that copies to and from the device run from at full speed, as `array`, uint8 [size]."""

    def __init__(self, size: int):
        self.address = int(_call("cuMemHostAlloc", size, 0))
        self._own("cuMemFreeHost", self.address)
        self.array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.address))


def is_usable(streams: Sequence[Stream]) -> bool:
    """Whether the device takes work, once what these streams were given has ended. After some errors, such as an illegal
    address, it takes none until the process ends."""
    try:
        for stream in streams:
            stream.synchronize()
        free_memory()
    except KernelError:
        return False
    return True


def free_memory() -> tuple[int, int]:
    """Free and total bytes of the device."""
    return _call("cuMemGetInfo")


class Stream(Resource):
    """An order of work on the device."""

    def __init__(self) -> None:
        self.handle = int(_call("cuStreamCreate", _driver().CUstream_flags.CU_STREAM_NON_BLOCKING))
        self._own("cuStreamDestroy", self.handle)

    def upload(self, to: int, source: int, size: int) -> None:
        _call("cuMemcpyHtoDAsync", to, source, size, self.handle)

    def download(self, to: int, source: int, size: int) -> None:
        _call("cuMemcpyDtoHAsync", to, source, size, self.handle)

    def clear(self, to: int, size: int) -> None:
        _call("cuMemsetD8Async", to, 0, size, self.handle)

    def synchronize(self) -> None:
        """Returns when all that was enqueued is done. The driver spins meanwhile, its default: that keeps a processor busy,
        and returns the soonest, which suits a computer that serves one robot."""
        _call("cuStreamSynchronize", self.handle)

    def capture(self, work: Callable[[], None]) -> Graph:
        """What `work` enqueues here, and on streams that wait for this one and are waited for, as a graph."""
        _call("cuStreamBeginCapture", self.handle, _driver().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        try:
            work()
        except BaseException:
            status, graph = _driver().cuStreamEndCapture(self.handle)  # leaves the stream usable
            if status == _driver().CUresult.CUDA_SUCCESS:  # what was recorded until it failed
                _giver_back("cuGraphDestroy", graph)()
            raise
        return Graph(_call("cuStreamEndCapture", self.handle))


class Event(Resource):
    """A point in a stream, to wait for on another or to measure time between."""

    def __init__(self) -> None:
        self._event = _call("cuEventCreate", 0)
        self._own("cuEventDestroy", self._event)

    def record(self, stream: Stream) -> None:
        _call("cuEventRecord", self._event, stream.handle)

    def record_in_graph(self, stream: Stream) -> None:
        """While capturing: a node of the graph that takes the time whenever the graph runs."""
        flags = _driver().CUevent_record_flags.CU_EVENT_RECORD_EXTERNAL
        _call("cuEventRecordWithFlags", self._event, stream.handle, flags)

    def wait(self, stream: Stream) -> None:
        """The stream goes on when the event has happened."""
        _call("cuStreamWaitEvent", stream.handle, self._event, 0)

    def synchronize(self) -> None:
        """Returns when it has happened, at once where it was never recorded."""
        _call("cuEventSynchronize", self._event)

    def milliseconds_since(self, earlier: Event) -> float:
        return _call("cuEventElapsedTime", earlier._event, self._event)


class Graph(Resource):
    """A captured piece of work, launched as one."""

    def __init__(self, graph: object):
        self._own("cuGraphDestroy", graph)
        self._executable = _call("cuGraphInstantiate", graph, 0)
        self._own("cuGraphExecDestroy", self._executable)

    def launch(self, stream: Stream) -> None:
        _call("cuGraphLaunch", self._executable, stream.handle)
