"""ONNX -> TensorRT engine, on a machine without a GPU where the flavor of TensorRT can (TensorRT-RTX)."""

from __future__ import annotations

import functools
import mmap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from rich.progress import Progress

from duq.compiler.errors import GraphError
from duq.plugins import driver, trt
from duq.plugins.errors import KernelError

INLINE_BYTES = 1024  # smaller initializers stay inside the model

Profile = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""Input -> its smallest, usual and largest shape."""


class Engine(NamedTuple):
    data: memoryview
    log: list[str]
    layers: int  # of TensorRT's network
    plugins: int  # of them, ours
    seconds: float


def build(name: str, model: ir.Model, plugins: int, profile: Profile, sm: int, progress: Progress, folder: Path) -> Engine:
    """Builds the engine of a model with `plugins` plugin nodes for an SM. folder: for a temporary file of the weights.

    Raises GraphError where the parser rejects an operator, a plugin was not found, or TensorRT cannot build the network
    for this SM; with the first of TensorRT's words, the rest of which is the engine's log.
    """
    library, log, start = trt.library(), _log(), time.perf_counter()
    log.lines.clear()
    builder = library.Builder(log)
    network = builder.create_network(1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = library.OnnxParser(network, log)
    config = builder.create_builder_config()
    _set_sm(config, sm)
    config.profiling_verbosity = library.ProfilingVerbosity.DETAILED
    config.progress_monitor = _monitor()(name, progress)
    with _MappedWeights(model, folder) as (proto, weights):
        parser.load_model_proto(proto)
        for weight, (address, size) in weights.items():
            if not parser.load_initializer(weight, address, size):
                raise GraphError(f"TensorRT takes no weight {weight} of {size} bytes: {_errors(parser)}")
        if not parser.parse_model_proto():
            raise GraphError(f"TensorRT's parser rejects the {name} graph: {_errors(parser)}")
        found = sum(network.get_layer(i).type == library.LayerType.PLUGIN_V3 for i in range(network.num_layers))
        if found != plugins:
            raise GraphError(f"the {name} network has {found} plugins instead of {plugins}: TensorRT did not find ours")
        layers = network.num_layers
        _set_profile(builder, config, network, profile)
        data = builder.build_serialized_network(network, config)
    if data is None:
        raise GraphError(f"TensorRT cannot build the {name} engine for SM {sm}: {log.first_error()}")
    return Engine(memoryview(data), list(log.lines), layers, found, time.perf_counter() - start)


def _set_sm(config, sm: int) -> None:
    library = trt.library()
    capability = getattr(getattr(library, "ComputeCapability", None), f"SM{sm}", None)
    if capability is not None and hasattr(config, "set_compute_capability"):
        config.num_compute_capabilities = 1
        config.set_compute_capability(capability, 0)
        return
    try:
        here = driver.open_device()
    except KernelError as error:
        raise GraphError(f"{trt.flavor()} {library.__version__} builds for SM {sm} only on such a GPU: {error}") from error
    if here != sm:
        raise GraphError(f"{trt.flavor()} {library.__version__} builds for this machine's SM {here} only, not for SM {sm}")


def _set_profile(builder, config, network, profile: Profile) -> None:
    ranges = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if -1 in tuple(tensor.shape):
            ranges.set_shape(tensor.name, *profile[tensor.name])
    config.add_optimization_profile(ranges)


def _errors(parser) -> str:
    first = parser.get_error(0) if parser.num_errors else None
    return "no reason given" if first is None else f"{first.node_operator()} {first.node_name()}: {first.desc()}"


class _MappedWeights:
    """The model without its weights, and where they are: in a temporary file, mapped, so that none takes memory."""

    def __init__(self, model: ir.Model, folder: Path):
        self._model, self._path = model, folder / f".{id(self)}.weights.tmp"

    def __enter__(self) -> tuple[bytes, dict[str, tuple[int, int]]]:
        try:
            places = self._write()
            proto = self._proto(places)
            with open(self._path, "rb") as file:
                self._map = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        finally:
            self._path.unlink(missing_ok=True)  # the map keeps it
        return proto, {name: (self._map.ctypes.data + offset, size) for name, (offset, size) in places.items()}

    def __exit__(self, *exception) -> None:
        del self._map

    def _large(self) -> Iterator[ir.Value]:
        return (value for value in self._model.graph.initializers.values() if value.const_value.nbytes >= INLINE_BYTES)

    def _write(self) -> dict[str, tuple[int, int]]:
        places = {}
        with open(self._path, "wb") as file:
            file.write(bytes(64))  # nothing cannot be mapped
            for value in self._large():
                file.write(bytes(-file.tell() % 64))
                places[value.name] = file.tell(), value.const_value.nbytes
                file.write(value.const_value.tobytes())
        return places

    def _proto(self, places: Mapping[str, tuple[int, int]]) -> bytes:
        tensors = {}
        for value in self._large():
            tensors[value] = value.const_value
            offset, size = places[value.name]
            value.const_value = ir.ExternalTensor(
                "weights",
                offset,
                size,
                value.const_value.dtype,
                shape=value.const_value.shape,
                name=value.name,
                base_dir="",
            )
        proto = ir.to_proto(self._model)
        for value, tensor in tensors.items():
            value.const_value = tensor
        return proto.SerializeToString()


@functools.cache
def _log():
    """TensorRT keeps the first logger a process gives it, so there is one for all engines."""
    library = trt.library()
    errors = (library.ILogger.Severity.ERROR, library.ILogger.Severity.INTERNAL_ERROR)

    class Log(library.ILogger):
        def __init__(self):
            library.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity, message):
            if severity != library.ILogger.Severity.VERBOSE:
                self.lines.append(f"{severity.name}: {message}")

        def first_error(self) -> str:
            names = tuple(severity.name for severity in errors)
            found = [line for line in self.lines if line.startswith(names)]
            return found[0] if found else "no reason given"

    return Log()


@functools.cache
def _monitor() -> type:
    library = trt.library()

    class Monitor(library.IProgressMonitor):
        """The builder's phases as progress bars; called from its threads, which rich allows."""

        def __init__(self, name: str, progress: Progress):
            library.IProgressMonitor.__init__(self)
            self._name, self._progress, self._tasks = name, progress, {}

        def phase_start(self, phase, parent, steps):
            self._tasks[phase] = self._progress.add_task(f"{self._name}: {phase}", total=steps)

        def step_complete(self, phase, step):
            self._progress.update(self._tasks[phase], completed=step + 1)
            return True

        def phase_finish(self, phase):
            self._progress.remove_task(self._tasks.pop(phase))

    return Monitor
