"""Runs a `cpu` plan with ONNX Runtime: one prefix graph, then the step graph for every denoising step."""

from __future__ import annotations

import ctypes
import fcntl
import logging
import mmap
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state

from duq.runtime.config import IMAGE_SLOTS
from duq.runtime.errors import EngineError, PlanError
from duq.runtime.executors.integers import multiplies_exactly
from duq.runtime.guidance import Guidance
from duq.runtime.plan import Plan
from duq.runtime.preprocess import ModelInputs
from duq.runtime.solver import Solver

# All that ONNX Runtime raises: a class for each of its status codes, and what its bindings make of C++'s own.
ONNXRUNTIME_ERRORS: tuple[type[Exception], ...] = (
    *(each for each in vars(onnxruntime_pybind11_state).values() if isinstance(each, type) and issubclass(each, Exception)),
    RuntimeError,
    ValueError,
    MemoryError,
)
GRAPHS = ("prefix", "step")
INT8_WEIGHTS = "W8A8Linear"
"""What the operators of INT8 activations and INT8 weights are called, in graphs that have some."""
PLAN_FILE = "@" * 512
"""The file that the graphs say their weights are in, by offset: the plan, under a name of fixed length (see `_with_weights`)."""

log = logging.getLogger("duq")

# An entry of a tensor's external data, {key: "offset", value: digits}, as ONNX serializes it: the value behind its length.
_OFFSET = re.compile(rb"\n\x06offset\x12([\x01-\x14])(\d{1,20})", re.DOTALL)
_opening = threading.RLock()  # ONNX Runtime has locks of its own while it creates a session: a fork waits until it is done
_libc = ctypes.CDLL(None)


def _after_in_child() -> None:
    """Once Python is done with its exit, the process ends, before ONNX Runtime's destructors. They wait for
    threads, which are the parent's, for ever: in any child of a process that has imported it."""
    if hasattr(_libc, "on_exit"):  # in glibc; what is registered last is called first, with the exit status
        _libc.on_exit(_libc._exit, None)
    _opening.release()


os.register_at_fork(before=_opening.acquire, after_in_parent=_opening.release, after_in_child=_after_in_child)


class CpuExecutor:
    """Args: plan: opened, target "cpu"; threads: of one matrix product (None: one a core).

    Raises PlanError where the plan lacks a graph, or one whose products are exact on this CPU; later where a graph cannot be
    loaded, or the plan has been written to.
    """

    guided = True

    def __init__(self, plan: Plan, threads: int | None = None):
        self._plan = plan
        with _opening:
            self._entries = {name: _exact_entry(plan, name) for name in GRAPHS}
        self._threads = threads
        self._solver, config = Solver.of(plan.manifest), plan.manifest["model"]
        steps = range(self._solver.num_steps)
        self._steps = [onnxruntime.OrtValue.ortvalue_from_numpy(np.array(i, np.int64)) for i in steps]
        self._history_shape = self._solver.history, config["action_horizon"], config["action_dim"]

    def warmup(self) -> None:
        """Creates the sessions (ONNX Runtime unpacks the weights for its kernels) and runs once, at the largest size:
        what that allocates serves every smaller observation."""
        config, cameras = self._plan.manifest["model"], self._plan.manifest["cameras"]
        size, prompt = config["vision"]["image_size"], config["max_prompt_tokens"]
        inputs = ModelInputs(
            images=np.zeros((len(IMAGE_SLOTS), size, size, 3), np.uint8),
            image_mask=np.arange(len(IMAGE_SLOTS)) < cameras,
            tokens=np.zeros(prompt, np.int64),
            token_mask=np.ones(prompt, bool),
            state=np.zeros(config.get("state_dim") or config["action_dim"], np.float32),
        )
        self.run(inputs, np.zeros((config["action_horizon"], config["action_dim"]), np.float32))

    def run(
        self,
        inputs: ModelInputs,
        noise: np.ndarray,
        trace: dict[str, Any] | None = None,
        guidance: Guidance | None = None,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Denoises `noise` float32 [H, A] into normalized actions [H, A]; returns them with the stages' milliseconds.

        trace: if given, receives what the stages produced, as numpy: "image_features", "key.0", ..., and "x", the
        states of the flow [num_steps + 1, H, A]. guidance: corrects the state after each step.
        Raises EngineError where ONNX Runtime fails: there is not enough memory, or inputs that the graphs do not take.
        """
        with _opening:
            prefix, step = self._prefix, self._step
        try:
            return self._run(prefix, step, inputs, noise, trace, guidance)
        except ONNXRUNTIME_ERRORS as error:
            raise EngineError(f"{self._plan.path}: ONNX Runtime failed ({type(error).__name__}: {error})") from error

    def is_usable(self) -> bool:
        """Always: a call leaves nothing behind in ONNX Runtime's sessions."""
        return True

    def close(self) -> None:
        """Frees the sessions, with the weights that they unpacked."""
        for name in ("_prefix", "_step"):
            self.__dict__.pop(name, None)

    def _run(
        self,
        prefix: onnxruntime.InferenceSession,
        step: onnxruntime.InferenceSession,
        inputs: ModelInputs,
        noise: np.ndarray,
        trace: dict[str, Any] | None,
        guidance: Guidance | None,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        start = time.perf_counter()
        # What is not there is not computed: absent cameras and prompt padding are left out here.
        feeds = {
            "images": inputs.pixels()[inputs.image_mask],
            "tokens": inputs.tokens[inputs.token_mask],
            "state": inputs.state,
        }
        names = [output.name for output in prefix.get_outputs()]
        values = prefix.run_with_ort_values(names, _ort_values(feeds, prefix))
        past = dict(zip(names, values, strict=True))
        prefix_end = time.perf_counter()

        arrays = [noise]  # an OrtValue made of an array does not keep it alive
        state = {"x": onnxruntime.OrtValue.ortvalue_from_numpy(noise)}
        if self._solver.history:
            arrays.append(np.zeros(self._history_shape, np.float32))
            state["history"] = onnxruntime.OrtValue.ortvalue_from_numpy(arrays[-1])
        flow = [noise]
        constant = {item.name: past[item.name] for item in step.get_inputs() if item.name in past}
        for number, index in enumerate(self._steps):
            results = step.run_with_ort_values([f"{name}_next" for name in state], {**state, "step": index, **constant})
            after = dict(zip(state, results, strict=True))
            if guidance is not None:
                corrected = self._corrected(state, after, number, guidance)
                arrays += corrected.values()
                after = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in corrected.items()}
            state = after
            if trace is not None:
                flow.append(state["x"].numpy().copy())
        end = time.perf_counter()
        if trace is not None:
            trace.update({name: value.numpy() for name, value in past.items()}, x=np.stack(flow))
        return state["x"].numpy().copy(), {"prefix_ms": (prefix_end - start) * 1e3, "denoise_ms": (end - prefix_end) * 1e3}

    def _corrected(
        self, before: dict[str, Any], after: dict[str, Any], number: int, guidance: Guidance
    ) -> dict[str, np.ndarray]:
        """The state after a step, as if its velocity had been the guided one: for this step, and for those that read it later."""
        x, x_next = before["x"].numpy(), after["x"].numpy()
        if "history" not in after:
            return {"x": x_next + guidance.correction(x, x_next - x, number, self._solver.num_steps)}
        history = after["history"].numpy().copy()
        correction = guidance.correction(x, history[0], number, self._solver.num_steps)
        history[0] += correction
        return {"x": x_next + self._solver.coefficients()[number, 0] * correction, "history": history}

    @cached_property
    def _prefix(self) -> onnxruntime.InferenceSession:
        config, session = self._plan.manifest["model"], self._session("prefix")
        size, state = config["vision"]["image_size"], config.get("state_dim") or config["action_dim"]
        self._check_inputs(session, "prefix", {"images": [None, 3, size, size], "tokens": [None], "state": [state]})
        return session

    @cached_property
    def _step(self) -> onnxruntime.InferenceSession:
        config, session = self._plan.manifest["model"], self._session("step")
        cached = {item.name: item.shape for item in self._prefix.get_outputs()}
        known = {"x": [config["action_horizon"], config["action_dim"]], "step": [], "history": list(self._history_shape)}
        self._check_inputs(session, "step", {name: [None] * len(shape) for name, shape in cached.items()} | known)
        return session

    def _session(self, name: str) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.enable_mem_pattern = False  # it would keep memory for every combination of cameras and prompt length
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        # Idle threads wait instead of spinning: alone on the machine a call takes 5 to 13 % longer, but beside one other
        # busy process about half the time (docs/performance.md), and a robot's processor is rarely idle.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        graph = self._plan.read(self._entries[name])
        with _weights_of(self._plan, name, graph) as weights:
            graph = _with_weights(graph, weights, options)
            try:
                return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
            except ONNXRUNTIME_ERRORS as error:
                version = onnxruntime.__version__
                raise PlanError(
                    f"{self._plan.path}: ONNX Runtime {version} cannot load its {name} graph: {error}"
                ) from error

    def _check_inputs(
        self, session: onnxruntime.InferenceSession, name: str, expected: dict[str, list[int | None]]
    ) -> None:
        """The graph takes what the manifest says it does. None: any size."""
        for item in session.get_inputs():
            shape = expected.get(item.name, item.shape)
            agree = len(shape) == len(item.shape) and all(
                size is None or isinstance(found, str) or size == found
                for size, found in zip(shape, item.shape, strict=True)
            )
            if not agree:
                raise PlanError(
                    f"{self._plan.path}: its {name} graph takes {item.name} {item.shape}, its manifest describes {shape}; "
                    "compile the plan again"
                )


@dataclass(frozen=True)
class _Weights:
    """A file in memory, which nobody can write to or cut short."""

    descriptor: int
    mapping: mmap.mmap


@contextmanager
def _weights_of(plan: Plan, name: str, graph: bytes) -> Iterator[_Weights]:
    """Those of a graph, where they are in the plan; what else the plan has is holes.

    From the plan itself ONNX Runtime would read for seconds, in which that may be cut short.
    """
    entries = {entry["offset"]: each for each, entry in plan.manifest["entries"].items() if entry["bytes"]}
    offsets = {int(digits[: length[0]]) for length, digits in _OFFSET.findall(graph)}
    if unknown := offsets - entries.keys():
        raise PlanError(f"{plan.path}: its {name} graph has weights at {min(unknown)}, where no entry is; compile it again")
    descriptor = os.memfd_create("duq weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.truncate(descriptor, plan.size)
        for offset in sorted(offsets):
            plan.copy_into(descriptor, entries[offset])
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
        yield _Weights(descriptor, mmap.mmap(descriptor, plan.size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ))
    finally:
        os.close(descriptor)


def _with_weights(graph: bytes, weights: _Weights, options: onnxruntime.SessionOptions) -> bytes:
    """The graph and options of a session that takes its weights from there.

    ONNX Runtime copies them out of the mapping. Releases without that (1.23, the last for Python 3.10) open the file by its
    descriptor and map it themselves, for as long as the session lives.
    """
    if hasattr(options, "add_external_initializers_from_files_in_memory"):
        size = len(weights.mapping)
        options.add_external_initializers_from_files_in_memory([PLAN_FILE], [weights.mapping], [size])
        return graph
    name = str(weights.descriptor)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", "/proc/self/fd")
    room = len(PLAN_FILE) - len(name)
    return graph.replace(
        PLAN_FILE.encode(), ("./" * (room // 2) + "/" * (room % 2) + name).encode()
    )  # "./././3" or "././/13"


def graph_entry(graph: str, unsigned_weights: bool = False) -> str:
    """The plan's entry of a graph; `unsigned_weights`: with its 8-bit weights as uint8, where it has any."""
    return f"graph/{graph}.uint8.onnx" if unsigned_weights else f"graph/{graph}.onnx"


def _exact_entry(plan: Plan, graph: str) -> str:
    """The entry of the graph that computes the plan's integers on this CPU: the faster one if its products are exact here."""
    entry = graph_entry(graph)
    if INT8_WEIGHTS.encode() not in plan.read(entry) or multiplies_exactly(unsigned_weights=False):
        return entry
    unsigned = graph_entry(graph, unsigned_weights=True)
    if unsigned not in plan.names:
        raise PlanError(
            f"{plan.path}: has 8-bit weights and no {unsigned}: without it, this CPU would compute other actions, as its "
            "products of 8 bits saturate (x86 without VNNI); compile the plan again"
        )
    if not multiplies_exactly(unsigned_weights=True):
        raise PlanError(
            f"{plan.path}: has 8-bit weights, which ONNX Runtime {onnxruntime.__version__} multiplies wrongly on this CPU; "
            "use another release of it, or compile with --weight-bits 4"
        )
    log.info("%s: runs %s, as on this CPU the faster products of 8-bit weights saturate", plan.path, unsigned)
    return unsigned


def _ort_values(feeds: dict[str, np.ndarray], session: onnxruntime.InferenceSession) -> dict[str, Any]:
    wanted = {item.name for item in session.get_inputs()}
    return {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
        for name, array in feeds.items()
        if name in wanted
    }
