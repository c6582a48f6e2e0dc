"""What lowering has at hand: what the graph's values have become, memory for new ones, and the launches so far."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from duq.compiler.errors import GraphError
from duq.compiler.targets.cuda.patterns import Epilogue, final_readers, joins_rows, output_type, past_views, views_of
from duq.compiler.targets.cuda.problems import AnyTactic, Choose, Gemm, IntegerTactic, Problem
from duq.compiler.targets.cuda.program import BYTES, Argument, Buffer, Launch, Matrix
from duq.compiler.targets.cuda.weights import Weights
from duq.plugins.errors import KernelError
from duq.plugins.gpu import gpu_of
from duq.plugins.kernel import Instance
from duq.runtime.config import ModelConfig

INTEGERS = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)


@dataclass
class Normed:
    """norm(x) * gain + shift, computed by whoever reads it."""

    x: Matrix
    gain: Argument
    shift: Argument
    center: bool
    epsilon: float
    written: Matrix | None = None  # by a launch of its own, where a reader wanted it in memory


@dataclass(frozen=True)
class Quantized:
    """INT8 activations, in slabs of so many tokens or (0) in rows, and their scales."""

    x: Matrix
    scale: Matrix
    slab_tokens: int


@dataclass(frozen=True)
class Joined:
    """Keys or values in two pieces: those in the cache, then the suffix's own."""

    past: Matrix
    own: Matrix


Lowered = Matrix | Normed | Quantized | Joined  # what a value of the graph has become


class Builder:
    """The launches of one variant under construction: of the prefix, then, over the same memory, of a denoising step.

    values: what the graph's values have become. covered: the nodes that a launch of another node computes. weights:
    what the launches read. caches: each layer's keys and values of the prefix [prefix_rows, head_dim], in pi0 the state
    token's in one more row. pixel: type of the images, "unsigned char", or "float" in [-1, 1].
    """

    def __init__(
        self,
        config: ModelConfig,
        sm: int,
        cameras: int,
        prompt: int,
        has_state: bool,
        weights: Weights,
        choose: Choose,
        pixel: str = "unsigned char",
    ):
        self.config, self.sm, self.cameras, self.prompt, self.weights = config, sm, cameras, prompt, weights
        self._choose = choose
        self.prefix_rows = cameras * config.vision.tokens + prompt
        self.cache_rows = self.prefix_rows + has_state
        size, width = config.vision.image_size, config.llm.width
        self.images = self._input("images", cameras * size, 3 * size, pixel)  # [cameras, size, size, RGB]
        self.embeddings = self._input("embeddings", prompt, width, "Bf16")
        self.state = self._input("state", 1, config.state_width, "float", branch=True)
        self.flow = self._input("x", config.action_horizon, config.action_dim, "float")
        self.past = self._input("past", 1, 1, "int")  # how many tokens of the prefix are real
        self.inputs = [each.buffer for each in (self.images, self.embeddings, self.state, self.flow, self.past)]
        self.embedding_table: ir.Value | None = None  # whose rows `embeddings` are
        self.caches: dict[str, Matrix] = {}
        streams = "the prefix", "the branch", "the step"
        self.workspaces = [Buffer(f"workspace of {stream}", 0, persistent=True) for stream in streams]
        self._joined_rows: dict[ir.Node, Matrix] = {}

    def start(self, values: dict[ir.Value, Lowered], shapes: dict[str, tuple[int, ...]]) -> None:
        """Begins a graph with its inputs: what they are, and by name the shapes that they have in this variant."""
        self.values, self._input_shapes = values, shapes
        self.covered: set[ir.Node] = set()
        self.launches: list[Launch] = []
        self.caches_complete = bool(self.caches)  # before the first launch: by the graph before this one
        self._integers: dict[ir.Value, np.ndarray] = {}

    # Values

    def value(self, value: ir.Value | None) -> Lowered | None:
        """None for an optional operand that is absent, and for weights and integers."""
        return None if value is None else self.values.get(value)

    def integer(self, value: ir.Value) -> np.ndarray:
        """An integer of the graph, positions for example, for this size: computed now, by ONNX's own reference."""
        if value.const_value is not None:
            return value.const_value.numpy()
        if value not in self._integers:
            node = value.producer()
            if node is None or value.dtype not in INTEGERS:  # all that is asked of it is its shape
                return np.broadcast_to(np.float32(0), self._shape(value))
            operands = {each.name: self.integer(each) for each in node.inputs if each is not None}
            results = ReferenceEvaluator(ir.to_proto(node)).run(None, operands)
            self._integers |= dict(zip(node.outputs, results))
        return self._integers[value]

    def _shape(self, value: ir.Value) -> tuple[int, ...]:
        if value.name in self._input_shapes:
            return self._input_shapes[value.name]
        sizes = {"cameras": self.cameras, "prompt": self.prompt}
        return tuple(dim if isinstance(dim, int) else dim.evaluate(sizes) for dim in value.shape)

    # Memory

    def new(self, name: str, rows: int, columns: int, kind: str) -> Matrix:
        return Matrix(Buffer(name, rows * columns * BYTES[kind]), rows, columns, kind)

    def new_output(self, epilogue: Epilogue, rows: int, columns: int) -> Matrix:
        """Where a launch writes its result; rows that are concatenated later are written where they end up."""
        value = epilogue.out
        readers = [] if epilogue.parts else final_readers(value)
        concat = next((node for node in readers if joins_rows(node)), None)
        if concat is not None:
            expect(len(concat.inputs) == 2, concat)
            if concat not in self._joined_rows:
                self._joined_rows[concat] = self.new("prefix", self.prefix_rows, columns, "float")
            whole = self._joined_rows[concat]
            is_first = any(past_views(value) is operand or operand in views_of(value) for operand in concat.inputs[:1])
            return whole.slice_rows(0, rows) if is_first else whole.slice_rows(self.prefix_rows - rows, self.prefix_rows)
        return self.new(value.name, rows, columns, output_type(epilogue))

    def residual(self, epilogue: Epilogue, y: Matrix) -> Matrix | None:
        """What is added to a product: the residual stream, which goes on in y."""
        residual = self.value(epilogue.residual)
        fits = isinstance(residual, Matrix) and residual.type == y.type == "float" and residual.stride == residual.columns
        expect(residual is None or fits, epilogue.out.name)
        return residual

    def joined_rows(self, concat: ir.Node) -> Matrix:
        """The result of a Concat of rows, whose operands new_output has placed."""
        expect(concat in self._joined_rows, concat)
        return self._joined_rows[concat]

    def cache(self, name: str) -> Matrix:
        if name not in self.caches:
            rows, dims = self.cache_rows, self.config.llm.head_dim
            buffer = Buffer(name, rows * dims * BYTES["Bf16"], persistent=True)
            self.caches[name] = Matrix(buffer, rows, dims, "Bf16")
        return self.caches[name]

    def workspace(self, gemm: Gemm, tactic: IntegerTactic, branch: bool) -> Matrix | None:
        """Sums of the blocks that share K, on GPUs without clusters; zero before and after each launch."""
        if tactic.split == 1 or gpu_of(self.sm).has_clusters:
            return None
        words = gemm.workspace_words(tactic)
        workspace = self.workspaces[2 if self.caches_complete else branch]
        workspace.bytes = max(workspace.bytes, 4 * words)
        return Matrix(workspace, 1, words, "int")

    def _input(self, name: str, rows: int, columns: int, kind: str, branch: bool = False) -> Matrix:
        buffer = Buffer(name, rows * columns * BYTES[kind], persistent=True, branch=branch)
        return Matrix(buffer, rows, columns, kind)

    # Launches

    def tactic(self, name: str, problem: Problem, slab_tokens: int | None = None) -> AnyTactic:
        """The tactic for a problem (problems.Choose). Raises KernelError that names the linear."""
        try:
            return self._choose(problem, slab_tokens)
        except KernelError as error:
            raise KernelError(f"{name}: --target cuda has {error}") from error

    def kernel(
        self,
        name: str,
        how: Instance,
        arguments: list[Argument],
        reads: Sequence[Matrix],
        writes: Sequence[Matrix],
        work: float = 0.0,
        weight_bytes: int = 0,
    ) -> None:
        """Adds a launch of one of our kernels; `work`: operations of its products."""
        # Without clusters the blocks that share K meet in the workspace.
        shape = how.on(gpu_of(self.sm)).shape
        moved = weight_bytes + bytes_of([*reads, *writes])
        launch = Launch(name, how.source, how.expression, arguments, shape, dict(how.headers), work=work, moved=moved)
        self.add(launch, reads, writes)

    def add(self, launch: Launch, reads: Sequence[Matrix], writes: Sequence[Matrix]) -> None:
        """The state token's own pass through the expert (pi0) needs each layer's keys and values and nothing else of the
        prefix, so it is a branch, to run beside it: whatever is computed from the state, until it is in the caches."""
        launch.reads = [each.buffer for each in reads]
        launch.branch = any(buffer.branch for buffer in launch.reads)
        self.also_writes(launch, writes)
        self.launches.append(launch)

    def also_writes(self, launch: Launch, matrices: Sequence[Matrix]) -> None:
        launch.writes = [*launch.writes, *(each.buffer for each in matrices)]
        for buffer in launch.writes:
            buffer.branch |= launch.branch and not buffer.persistent

    def writer(self, matrix: Matrix) -> Launch | None:
        """The latest launch that writes into the matrix; None for an input, and for what the graph before wrote."""
        return next((launch for launch in reversed(self.launches) if matrix.buffer in launch.writes), None)


def bytes_of(matrices: Iterable[Matrix]) -> int:
    return sum(each.rows * each.columns * BYTES[each.type] for each in matrices)


def expect(condition: bool, where: ir.Node | str) -> None:
    """Raises GraphError, which names the node or the linear, unless the condition holds."""
    if not condition:
        name = where if isinstance(where, str) else where.name or where.outputs[0].name
        raise GraphError(f"--target cuda: {name} is not in a form that it has kernels for")


def pointer(matrix: Matrix | None) -> Argument:
    """An optional matrix as an argument."""
    return None if matrix is None else matrix.pointer
