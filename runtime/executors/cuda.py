"""Runs a `cuda` plan: follows its schedule once, while a CUDA graph records it, and from then on launches that graph.

A graph holds a whole call: one copy of the observation to the device, the prefix, every denoising step, one copy of the
actions back. There is one for each number of cameras and prompt size of the plan, recorded when first needed. How many
prompt tokens are real is a number in device memory, so that prompts of one size share a graph.

A plan has a schedule for each SM that it was compiled for, and the GPU at hand runs the one that suits it best
(runtime/executors/programs.py). What a GPU can do beyond its schedule is left unused.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from itertools import cycle
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np

from duq.plugins import driver
from duq.plugins.cublas import WORKSPACE_BYTES, CublasLt, Problem
from duq.plugins.errors import DeviceError, KernelError
from duq.plugins.kernel import as_scalar
from duq.plugins.nvrtc import Cubin
from duq.runtime.errors import PlanError
from duq.runtime.executors.embeddings import Embeddings
from duq.runtime.executors.programs import (
    Program,
    best_first,
    device_bytes_of,
    end_of_weights,
    has_kernels,
    program_for,
    programs_of,
    shared_bytes_of,
    sm_to_compile_for,
)
from duq.runtime.executors.schedule import Data, read_schedule
from duq.runtime.plan import Plan
from duq.runtime.preprocess import ModelInputs

STAGING_BYTES = 64 << 20
READERS = 4  # threads that read weights: one alone reads more slowly than the GPU takes them
# What the driver says of an image that it does not take, and not of the GPU's state.
NOT_COMPILED = tuple(
    f"CUDA_ERROR_{name}"
    for name in (
        "INVALID_PTX", "UNSUPPORTED_PTX_VERSION", "JIT_COMPILER_NOT_FOUND", "JIT_COMPILATION_DISABLED", "INVALID_IMAGE",
        "NO_BINARY_FOR_GPU", "INVALID_SOURCE",
    )
)  # fmt: skip
log = logging.getLogger("duq")
_TYPES = {"float": np.float32, "Bf16": np.uint16, "unsigned char": np.uint8}
Closable = TypeVar("Closable", bound="driver.Resource | driver.Module | CublasLt")
AfterLaunch = Callable[[str, Data, driver.Stream], None]  # of the program, the launch and its stream


def _nothing(program: str, launch: Data, stream: driver.Stream) -> None:
    pass


class CudaExecutor:
    """Args: plan: opened, target "cuda", with a program for this machine's GPU; threads: of no use here; program: the SM of
    the schedule to run, by default the one that suits the GPU best.

    Loads kernels and weights onto the GPU. Raises PlanError where the plan is for other GPUs or does not fit into memory,
    KernelError where there is no usable driver or a wheel is missing.

    It runs one call at a time. `another` gives one that runs calls beside this one's.
    """

    in_flight = 3  # of a batch, where nobody says otherwise: the most that gained on an H200 (docs/performance.md)

    def __init__(self, plan: Plan, threads: int | None = None, *, program: int | None = None):
        self._resources = ExitStack()
        try:
            self._open(plan, program)
        except BaseException:  # memory that waits for the error to be forgotten is not there for the next attempt
            self.close()
            raise

    def _open(self, plan: Plan, program: int | None) -> None:
        self._plan = plan
        self._num_steps = plan.manifest["num_steps"]
        config = plan.manifest["model"]
        self._actions_shape = config["action_horizon"], config["action_dim"]
        self._image_tokens = (config["vision"]["image_size"] // config["vision"]["patch_size"]) ** 2
        sm = driver.open_device()
        self.program, schedule = _choose(plan, sm, program)
        _say(plan, self.program, sm)
        self._pixel = np.dtype(_TYPES[schedule["pixel"]])
        self._variants = {(each["cameras"], each["prompt"]): each for each in schedule["variants"]}
        self._embeddings = Embeddings(plan)

        self._library = self._own(CublasLt()) if _uses_library(schedule) else None
        self._recording = threading.Lock()  # library and kernels are set up for one graph at a time
        self._arena_bytes = schedule["arena_bytes"]
        _check_memory(plan, device_bytes_of(schedule))
        self._offsets = {name: offset for name, (offset, _) in schedule["weights"].items()}
        self._weights = self._own(driver.Memory(end_of_weights(schedule["weights"])))
        self._prepare()
        _upload_weights(plan, schedule["weights"], self._weights, self._stream)
        self._kernels = _load_kernels(plan, schedule["kernels"], self.program, self._own)
        self._kernel_names = [each["expression"] for each in schedule["kernels"]]
        self._parameters = [each["parameters"] for each in schedule["kernels"]]
        plan.check_unchanged()  # while weights and kernels were read from it

    def _prepare(self) -> None:
        """What a call has to itself."""
        self._stream, self._branch, self._ahead = (self._own(driver.Stream()) for _ in range(3))
        self._events = [self._own(driver.Event()) for _ in range(3)]  # before the prefix, after it, after the steps
        self._arena = self._own(driver.Memory(self._arena_bytes))
        workspace_bytes = WORKSPACE_BYTES if self._library else 1
        self._workspaces = {stream: self._own(driver.Memory(workspace_bytes)) for stream in self._streams}
        self._upload = self._own(driver.PinnedArray(max(map(_end_of_inputs, self._variants.values()))))
        self._download = self._own(driver.PinnedArray(4 * int(np.prod(self._actions_shape))))
        self._graphs: dict[tuple[int, int], driver.Graph] = {}
        self._lock = threading.Lock()

    def another(self) -> CudaExecutor:
        """One that runs calls beside this one's: the same weights and kernels, and the same results to the bit; streams, graphs
        and memory for activations of its own. To be closed before this one.

        Raises PlanError where there is too little memory.
        """
        driver.open_device()  # the caller may be another thread
        made = copy.copy(self)
        made._resources = ExitStack()
        try:
            workspaces = len(self._streams) * WORKSPACE_BYTES if self._library else 0
            _check_memory(
                self._plan, self._arena_bytes + workspaces, "for one more call at a time, ", "pass in_flight=1, or "
            )
            made._prepare()
        except BaseException:
            made.close()
            raise
        return made

    def _own(self, resource: Closable) -> Closable:
        """To be given back by `close`, the latest first."""
        return self._resources.enter_context(closing(resource))

    @property
    def _streams(self) -> tuple[driver.Stream, driver.Stream, driver.Stream]:
        return self._stream, self._branch, self._ahead

    def is_usable(self) -> bool:
        """Whether the GPU takes work, once it has done what it was given."""
        with self._lock:  # nothing is recorded meanwhile: to wait for a stream would end that
            return driver.is_usable(self._streams)

    def close(self) -> None:
        """Gives back all memory of the GPU, and the kernels' code."""
        with suppress(KernelError):
            driver.open_device()  # the caller may be another thread
        self._resources.close()

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(cameras, prompt tokens) that there can be a graph for."""
        return list(self._variants)

    def kernel_name(self, launch: Data) -> str:
        """The kernel of a launch of the schedule, as a C++ expression, or the library."""
        return self._kernel_names[launch["kernel"]] if "kernel" in launch else launch["call"]

    def warmup(self) -> None:
        """Records the graphs of every size with all cameras, and runs the largest once."""
        driver.open_device()
        cameras = max(cameras for cameras, _ in self._variants)
        with self._lock:
            for size in self._variants:
                if size[0] == cameras:
                    self._graph(size)
            self._upload.array[:] = 0
            self._graph(max(self._variants)).launch(self._stream)
            self._stream.synchronize()

    def run(self, inputs: ModelInputs, noise: np.ndarray, trace: Data | None = None) -> tuple[np.ndarray, dict[str, float]]:
        """Denoises `noise` float32 [H, A] into normalized actions [H, A]; returns them with milliseconds: on the GPU
        "prefix_ms", beside which most of the first step runs, and "denoise_ms", all steps' rest; on the host "stage_ms",
        "launch_ms" and "wait_ms", which has those two in it.

        trace: if given, receives what the stages produced, as numpy: "image_features", "key.0", ..., and "x", the
        states of the flow [num_steps + 1, H, A]. The launches are then made one by one, without a graph.
        """
        driver.open_device()  # the caller may be another thread than the one that loaded the plan
        with self._lock:
            start = time.perf_counter()
            size = self.stage(inputs, noise)
            staged = time.perf_counter()
            if trace is None:
                self._graph(size).launch(self._stream)
            else:
                trace |= self._run_traced(size, noise, int(inputs.token_mask.sum()))
            launched = time.perf_counter()
            self._stream.synchronize()
            done = time.perf_counter()
            actions = self._download.array.view(np.float32).reshape(self._actions_shape).copy()
            first, middle, last = self._events
            timing = {
                "stage_ms": (staged - start) * 1e3,
                "launch_ms": (launched - staged) * 1e3,
                "wait_ms": (done - launched) * 1e3,
                "prefix_ms": middle.milliseconds_since(first),
                "denoise_ms": last.milliseconds_since(middle),
            }
        return actions, timing

    def stage(self, inputs: ModelInputs, noise: np.ndarray) -> tuple[int, int]:
        """Puts a call's inputs where its graph takes them from; returns the size whose graph that is."""
        tokens = inputs.tokens[inputs.token_mask]
        cameras = int(inputs.image_mask.sum())
        size = min((size for size in self._variants if size[0] == cameras and size[1] >= len(tokens)), default=None)
        if size is None:
            raise PlanError(
                f"{self._plan.path}: is not for {cameras} cameras and {len(tokens)} prompt tokens; compile again"
            )
        into = self._inputs(self._variants[size])
        images = into["images"].view(self._pixel).reshape(cameras, *inputs.images.shape[1:])
        for image, slot in zip(images, np.flatnonzero(inputs.image_mask), strict=True):
            image[:] = self._pixels(inputs.images[slot])
        rows = into["embeddings"].view(np.uint16).reshape(size[1], -1)
        rows[: len(tokens)] = self._embeddings.rows(tokens)
        rows[len(tokens) :] = 0  # padding, whose results nothing reads
        if "state" in into:
            into["state"].view(np.float32)[:] = inputs.state
        into["x"].view(np.float32).reshape(noise.shape)[:] = noise
        into["past"].view(np.int32)[:] = cameras * self._image_tokens + len(tokens)
        return size

    def _pixels(self, image: np.ndarray) -> np.ndarray:
        """An image of ModelInputs as the plan takes it; bytes as ModelInputs.pixels has them."""
        if image.dtype == self._pixel:
            return image
        if image.dtype == np.uint8:
            return image / np.float32(127.5) - np.float32(1)
        raise PlanError(
            f"{self._plan.path}: takes images of {self._pixel}, got {image.dtype}; compile it again for images that are "
            "resized in floating point"
        )

    def launch_times(self, size: tuple[int, int], calls: int = 20) -> list[tuple[str, Data, float]]:
        """(program, launch of the schedule, microseconds) of the prefix and of the first denoising step, medians.

        Measured by events between the launches of one graph, in which they follow each other on one stream. Launches
        cannot overlap across an event, and each includes one event's time, 3 to 4 us on an H100: the whole call is faster
        than the sum.
        """
        variant, events, measured = self._variants[size], [], []

        def mark(program: str, launch: Data, stream: driver.Stream) -> None:
            events.append(driver.Event())
            events[-1].record_in_graph(stream)
            measured.append((program, launch))

        medians = self._times_in_turn(variant, events, calls, mark)
        return [
            (program, launch, 1e3 * ms)
            for (program, launch), ms in zip(measured, medians, strict=True)
            if program != "later step"
        ]

    def milliseconds_in_turn(self, size: tuple[int, int], calls: int = 50) -> tuple[float, float]:
        """(prefix, all denoising steps) of a graph in which nothing runs beside the prefix, medians, of the inputs staged last."""
        prefix, steps = self._times_in_turn(self._variants[size], self._events[1:], calls)
        return prefix, steps

    def _times_in_turn(
        self, variant: Data, events: list[driver.Event], calls: int, after_launch: AfterLaunch = _nothing
    ) -> list[float]:
        """Milliseconds to each of the events from the one before, medians, of a graph whose launches are on one stream.
        `after_launch` may add to the events."""
        driver.open_device()
        with self._lock:
            with self._recording:
                self._prepare_library(variant)
                mark = driver.Event.record_in_graph
                graph = self._stream.capture(lambda: self._follow(variant, mark, after_launch, one_stream=True))
            times = []
            for _ in range(calls):
                graph.launch(self._stream)
                self._stream.synchronize()
                pairs = zip([self._events[0], *events], events, strict=False)
                times.append([event.milliseconds_since(before) for before, event in pairs])
        return np.median(times, axis=0).tolist()

    def _inputs(self, variant: Data) -> dict[str, np.ndarray]:
        return {name: self._upload.array[offset : offset + size] for name, (offset, size) in variant["inputs"].items()}

    def _graph(self, size: tuple[int, int]) -> driver.Graph:
        if size not in self._graphs:
            with self._recording:
                self._prepare_library(self._variants[size])
                recorded = self._stream.capture(lambda: self._follow(self._variants[size], driver.Event.record_in_graph))
            self._graphs[size] = self._own(recorded)
        return self._graphs[size]

    def _prepare_library(self, variant: Data) -> None:
        """Lets cuBLASLt choose its algorithms, for which there is no time while a graph is recorded."""
        for launch in [*variant["prefix"], *variant["step"]]:
            if "call" in launch:
                assert self._library is not None, "the schedule calls it"
                self._library.prepare(Problem.of(launch["args"]), launch["args"]["algorithm"])

    def _run_traced(self, size: tuple[int, int], noise: np.ndarray, prompt: int) -> dict[str, np.ndarray]:
        variant = self._variants[size]
        with self._recording:
            self._prepare_library(variant)
        found: dict[str, np.ndarray] = {}
        flow = [noise]
        of_x = {
            "offset": variant["inputs"]["x"][0],
            "rows": len(noise),
            "columns": noise.shape[1],
            "stride": noise.shape[1],
        }

        def after_launch(program: str, launch: Data, stream: driver.Stream) -> None:
            for name, output in variant["outputs"].items():
                if program == "prefix" and variant["prefix"][output["after"]] is launch:
                    found[name] = self._read(output)
            if launch is variant["step"][-1]:
                flow.append(self._read(of_x | {"type": "float"}))

        self._follow(variant, driver.Event.record, after_launch)
        padding = size[1] - prompt
        for name, value in found.items():
            if name.startswith(("key.", "value.")):  # the cache [1, 1, tokens, dims], without the rows of padding
                found[name] = value[None, None, : len(value) - padding]
        return found | {"x": np.stack(flow)}

    def _follow(
        self,
        variant: Data,
        mark: Callable[[driver.Event, driver.Stream], None],
        after_launch: AfterLaunch = _nothing,
        one_stream: bool = False,
    ) -> None:
        """Enqueues a whole call. `after_launch` gets the program ("prefix", "step" or "later step") and the launch, for which
        the launches of chains are made one by one.

        There are three streams: of the prefix, of its branch (pi0's state token), and of the first denoising step. They wait
        for each other as the schedule says, and the later steps for all of them.
        """
        prefix, step, main = variant["prefix"], variant["step"], self._stream
        chains = {each["first"]: each for each in variant.get("chains", ()) if after_launch is _nothing}
        branch, ahead = (main, main) if one_stream else (self._branch, self._ahead)
        reached = {index: driver.Event() for launch in [*prefix, *step] for index in launch.get("wait_for", ())}

        def enqueue(program: str, launch: Data, stream: driver.Stream, step: int = 0, behind_others: bool = False) -> None:
            waits = launch.get("wait_for", ()) if step == 0 else ()
            for index in waits:
                reached[index].wait(stream)
            overlap = launch.get("overlap", False) and not waits and not behind_others
            self._launch(launch, stream, step, overlap)
            after_launch(program, launch, stream)

        def enqueue_step(program: str, stream: driver.Stream, number: int, behind_others: bool) -> None:
            made = 0
            for index, launch in enumerate(step):
                if index < made:
                    continue
                if index not in chains:
                    enqueue(program, launch, stream, number, behind_others and index == 0)
                    continue
                made = chains[index]["last"] + 1
                for before in sorted(
                    {each for part in step[index:made] for each in part.get("wait_for", ()) if number == 0}
                ):
                    reached[before].wait(stream)
                self._launch_chain(chains[index], step[index:made], stream, number)

        (x, x_bytes), upload_bytes = variant["inputs"]["x"], _end_of_inputs(variant)
        main.upload(self._arena.address, self._upload.address, upload_bytes)
        for offset, size in variant["zeroed"]:
            main.clear(self._arena.address + offset, size)
        mark(self._events[0], main)
        _go_on_together([main], [branch, ahead])
        for index, launch in enumerate(prefix):
            stream = branch if launch.get("branch") else main
            enqueue("prefix", launch, stream)
            if index in reached:
                reached[index].record(stream)
        mark(self._events[1], main)
        enqueue_step("step", ahead, 0, behind_others=True)
        _go_on_together([branch, ahead], [main])
        for number in range(1, self._num_steps):
            enqueue_step("later step", main, number, behind_others=number == 1)
        mark(self._events[2], main)
        main.download(self._download.address, self._arena.address + x, x_bytes)

    def _launch(self, launch: Data, stream: driver.Stream, step: int, overlap: bool) -> None:
        values = {name: self._resolve(argument, step) for name, argument in launch["args"].items()}
        if "kernel" not in launch:
            assert self._library is not None, "the schedule calls it"
            operands = {name: int(values[name] or 0) for name in ("weight", "x", "bias", "addend", "y")}
            options = {"workspace": self._workspaces[stream].address, "stream": stream.handle}
            self._library.matmul(Problem.of(values), launch["args"]["algorithm"], **operands, **options)
            return
        cluster = tuple(launch.get("cluster", (1, 1, 1)))
        shape = driver.Shape(tuple(launch["grid"]), launch["threads"], launch["shared"], cluster)
        scalars = [as_scalar(kind, values[name]) for name, kind in self._parameters[launch["kernel"]]]
        self._kernels[launch["kernel"]].launch(shape, scalars, stream.handle, overlap)

    def _launch_chain(self, chain: Data, launches: list[Data], stream: driver.Stream, step: int) -> None:
        """Makes launches of a step at once: their arguments one after the other, then the chain's own."""
        arguments = [argument for each in [*launches, chain] for argument in each["args"].values()]
        kinds = [kind for _, kind in self._parameters[chain["kernel"]]]
        scalars = [as_scalar(kind, self._resolve(each, step)) for kind, each in zip(kinds, arguments, strict=True)]
        shape = driver.Shape(tuple(chain["grid"]), chain["threads"], chain["shared"])
        self._kernels[chain["kernel"]].launch(shape, scalars, stream.handle)

    def _resolve(self, argument: Any, step: int) -> int | float | None:
        """An argument of the schedule (compiler/targets/cuda/emit.py): an address, or a number as it is."""
        match argument:
            case ["a", offset]:
                return self._arena.address + offset
            case ["w", name, step_bytes, offset]:
                return self._weights.address + self._offsets[name] + step * step_bytes + offset
            case ["f", value]:
                return float(value)
        return cast("int | None", argument)

    def _synchronize(self) -> None:
        for stream in self._streams:
            stream.synchronize()

    def _read(self, output: Data) -> np.ndarray:
        """Rows of activations from the device, as float32."""
        self._synchronize()
        kind = _TYPES[output["type"]]
        rows, columns, stride = output["rows"], output["columns"], output["stride"]
        count = (rows - 1) * stride + columns
        staging = driver.PinnedArray(count * np.dtype(kind).itemsize)
        self._stream.download(staging.address, self._arena.address + output["offset"], staging.array.nbytes)
        self._stream.synchronize()
        flat = np.zeros(rows * stride, kind)
        flat[:count] = staging.array.view(kind)
        values = flat.reshape(rows, stride)[:, :columns]
        return values.copy() if kind is np.float32 else (values.astype(np.uint32) << 16).view(np.float32)


def _go_on_together(streams: Iterable[driver.Stream], others: Iterable[driver.Stream]) -> None:
    """The others go on when all of the streams have come here."""
    for stream in streams:
        here = driver.Event()
        here.record(stream)
        for other in others:
            here.wait(other)


def _choose(plan: Plan, sm: int, wanted: int | None) -> tuple[Program, Data]:
    """The program of the plan that the GPU runs best, of all or of those made for the SM `wanted`, and its schedule."""
    limit, cuda, too_large = driver.block_shared_bytes(), driver.cuda_version(), ""
    programs = programs_of(plan.manifest)
    fitting = [each for each in best_first(programs, sm, cuda) if wanted in (None, each.sm)]
    if chosen := program_for(fitting, sm, limit, lambda each: read_schedule(plan, each.schedule)):
        return chosen
    if fitting:
        needed = shared_bytes_of(read_schedule(plan, fitting[-1].schedule))
        too_large = (
            f" (the program for SM {fitting[-1].sm} takes {needed / 1024:.0f} KB of shared memory a thread block, "
            f"this GPU has {limit / 1024:.0f} KB)"
        )
    newer = [each.driver for each in programs if each.runs_on(sm) and each.driver > cuda and wanted in (None, each.sm)]
    if newer and not too_large:
        raise PlanError(
            f"{plan.path}: needs a driver for CUDA {min(newer)}, this machine's is for CUDA {cuda}; update it, or compile "
            f"the plan with an older NVRTC ('duq-vla[cuda12]' for CUDA 12)"
        )
    if wanted is None or too_large:
        made_for = ", ".join(str(each) for each in plan.manifest["sm"])
        raise PlanError(
            f"{plan.path}: is made for SM {made_for}{too_large}, this machine's GPU is SM {sm}; compile it with --sm "
            f"{sm_to_compile_for(sm, limit)}"
        )
    held = ", ".join(f"SM {each.sm} ({each.image})" for each in programs)
    raise PlanError(f"{plan.path}: has no program for SM {wanted} that a GPU of SM {sm} runs; it has {held}")


def _say(plan: Plan, program: Program, sm: int) -> None:
    """Logs what runs; a warning where it is not what runs best."""
    if program.image == "cubin":
        log.info("%s: runs its program for SM %d on a GPU of SM %d", plan.path, program.sm, sm)
        return
    better = (
        f"compile the plan with --sm {sm} for kernels of its own"
        if has_kernels(sm)
        else "duq has no kernels of its own for it"
    )
    log.warning(
        "%s: runs its program for SM %d on a GPU of SM %d, from PTX: the driver compiles it once, which takes a while; %s",
        plan.path, program.sm, sm, better,
    )  # fmt: skip


def _uses_library(schedule: Data) -> bool:
    return any("call" in launch for variant in schedule["variants"] for launch in [*variant["prefix"], *variant["step"]])


def _end_of_inputs(variant: Data) -> int:
    """The inputs lie at the start of the arena, side by side."""
    return max(offset + size for offset, size in variant["inputs"].values())


def _check_memory(plan: Plan, needed: int, what_for: str = "", remedy: str = "") -> None:
    free, total = driver.free_memory()
    if needed > free:
        raise PlanError(
            f"{plan.path}: {what_for}needs {needed / 1e9:.2f} GB of GPU memory, {free / 1e9:.2f} of {total / 1e9:.2f} GB are "
            f"free; {remedy}end what else uses the GPU"
        )


def _upload_weights(plan: Plan, weights: dict[str, list[int]], to: driver.Memory, stream: driver.Stream) -> None:
    """All weights into one block of device memory, by way of two pieces of pinned memory: one fills while one is copied."""
    with ExitStack() as stack:
        staging = [
            (stack.enter_context(closing(driver.PinnedArray(STAGING_BYTES))), stack.enter_context(closing(driver.Event())))
            for _ in range(2)
        ]
        readers = stack.enter_context(ThreadPoolExecutor(READERS, "duq-read"))
        for load, (pinned, copied) in zip(_loads(weights), cycle(staging), strict=False):
            copied.synchronize()
            places = [pinned.array[each.place : each.place + each.size] for each in load]
            read = [
                readers.submit(plan.read_into, f"weights/{each.name}", place, each.start)
                for each, place in zip(load, places, strict=True)
            ]
            for each, done in zip(load, read, strict=True):
                done.result()
                stream.upload(to.address + weights[each.name][0] + each.start, pinned.address + each.place, each.size)
            copied.record(stream)
        stream.synchronize()


class _Piece(NamedTuple):
    """Bytes of a weight from `start` on, and their place in the staging memory."""

    name: str
    start: int
    size: int
    place: int


def _loads(weights: dict[str, list[int]]) -> Iterator[list[_Piece]]:
    """All of every weight in its order, in pieces of at most a quarter of the staging memory, which each load fills."""
    load: list[_Piece] = []
    used, step = 0, STAGING_BYTES // 4
    for name, (_, weight_bytes) in weights.items():
        for start in range(0, weight_bytes, step):
            size = min(step, weight_bytes - start)
            if used + size > STAGING_BYTES:
                yield load
                load, used = [], 0
            load.append(_Piece(name, start, size, used))
            used += size
    yield load


def _load_kernels(
    plan: Plan, kernels: list[Data], program: Program, own: Callable[[driver.Module], driver.Module]
) -> list[driver.Kernel]:
    """The schedule's kernels in its order; each image is loaded once. own: is given what was loaded, to unload it."""
    symbols: dict[str, dict[str, str]] = {}
    for each in kernels:
        symbols.setdefault(each[program.image], {})[each["expression"]] = each["symbol"]
    loaded: dict[str, dict[str, driver.Kernel]] = {}
    try:
        for entry, names in symbols.items():
            loaded[entry] = driver.load(Cubin(plan.read(entry), names))
            own(next(iter(loaded[entry].values())).module)
    except KernelError as error:
        if program.image == "cubin" or isinstance(error, DeviceError) and error.status not in NOT_COMPILED:
            raise
        raise PlanError(
            f"{plan.path}: the driver does not compile its PTX ({error}); update the driver, or compile the plan for this GPU"
        ) from error
    return [loaded[each[program.image]][each["expression"]] for each in kernels]
