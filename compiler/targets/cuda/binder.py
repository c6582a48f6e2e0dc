"""The launches of one size under construction: where the graph's values lie, and buffers for new ones (see bind.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from duq.compiler.targets.cuda.choose import Chosen
from duq.compiler.targets.cuda.gemm import Gemm, IntegerTactic
from duq.compiler.targets.cuda.integers import Integers
from duq.compiler.targets.cuda.launches import (
    BYTES,
    Argument,
    Arguments,
    Buffer,
    Launch,
    Matrix,
    bytes_of,
)
from duq.compiler.targets.cuda.specialize import Size, Sized
from duq.compiler.targets.cuda.weights import Weights
from duq.compiler.targets.fuse import expect
from duq.compiler.targets.ops import Epilogue, Linear, Norm, Op
from duq.plugins import kernels
from duq.plugins.gpu import Gpu
from duq.plugins.kernel import Instance
from duq.runtime.config import ModelConfig


@dataclass(frozen=True)
class Parts:
    """What a sum has yet to be made of: residual + gate * the sum of parts float32 [count * rows, columns]."""

    residual: Matrix
    parts: Matrix
    gate: Argument


@dataclass(frozen=True)
class Quantized:
    """INT8 activations, in the layout that was chosen, and their scales."""

    x: Matrix
    scale: Matrix


class Binder:
    """The launches of one size under construction: of the prefix, then, over the same buffers, of a denoising step.

    values: where the graph's values lie. caches: each layer's keys and values of the prefix [prefix_rows, head_dim], in pi0
    the state token's in one more row. pixel: C++ type of the images, "unsigned char", or "float" in [-1, 1].
    """

    def __init__(self, config: ModelConfig, size: Size, gpu: Gpu, weights: Weights, pixel: str):
        self.config, self.size, self.gpu, self.weights = config, size, gpu, weights
        self.prefix_rows, self.cache_rows = size.prefix_rows(config), size.cache_rows(config)
        side, width = config.vision.image_size, config.llm.width
        self.images = _input("images", size.cameras * side, 3 * side, pixel)  # [cameras, side, side, RGB]
        self.embeddings = _input("embeddings", size.prompt, width, "Bf16")
        self.state = _input("state", 1, config.state_width, "float")
        self.flow = _input("x", config.action_horizon, config.action_dim, "float")
        self.past = _input("past", 1, 1, "int")  # how many tokens of the prefix are real
        self.inputs = [each.buffer for each in (self.images, self.embeddings, self.state, self.flow, self.past)]
        self.history: Matrix | None = None  # of a solver that reads earlier steps
        self.caches: dict[str, Matrix] = {}
        streams = "the prefix", "the branch", "the step"
        self.workspaces = [Buffer(f"workspace of {stream}", 0, persistent=True) for stream in streams]
        self.scratch = [Buffer(f"scratch of {stream}", 0, persistent=True) for stream in streams]
        self._joined: dict[ir.Value, Matrix] = {}

    def start(self, model: ir.Model, sized: Sized, chosen: Chosen) -> None:
        """Begins a graph. Its inputs are the binder's, by name."""
        self.sized, self.chosen = sized, chosen
        known = {"images": self.images, "state": self.state, "x": self.flow, **self.caches}
        self.values = {value: known[value.name] for value in model.graph.inputs if value.name in known}
        self.quantized: dict[ir.Value, Quantized] = {}
        self.launches: list[Launch] = []
        self.caches_complete = bool(self.caches)  # before the first launch: by the graph before this one
        self.integers = Integers(model, self._input_shapes(), {"cameras": self.size.cameras, "prompt": self.size.prompt})
        self.of_heads: dict[Linear, Matrix] = {}  # of output projections that their attention computes, the heads' parts
        self.unsummed: dict[ir.Value, Parts] = {}  # of values that their first reader sums and writes
        self.prepared: dict[ir.Value, tuple[Matrix, Matrix]] = {}  # x * gain and sums of squares, for a norm of x
        self._written_norms: dict[Norm, Matrix] = {}

    def _input_shapes(self) -> dict[str, tuple[int, ...]]:
        config, side = self.config, self.config.vision.image_size
        caches = {name: (1, config.llm.kv_heads, each.rows, each.columns) for name, each in self.caches.items()}
        images = self.size.cameras, 3, side, side
        return {"images": images, "tokens": (self.size.prompt,), "state": (config.state_width,), **caches}

    # Memory

    def new(self, name: str, rows: int, columns: int, kind: str) -> Matrix:
        return Matrix(Buffer(name, rows * columns * BYTES[kind]), rows, columns, kind)

    def new_output(self, epilogue: Epilogue, rows: int, columns: int) -> Matrix:
        """Where a launch writes its result; rows that are joined with others are written where they end up."""
        if epilogue.joined is None:
            return self.new(str(epilogue.out.name), rows, columns, epilogue.type)
        if epilogue.joined not in self._joined:
            self._joined[epilogue.joined] = self.new("prefix", self.prefix_rows, columns, "float")
        whole = self._joined[epilogue.joined]
        return whole.slice_rows(0, rows) if epilogue.is_first else whole.slice_rows(self.prefix_rows - rows, whole.rows)

    def joined_rows(self, value: ir.Value, name: str) -> Matrix:
        """The rows that `new_output` has placed."""
        expect(value in self._joined, name)
        return self._joined[value]

    def cache(self, name: str) -> Matrix:
        if name not in self.caches:
            rows, dims = self.cache_rows, self.config.llm.head_dim
            buffer = Buffer(name, rows * dims * BYTES["Bf16"], persistent=True)
            self.caches[name] = Matrix(buffer, rows, dims, "Bf16")
        return self.caches[name]

    def solver_history(self, earlier: int) -> Matrix:
        """The changes of so many earlier steps, zero before the first."""
        rows, columns = earlier * self.flow.rows, self.flow.columns
        buffer = Buffer("history", rows * columns * BYTES["float"], persistent=True)
        self.history = Matrix(buffer, rows, columns, "float")
        return self.history

    def workspace(self, gemm: Gemm, tactic: IntegerTactic, branch: bool) -> Matrix | None:
        """Accumulators of the blocks that share K, on GPUs without clusters; zero before and after each launch."""
        if tactic.split == 1 or self.gpu.has_clusters:
            return None
        return self._of_stream(self.workspaces, gemm.workspace_words(tactic), "int", branch)

    def counters(self, words: int, branch: bool) -> Matrix:
        """Of blocks that are done; zero before and after each launch."""
        return self._of_stream(self.workspaces, words, "int", branch)

    def partial(self, words: int, branch: bool) -> Matrix:
        """What the blocks of one launch leave for each other."""
        return self._of_stream(self.scratch, words, "float", branch)

    def _of_stream(self, buffers: list[Buffer], words: int, kind: str, branch: bool) -> Matrix:
        """The start of its stream's buffer, which launches use one after the other."""
        buffer = buffers[2 if self.caches_complete else branch]
        buffer.bytes = max(buffer.bytes, words * BYTES[kind])
        return Matrix(buffer, 1, words, kind)

    # Launches

    def launch(
        self,
        op: Op,
        name: str,
        instance: Instance,
        arguments: Mapping[str, Matrix | Argument],
        reads: Sequence[Matrix],
        writes: Sequence[Matrix],
        work: float = 0.0,
        weight_bytes: int = 0,
    ) -> None:
        """Adds a launch; `work`: operations of its multiplications. Matrices among the arguments become their addresses."""
        addresses = {key: value.pointer if isinstance(value, Matrix) else value for key, value in arguments.items()}
        bound = instance.bind(**addresses)
        buffers = [each.buffer for each in reads], [each.buffer for each in writes]
        moved = weight_bytes + bytes_of([*reads, *writes])
        self.launches.append(Launch(name, instance.on(self.gpu), bound, *buffers, op.branch, work, moved))

    def in_memory(self, op: Op, x: ir.Value, norm: Norm | None) -> Matrix:
        """x, or the norm of it as bf16: a launch of its own, once, where its reader cannot compute it."""
        if norm is None:
            return self.values[x]
        if norm not in self._written_norms:
            source = self.values[norm.x]
            y = self.new(str(norm.out.name), source.rows, source.columns, "Bf16")
            gain, shift = self.vectors(norm)
            instance = kernels.normalize(source.rows, source.columns, source.type, "Bf16", norm.center)
            arguments: Arguments = dict(x=source, gain=gain, shift=shift, y=y, depth=source.columns, x_stride=source.stride,
                             y_stride=y.stride, epsilon=norm.epsilon)  # fmt: skip
            self.launch(op, "norm", instance, arguments, [source], [y])
            self._written_norms[norm] = y
        return self._written_norms[norm]

    def vectors(self, norm: Norm) -> list[Argument]:
        """A norm's gain and shift; an adaptive norm's are rows of tables of the time."""
        form = self.weights.table if norm.adaptive else self.weights.float32
        return [None if value is None else form(value) for value in (norm.gain, norm.shift)]


def _input(name: str, rows: int, columns: int, kind: str) -> Matrix:
    return Matrix(Buffer(name, rows * columns * BYTES[kind], persistent=True), rows, columns, kind)
