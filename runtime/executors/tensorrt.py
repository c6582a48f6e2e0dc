"""Runs a `tensorrt` plan: its engines, recorded once for each size of observation in a CUDA graph of the whole call.

`TensorRTExecutor` opens the plan and deserializes its engines; `Calls` does the rest: memory, bindings, recording, replay.
`Calls` knows an engine only by `bind` and `enqueue`, so that it can be tested on GPUs that TensorRT-RTX does not serve.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing, suppress
from typing import Any, Protocol, TypeVar

import numpy as np

from duq.plugins import driver, trt
from duq.plugins.errors import KernelError
from duq.plugins.nodes import KernelName, Kernels
from duq.plugins.nvrtc import Cubin
from duq.runtime import schema
from duq.runtime.errors import PlanError
from duq.runtime.executors.embeddings import Embeddings
from duq.runtime.plan import Plan
from duq.runtime.preprocess import ModelInputs
from duq.runtime.schema import Name, Open
from duq.runtime.solver import Solver

ALIGNMENT = 256
# Of what plugins store in an engine and pass to the plan's kernels, which are compiled with them; 1 passed fewer arguments.
PLUGINS_VERSION = 2
MAX_GRAPHS = 16  # kept recorded; a prompt of a length not seen lately takes two calls' time
_ITEM_BYTES = {"float": 4, "int64": 8, "bfloat16": 2, "float16": 2}

Shape = tuple[int, ...]
Resource = TypeVar("Resource", bound="driver.Resource")


class Engine(Protocol):
    """What a call needs of an engine."""

    def bind(self, name: str, address: int, shape: Shape | None) -> None:
        """Where the next `enqueue` reads or writes a tensor; the shape is an input's."""

    def enqueue(self, stream: int) -> None:
        """Capturable, once it has run with the same shapes outside of a capture."""


class TensorRTExecutor:
    """Args: plan: opened, target "tensorrt", for the SM of this machine's GPU; threads: of no use here.

    Raises PlanError where the plan is for another SM, another flavor or version of TensorRT or other plugins than these,
    KernelError where a wheel or the driver is missing.
    """

    def __init__(self, plan: Plan, threads: int | None = None):
        sm = driver.open_device()
        section = section_of(plan, sm)
        check_plugins(plan, section)
        check_library(plan, section)
        trt.register(kernels_of(plan, sm))
        engines = {name: _LoadedEngine(plan, sm, name) for name in section["engines"]}
        described = {name: plan.manifest["graphs"][f"sm{sm}/{name}"] for name in engines}
        signatures = {name: engine["inputs"] | engine["outputs"] for name, engine in described.items()}
        self._calls = Calls(engines, signatures, plan.manifest, Embeddings(plan).rows)

    def is_usable(self) -> bool:
        """Whether the GPU takes work, once it has done what it was given."""
        return self._calls.is_usable()

    def close(self) -> None:
        """Gives back the memory of the GPU, and the engines."""
        self._calls.close()

    def warmup(self) -> None:
        """Records the graph of the largest size."""
        driver.open_device()
        self._calls.warmup()

    def run(self, inputs: ModelInputs, noise: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        """Denoises `noise` float32 [H, A] into normalized actions [H, A]; returns them with the stages' milliseconds."""
        driver.open_device()  # the caller may be another thread than the one that loaded the plan
        return self._calls.run(inputs, noise)


def section_of(plan: Plan, sm: int) -> dict[str, Any]:
    """The manifest's part about an SM."""
    sections = plan.manifest["graphs"]
    if f"sm{sm}" not in sections:
        made_for = ", ".join(name.removeprefix("sm") for name in sections if "/" not in name)
        raise PlanError(f"{plan.path}: is made for SM {made_for}, this machine's GPU is SM {sm}; compile it with --sm {sm}")
    return sections[f"sm{sm}"]


def check_plugins(plan: Plan, section: dict[str, Any]) -> None:
    """The plan's kernels take this runtime's arguments, as only a launch would find out."""
    if (version := section.get("plugins_version", 1)) != PLUGINS_VERSION:
        raise PlanError(
            f"{plan.path}: its plugins are of version {version}, this runtime's of version {PLUGINS_VERSION}; "
            "compile it again"
        )


def check_library(plan: Plan, section: dict[str, Any]) -> None:
    """An engine is for the flavor and version of TensorRT that built it."""
    built, here = (section["flavor"], section["version"]), (trt.flavor(), trt.library().__version__)
    if built != here:
        raise PlanError(
            f"{plan.path}: is built with {' '.join(built)}, this machine has {' '.join(here)}; install that version, or "
            "compile the plan again with this one"
        )


def kernels_of(plan: Plan, sm: int) -> Kernels:
    """What the plan's plugins launch."""
    found = {}
    for each in _read_kernels(plan, f"engine/sm{sm}/kernels.json"):
        cubin = Cubin(plan.read(each["cubin"]), {each["expression"]: each["symbol"]})
        found[KernelName(each["source"], each["expression"])] = cubin
    return Kernels(found)


class _Kernel(Open):
    """What kernels.json says of one."""

    source: Name
    expression: Name
    cubin: Name
    symbol: Name


class _KernelList(Open):
    kernels: list[_Kernel]


def _read_kernels(plan: Plan, name: str) -> list[dict[str, str]]:
    try:
        found = schema.parse_json(plan.read(name))
        schema.check(_KernelList, found)
    except PlanError as error:
        raise PlanError(f"{plan.path}: {name}: {error}; compile it again") from error
    kernels: list[dict[str, str]] = found["kernels"]
    return kernels


class _LoadedEngine:
    """A deserialized engine and its execution context."""

    def __init__(self, plan: Plan, sm: int, name: str):
        library = trt.library()
        self._runtime = library.Runtime(library.Logger(library.Logger.WARNING))
        self._engine = self._runtime.deserialize_cuda_engine(plan.read(f"engine/sm{sm}/{name}"))
        if self._engine is None:
            raise PlanError(f"{plan.path}: TensorRT cannot load its {name} engine on this GPU (its log says why)")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise KernelError(f"TensorRT has no memory for its {name} engine (its log says why)")
        self._name = name

    def bind(self, name: str, address: int, shape: Shape | None) -> None:
        if shape is not None:
            self._context.set_input_shape(name, shape)
        self._context.set_tensor_address(name, address)

    def enqueue(self, stream: int) -> None:
        if not self._context.execute_async_v3(stream):
            raise KernelError(f"TensorRT could not run the {self._name} engine (its log says why)")


class Calls:
    """Whole calls of engines: either `policy`, or `prefix` and then `step` for every denoising step.

    Tensors are shared by name: what the prefix writes as key.0 the step reads in place. The state of the flow, and the solver's
    history if it has one, move to and fro between two buffers each. signatures: engine -> tensor -> {"dtype", "shape"}; manifest:
    the plan's; embed: tokens, integers [n], -> their embeddings, 16-bit floats viewed as uint16 [n, width].
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        signatures: Mapping[str, Mapping[str, dict[str, Any]]],
        manifest: dict[str, Any],
        embed: Callable[[np.ndarray], np.ndarray],
    ):
        self._resources = ExitStack()
        try:
            self._open(engines, signatures, manifest, embed)
        except BaseException:
            self.close()
            raise

    def _open(
        self,
        engines: Mapping[str, Engine],
        signatures: Mapping[str, Mapping[str, dict[str, Any]]],
        manifest: dict[str, Any],
        embed: Callable[[np.ndarray], np.ndarray],
    ) -> None:
        self._embed = embed
        config = manifest["model"]
        self._engines: Mapping[str, Engine] = engines
        self._config, self._num_steps, self._history = config, manifest["num_steps"], Solver.of(manifest).history
        self._signatures = signatures
        self._types = {name: each["dtype"] for of_engine in signatures.values() for name, each in of_engine.items()}
        self._largest = manifest["cameras"], config["max_prompt_tokens"]
        self._inputs = [name for name in ("images", "embeddings", "state", "x") if name in self._types]

        shapes = self._shapes(self._largest)
        self._offsets, self._upload_bytes = _side_by_side({name: self._bytes(name, shapes[name]) for name in self._inputs})
        rest = {
            name: self._bytes(name, shape) for name, shape in shapes.items() if name not in self._inputs and name != "step"
        }
        others, end = _side_by_side(rest | {"steps": 8 * self._num_steps}, self._upload_bytes)
        self._offsets |= others
        self._memory, self._stream = self._own(driver.Memory(end)), self._own(driver.Stream())
        self._upload = self._own(driver.PinnedArray(self._upload_bytes))
        self._download = self._own(driver.PinnedArray(rest["x_next"]))
        self._events = [self._own(driver.Event()) for _ in range(3)]
        self._graphs: dict[tuple[int, int], driver.Graph] = {}
        self._lock = threading.Lock()
        self._write_step_numbers()

    def _own(self, resource: Resource) -> Resource:
        """To be given back by `close`, the latest first."""
        return self._resources.enter_context(closing(resource))

    def is_usable(self) -> bool:
        return driver.is_usable([self._stream])

    def close(self) -> None:
        with suppress(KernelError):
            driver.open_device()  # the caller may be another thread
        for graph in getattr(self, "_graphs", {}).values():
            graph.close()
        self._engines = {}
        self._resources.close()

    def warmup(self) -> None:
        with self._lock:
            self._upload.array[:] = 0
            self._graph(self._largest).launch(self._stream)
            self._stream.synchronize()

    def run(self, inputs: ModelInputs, noise: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        with self._lock:
            size = int(inputs.image_mask.sum()), int(inputs.token_mask.sum())
            self._stage(inputs, noise)
            self._graph(size).launch(self._stream)
            self._stream.synchronize()
            actions = self._download.array.view(np.float32).reshape(noise.shape).copy()
            start, middle, end = self._events
            if "policy" in self._engines:
                return actions, {"policy_ms": end.milliseconds_since(start)}
            return actions, {"prefix_ms": middle.milliseconds_since(start), "denoise_ms": end.milliseconds_since(middle)}

    def _stage(self, inputs: ModelInputs, noise: np.ndarray) -> None:
        """What is not there is not computed: absent cameras and prompt padding are left out here."""
        values = {
            "images": inputs.pixels()[inputs.image_mask],
            "embeddings": self._embed(inputs.tokens[inputs.token_mask]),
            "state": inputs.state,
            "x": noise,
        }
        for name in self._inputs:
            data = np.ascontiguousarray(values[name]).reshape(-1).view(np.uint8)
            self._upload.array[self._offsets[name] : self._offsets[name] + data.size] = data

    def _graph(self, size: tuple[int, int]) -> driver.Graph:
        if size not in self._graphs:
            if len(self._graphs) == MAX_GRAPHS:
                self._graphs.pop(next(iter(self._graphs))).close()
            self._follow(size, driver.Event.record)  # TensorRT prepares for new shapes in a call that is not recorded
            self._stream.synchronize()
            self._graphs[size] = self._stream.capture(lambda: self._follow(size, driver.Event.record_in_graph))
        return self._graphs[size]

    def _follow(self, size: tuple[int, int], mark: Callable[[driver.Event, driver.Stream], None]) -> None:
        """Enqueues a whole call."""
        shapes = self._shapes(size)
        self._stream.upload(self._memory.address, self._upload.address, self._upload_bytes)
        mark(self._events[0], self._stream)
        if "policy" in self._engines:
            self._enqueue("policy", shapes, {})
            mark(self._events[1], self._stream)
            result = "x_next"
        else:
            self._enqueue("prefix", shapes, {})
            mark(self._events[1], self._stream)
            if "history" in self._types:
                self._stream.clear(self._address("history"), self._bytes("history", shapes["history"]))
            state = [name for name in ("x", "history") if name in self._types]
            before, after = "", "_next"
            for index in range(self._num_steps):
                places: dict[str, int] = {name: self._address(name + before) for name in state}
                places |= {f"{name}_next": self._address(name + after) for name in state}
                self._enqueue("step", shapes, places | {"step": self._address("steps") + 8 * index})
                before, after = after, before
            result = "x" + before
        mark(self._events[2], self._stream)
        self._stream.download(self._download.address, self._address(result), self._bytes("x_next", shapes["x_next"]))

    def _enqueue(self, name: str, shapes: dict[str, Shape], places: dict[str, int]) -> None:
        engine = self._engines[name]
        for tensor in self._signatures[name]:
            is_input = tensor not in ("x_next", "history_next", "image_features") and not (
                name == "prefix" and _is_cache(tensor)
            )
            address = places[tensor] if tensor in places else self._address(tensor)
            engine.bind(tensor, address, shapes[tensor] if is_input else None)
        engine.enqueue(self._stream.handle)

    def _shapes(self, size: tuple[int, int]) -> dict[str, Shape]:
        """Of every tensor, for a number of cameras and of prompt tokens."""
        cameras, prompt = size
        config, vision, llm = self._config, self._config["vision"], self._config["llm"]
        image, actions = vision["image_size"], (config["action_horizon"], config["action_dim"])
        patches = cameras * (image // vision["patch_size"]) ** 2
        history = (self._history, *actions)
        cache = (1, llm["kv_heads"], patches + prompt + (0 if config["pi05"] else 1), llm["head_dim"])
        shapes = {
            "images": (cameras, 3, image, image),
            "embeddings": (prompt, llm["width"]),
            "state": (config.get("state_dim") or config["action_dim"],),
            "image_features": (patches, llm["width"]),
            "x": actions,
            "x_next": actions,
            "history": history,
            "history_next": history,
            "step": (),
        }
        return {name: cache if _is_cache(name) else shapes[name] for name in self._types}

    def _bytes(self, name: str, shape: Shape) -> int:
        return int(np.prod(shape)) * _ITEM_BYTES[self._types[name]]

    def _address(self, name: str) -> int:
        return self._memory.address + self._offsets[name]

    def _write_step_numbers(self) -> None:
        pinned = driver.PinnedArray(8 * self._num_steps)
        pinned.array.view(np.int64)[:] = np.arange(self._num_steps)
        self._stream.upload(self._address("steps"), pinned.address, pinned.array.nbytes)
        self._stream.synchronize()


def _is_cache(name: str) -> bool:
    return name.split(".")[0] in ("key", "value")


def _side_by_side(sizes: Mapping[str, int], start: int = 0) -> tuple[dict[str, int], int]:
    """The offset of each, aligned, and the end."""
    offsets, end = {}, start
    for name, size in sizes.items():
        offsets[name] = end
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, end
