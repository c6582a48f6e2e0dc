"""A cuda engine that shows the INT8 activations of a call."""

from __future__ import annotations

import numpy as np

from duq.plugins.driver import PinnedArray, Stream
from duq.runtime.executors.cuda import CudaExecutor
from duq.runtime.preprocess import ModelInputs
from tests.support.same_integers import Activations, Run


class Recording(CudaExecutor):
    """Keeps what the quantizers make."""

    _prefix_run: Run | None = None  # None: nothing is being recorded
    _step_runs: list[Run]

    def record(self, inputs: ModelInputs, noise: np.ndarray) -> tuple[dict, tuple[Run, list[Run]]]:
        """The stages of a call; what the quantizers made in the prefix and in each denoising step, without the rows that
        pad the prompt."""
        stages, tokens = {}, int(inputs.image_mask.sum()) * self._image_tokens + int(inputs.token_mask.sum())
        self._prefix_run, self._step_runs = [], [[] for _ in range(self._num_steps)]
        try:
            self.run(inputs, noise, stages)
            prefix = [(name, (x_q[:tokens], scale[:tokens])) for name, (x_q, scale) in self._prefix_run]
            return stages, (prefix, self._step_runs)
        finally:
            self._prefix_run = None

    def _launch(self, launch: dict, stream: Stream, step: int, overlap: bool) -> None:
        super()._launch(launch, stream, step, overlap)
        if self._prefix_run is not None and launch["name"].endswith("(quantize)"):
            in_prefix = any(launch is each for variant in self._variants.values() for each in variant["prefix"])
            run = self._prefix_run if in_prefix else self._step_runs[step]
            run.append((launch["name"], self._quantized(launch)))

    def _quantized(self, launch: dict) -> Activations:
        arguments = launch["args"]
        depth, slab_tokens = arguments["depth"], arguments["slab_tokens"]
        padded_depth = arguments.get("padded_depth", depth)
        rows = arguments.get("tokens", launch["grid"][0])
        values = self._bytes(arguments["x_q"], (slab_tokens or rows) * padded_depth).view(np.int8)
        if slab_tokens:  # the inverse of plugins.layout.activation_slabs
            pieces, token = values.reshape(-1, slab_tokens, 8, 16), np.arange(rows)[:, None]
            values = pieces[:, token, np.arange(8) ^ token % 8].transpose(1, 0, 2, 3)
        scales = self._bytes(arguments["x_scale"], 4 * rows).view(np.float32)
        return values.reshape(rows, padded_depth)[:, :depth].copy(), scales.reshape(rows, 1).copy()

    def _bytes(self, argument: list, count: int) -> np.ndarray:
        self._synchronize()
        staging = PinnedArray(count)
        self._stream.download(staging.address, self._arena.address + argument[1], count)
        self._stream.synchronize()
        return staging.array.copy()
