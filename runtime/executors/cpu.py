"""Runs a `cpu` plan with ONNX Runtime: one prefix graph, then the step graph for every denoising step."""

from __future__ import annotations

import os
import time
from functools import cached_property
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as onnxruntime_errors

from duq.runtime.config import IMAGE_SLOTS
from duq.runtime.errors import PlanError
from duq.runtime.guidance import Guidance
from duq.runtime.plan import Plan
from duq.runtime.preprocess import ModelInputs

_SESSION_ERRORS = (
    onnxruntime_errors.Fail,
    onnxruntime_errors.InvalidGraph,
    onnxruntime_errors.NotImplemented,
    onnxruntime_errors.RuntimeException,
)

PLAN_FILE = "@" * 512
"""Stands in the graphs for the plan's file name, which only the opened plan knows; same length, so that replacing it
does not disturb the protobuf around it (see `_session`)."""


class CpuExecutor:
    """Args: plan: opened, target "cpu"; threads: of one matrix product (None: one a core)."""

    guided = True

    def __init__(self, plan: Plan, threads: int | None = None):
        self._plan = plan
        self._threads = threads
        self._num_steps = plan.manifest["num_steps"]
        self._steps = [onnxruntime.OrtValue.ortvalue_from_numpy(np.array(i, np.int64)) for i in range(self._num_steps)]

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
        """
        prefix, step = self._prefix, self._step
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

        x, flow = onnxruntime.OrtValue.ortvalue_from_numpy(noise), [noise]
        corrected = []  # an OrtValue made of an array does not keep it alive
        constant = {item.name: past[item.name] for item in step.get_inputs() if item.name in past}
        for number, index in enumerate(self._steps):
            (x_next,) = step.run_with_ort_values(["x_next"], {"x": x, "step": index, **constant})
            if guidance is not None:
                corrected.append(guidance.corrected(x.numpy(), x_next.numpy(), number, self._num_steps))
                x_next = onnxruntime.OrtValue.ortvalue_from_numpy(corrected[-1])
            x = x_next
            if trace is not None:
                flow.append(x.numpy().copy())
        end = time.perf_counter()
        if trace is not None:
            trace.update({name: value.numpy() for name, value in past.items()}, x=np.stack(flow))
        return x.numpy().copy(), {"prefix_ms": (prefix_end - start) * 1e3, "denoise_ms": (end - prefix_end) * 1e3}

    @cached_property
    def _prefix(self) -> onnxruntime.InferenceSession:
        return self._session("prefix")

    @cached_property
    def _step(self) -> onnxruntime.InferenceSession:
        return self._session("step")

    def _session(self, name: str) -> onnxruntime.InferenceSession:
        path = self._plan.path.resolve()
        if not os.fsencode(path).decode(errors="ignore") == str(path):
            raise PlanError(f"{path}: its path is not UTF-8, in which ONNX Runtime looks for the weights; rename it")
        graph = bytes(self._plan.read(f"graph/{name}.onnx")).replace(PLAN_FILE.encode(), _padded(path.name))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.enable_mem_pattern = False  # it would keep memory for every combination of cameras and prompt length
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        # Idle threads wait instead of spinning: alone on the machine a call takes 5 to 13 % longer, but beside one other
        # busy process about half the time (docs/performance.md), and a robot's processor is rarely idle.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        try:
            return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except _SESSION_ERRORS as error:
            version = onnxruntime.__version__
            raise PlanError(f"{path}: ONNX Runtime {version} cannot load its {name} graph: {error}") from error


def _ort_values(feeds: dict[str, np.ndarray], session: onnxruntime.InferenceSession) -> dict[str, Any]:
    wanted = {item.name for item in session.get_inputs()}
    return {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
        for name, array in feeds.items()
        if name in wanted
    }


def _padded(file_name: str) -> bytes:
    """The same file under a name as long as PLAN_FILE: './././engine.plan'."""
    encoded = file_name.encode()
    room = len(PLAN_FILE) - len(encoded)
    return (b"./" * (room // 2) if room % 2 == 0 else b"./" * (room // 2 - 1) + b".//") + encoded
