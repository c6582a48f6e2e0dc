"""Network -> TensorRT engine, on a machine without a GPU where the flavor of TensorRT can (TensorRT-RTX)."""

from __future__ import annotations

import functools
import mmap
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from rich.progress import Progress, TaskID

from duq.compiler.errors import GraphError
from duq.compiler.targets.tensorrt.network import Network, is_external
from duq.plugins import driver, trt
from duq.plugins.errors import KernelError
from duq.runtime.files import writing

Profile = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""Input -> its smallest, usual and largest shape."""


class Engine(NamedTuple):
    data: memoryview
    log: list[str]
    layers: int  # of TensorRT's network
    plugins: int  # of them, ours
    seconds: float


def build(name: str, network: Network, plugins: int, profile: Profile, sm: int, progress: Progress, folder: Path) -> Engine:
    """Builds the engine of a network with `plugins` plugin nodes for an SM. folder: for a temporary file of the weights.

    Raises GraphError where the parser rejects an operator, a plugin was not found, or TensorRT cannot build the network
    for this SM; with the first of TensorRT's words, the rest of which is the engine's log.
    """
    library, log, start = trt.library(), _log(), time.perf_counter()
    log.lines.clear()
    builder = library.Builder(log)
    definition = builder.create_network(1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = library.OnnxParser(definition, log)
    config = builder.create_builder_config()
    _set_sm(config, sm)
    config.profiling_verbosity = library.ProfilingVerbosity.DETAILED
    config.progress_monitor = _monitor()(name, progress)
    proto = network.proto()
    external = [tensor.name for tensor in proto.graph.initializer if is_external(tensor)]
    with _MappedWeights(network, external, folder) as weights:
        _parse(name, parser, proto.SerializeToString(), weights)
        layers = definition.num_layers
        found = sum(definition.get_layer(i).type == library.LayerType.PLUGIN_V3 for i in range(layers))
        if found != plugins:
            raise GraphError(f"the {name} network has {found} plugins instead of {plugins}: TensorRT did not find ours")
        _set_profile(builder, config, definition, profile)
        data = builder.build_serialized_network(definition, config)
    if data is None:
        raise GraphError(f"TensorRT cannot build the {name} engine for SM {sm}: {log.first_error()}")
    return Engine(memoryview(data), list(log.lines), layers, found, time.perf_counter() - start)


def _parse(name: str, parser: Any, model: bytes, weights: Mapping[str, tuple[int, int]]) -> None:
    """Parses the model. weights: of each constant without data, its address and bytes, read until the engine is built."""
    parser.load_model_proto(model)
    for weight, (address, size) in weights.items():
        if not parser.load_initializer(weight, address, size):
            raise GraphError(f"TensorRT takes no weight {weight} of {size} bytes: {_errors(parser)}")
    if not parser.parse_model_proto():
        raise GraphError(f"TensorRT's parser rejects the {name} graph: {_errors(parser)}")


def _set_sm(config: Any, sm: int) -> None:
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


def _set_profile(builder: Any, config: Any, definition: Any, profile: Profile) -> None:
    ranges = builder.create_optimization_profile()
    for index in range(definition.num_inputs):
        tensor = definition.get_input(index)
        if -1 in tuple(tensor.shape):
            ranges.set_shape(tensor.name, *profile[tensor.name])
    config.add_optimization_profile(ranges)


def _errors(parser: Any) -> str:
    first = parser.get_error(0) if parser.num_errors else None
    return "no reason given" if first is None else f"{first.node_operator()} {first.node_name()}: {first.desc()}"


class _MappedWeights:
    """Where weights of a network are: in a temporary file, mapped, so that no more than one at a time takes memory."""

    def __init__(self, network: Network, names: Sequence[str], folder: Path):
        self._network, self._names, self._folder = network, names, folder

    def __enter__(self) -> dict[str, tuple[int, int]]:
        """The address and the bytes of each weight."""
        with writing(self._folder), tempfile.TemporaryFile(dir=self._folder) as file:  # without a name
            places = self._write(file)
            file.flush()
            self._map = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        return {name: (self._map.ctypes.data + offset, size) for name, (offset, size) in places.items()}

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        del self._map

    def _write(self, file: BinaryIO) -> dict[str, tuple[int, int]]:
        """Computes and writes one weight after the other; returns the offset and the bytes of each."""
        places = {}
        file.write(bytes(64))  # nothing cannot be mapped
        for name in self._names:
            file.write(bytes(-file.tell() % 64))
            data = self._network.tensors[name].tobytes()
            places[name] = file.tell(), len(data)
            file.write(data)
        return places


@functools.cache
def _log() -> Any:
    """TensorRT keeps the first logger a process gives it, so there is one for all engines."""
    library: Any = trt.library()
    errors = (library.ILogger.Severity.ERROR, library.ILogger.Severity.INTERNAL_ERROR)

    class Log(library.ILogger):
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity != library.ILogger.Severity.VERBOSE:
                self.lines.append(f"{severity.name}: {message}")

        def first_error(self) -> str:
            names = tuple(severity.name for severity in errors)
            found = [line for line in self.lines if line.startswith(names)]
            return found[0] if found else "no reason given"

    return Log()


@functools.cache
def _monitor() -> type:
    library: Any = trt.library()

    class Monitor(library.IProgressMonitor):
        """The builder's phases as progress bars; called from its threads, which rich allows."""

        def __init__(self, name: str, progress: Progress):
            library.IProgressMonitor.__init__(self)
            self._name, self._progress = name, progress
            self._tasks: dict[str, TaskID] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._tasks[phase] = self._progress.add_task(f"{self._name}: {phase}", total=steps)

        def step_complete(self, phase: str, step: int) -> bool:
            self._progress.update(self._tasks[phase], completed=step + 1)
            return True

        def phase_finish(self, phase: str) -> None:
            self._progress.remove_task(self._tasks.pop(phase))

    return Monitor
