"""The graphs after all passes -> launches, for one GPU architecture and one size of the observation.

A launch covers one or several nodes: an anchor (a product, an attention, a quantiser) with the norm in front of it and
the element-wise nodes behind it. Reshapes and transposes between tokens and heads cost nothing: activations stay
[tokens, channels] in memory, whatever their shape in the graph. A norm becomes a launch of its own only where its reader
cannot take it in. A node that nothing covers is an error that names it.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from compiler.errors import GraphError
from compiler.graph.edit import depends_on, is_weight, small_constant
from compiler.graph.edit import reader as reader_of
from compiler.graph.export import Graphs
from compiler.targets.cuda.patterns import (
    Epilogue, epilogue_of, final_readers, is_rotated, is_table_row, is_view, other_input, past_views, readers_of,
    views_between, views_of,
)
from compiler.targets.cuda.program import (
    BYTES, LIBRARY, MATMUL, Argument, Buffer, Float, ForNorm, Launch, Matrix, Weight,
)
from compiler.targets.cuda.weights import Weights, label
from plugins import attention, ops, pointwise, tactics
from plugins.errors import KernelError
from plugins.tactics import FEW_TOKENS, Tactic

INTEGERS = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)
NARROW = 64  # products over so few channels, a robot's actions and state, are computed in float32


@dataclass
class Normed:
    """norm(x) * gain + shift, computed by whoever reads it."""

    x: Matrix
    gain: Argument
    shift: Argument
    centre: bool
    epsilon: float
    written: Matrix | None = None  # by a launch of its own, where a reader wanted it in memory


@dataclass(frozen=True)
class Quantized:
    """INT8 activations in the layout of one tactic, and their scales."""

    x: Matrix
    scale: Matrix
    tactic: Tactic


@dataclass(frozen=True)
class Joined:
    """Keys or values in two pieces: those in the cache, then the suffix's own."""

    past: Matrix
    own: Matrix


@dataclass(frozen=True)
class Rotation:
    """The rotary embedding of a product's q, k, v: widths, the values that result, the nodes that it covers; the first
    position, counted from *past if that is given; where keys and values go if not beside the queries."""

    columns: list[int]
    dims: int
    results: list[ir.Value]
    nodes: list[ir.Node]
    tables: list[Weight]
    first: int
    past: Matrix | None
    key: Matrix | None
    value: Matrix | None


@dataclass
class Variant:
    """All launches of a call with `cameras` images and a prompt of at most `prompt` tokens."""

    cameras: int
    prompt: int
    prefix: list[Launch]
    step: list[Launch]
    inputs: list[Buffer]
    zeroed: list[Buffer]  # workspaces: zero before the first launch, and left so by each
    outputs: dict[str, tuple[Matrix, int]]  # what the prefix computes, and the launch after which it is there


class Lowering:
    def __init__(self, graphs: Graphs, sm: int, cameras: int, prompt: int, weights: Weights):
        self.graphs, self.sm, self.cameras, self.prompt, self.weights = graphs, sm, cameras, prompt, weights
        config = graphs.config
        self.prefix_rows = cameras * config.vision.tokens + prompt
        size, width = config.vision.image_size, config.llm.width
        self.past = self._input("past", 1, 1, "int")  # how many tokens of the prefix are real
        self.images = self._input("images", cameras * size, 3 * size, "unsigned char")  # [cameras, size, size, RGB]
        self.embeddings = self._input("embeddings", prompt, width, "Bf16")
        self.state = self._input("state", 1, config.action_dim, "float", branch=True)
        self.flow = self._input("x", config.action_horizon, config.action_dim, "float")
        self.caches: dict[str, Matrix] = {}
        self.workspaces = [Buffer("workspace", 0, persistent=True), Buffer("workspace of the branch", 0, persistent=True)]
        self.joined_rows: dict[ir.Node, Matrix] = {}
        self.values: dict[ir.Value, object] = {}
        self.launches: list[Launch] = []
        self.outputs: dict[str, tuple[Matrix, int]] = {}

    def run(self) -> Variant:
        """Raises GraphError for a node that no launch covers, KernelError for a size that no kernel takes."""
        config, prefix = self.graphs.config, self.graphs.prefix
        self.has_state = any(value.name == "state" for value in prefix.graph.inputs)
        self.input_shapes = {
            "images": (self.cameras, 3, config.vision.image_size, config.vision.image_size),
            "tokens": (self.prompt,),
            "state": (config.action_dim,),
        }
        self._program(prefix, {"images": self.images, "state": self.state})
        prefix_launches, self.launches = self.launches, []
        self.outputs |= {name: (cache, len(prefix_launches) - 1) for name, cache in self.caches.items()}

        past = self.prefix_rows + self.has_state
        llm = config.llm
        self.input_shapes = {name: (1, llm.kv_heads, past, llm.head_dim) for name in self.caches}
        self._program(self.graphs.step, {"x": self.flow, **self.caches})
        inputs = [each.buffer for each in (self.images, self.embeddings, self.state, self.flow, self.past)]
        zeroed = [workspace for workspace in self.workspaces if workspace.bytes]
        return Variant(self.cameras, self.prompt, prefix_launches, self.launches, inputs, zeroed, self.outputs)

    def _program(self, model: ir.Model, inputs: dict[str, Matrix]) -> None:
        self.caches_complete = model is self.graphs.step
        self.integers: dict[ir.Value, np.ndarray] = {}
        self.covered: set[ir.Node] = set()  # by a launch of another node
        self.values = {value: inputs[value.name] for value in model.graph.inputs if value.name in inputs}
        for node in model.graph:
            if node not in self.covered and not all(output.dtype in INTEGERS for output in node.outputs):
                self._lower(node)
        for value in model.graph.outputs:
            matrix = self.values[value]
            if isinstance(matrix, Matrix) and value.name not in self.caches and model is self.graphs.prefix:
                writers = [i for i, launch in enumerate(self.launches) if matrix.buffer in launch.writes]
                self.outputs[value.name] = matrix, max(writers)

    def _lower(self, node: ir.Node) -> None:
        if is_view(node) or (node.op_type == "Slice" and node.outputs[0].shape == node.inputs[0].shape):
            self.values[node.outputs[0]] = self._value(node.inputs[0])
        elif node.op_type in ops.QUANTIZED_LINEARS or (node.op_type == "MatMul" and is_weight(node.inputs[1], rank=2)):
            self._linear(node)
        elif node.op_type == "RotateQuantize":
            self._rotate_quantize(node)
        elif node.op_type in ("RMSNormalization", "LayerNormalization"):
            self._norm(node)
        elif node.op_type == "Attention":
            self._attention(node)
        elif node.op_type == "Concat":
            self._concat(node)
        elif node.op_type == "Conv":
            self._patch_embedding(node)
        elif node.op_type == "Gather" and "tokens" in depends_on(node.inputs[1]):
            self._prompt(node)
        elif node.op_type == "Rotate":
            pass  # for linears with float activations, which are refused by name
        elif not is_table_row(node.outputs[0]):
            name = ", ".join(output.name for output in node.outputs)
            overload = f" ({node.overload})" if node.overload else ""
            raise GraphError(f"--target cuda has no kernel for {node.domain or 'onnx'}::{node.op_type}{overload}, computing {name}")

    # Norms and quantisers

    def _norm(self, node: ir.Node) -> None:
        gain, shift = (*node.inputs[1:3], None)[:2]
        ones = small_constant(gain)  # a gain that was folded into the weights
        vectors = [None if ones is not None and (ones == 1).all() else self._float32(gain), self._float32(shift)]
        out = node.outputs[0]
        scaled = reader_of(out)
        if scaled is not None and scaled.op_type == "Mul" and is_table_row(other_input(scaled, out)):  # an adaptive norm
            shifted = reader_of(scaled.outputs[0])
            _expect(vectors == [None, None] and shifted is not None and shifted.op_type == "Add", node)
            rows = other_input(scaled, out), other_input(shifted, scaled.outputs[0])
            _expect(all(map(is_table_row, rows)), node)
            vectors = [self.weights.table(row.producer().inputs[0]) for row in rows]
            self.covered |= {scaled, shifted}
            out = shifted.outputs[0]
        epsilon = node.attributes.get_float("epsilon", 1e-5)
        self.values[out] = Normed(self._value(node.inputs[0]), *vectors, node.op_type == "LayerNormalization", epsilon)

    def _rotate_quantize(self, node: ir.Node) -> None:
        operands = dict(zip(ops.inputs_of(node.op_type, node.overload), node.inputs))
        source = self._value(node.inputs[0])
        fused = isinstance(source, Normed) and not source.centre
        x = source.x if fused else self._matrix(node.inputs[0])
        gain, shift, epsilon = (source.gain, source.shift, source.epsilon) if fused else (None, None, 0.0)

        readers = readers_of(node.outputs[0])
        name = label(readers[0].inputs[2].name)
        shapes = {(*reader.inputs[2].shape.numpy(), ops.QUANTIZED_LINEARS[reader.op_type][0]) for reader in readers}
        chosen = {self._tactic(name, tactics.best, x.rows, n, k, bits) for k, n, bits in shapes}
        if len(chosen) != 1:
            raise GraphError(f"{name}: linears that share activations want different kernels for them")
        tactic = chosen.pop()
        slabs = tactic.slab_tokens and -(-x.rows // tactic.slab_tokens) * tactic.slab_tokens
        x_q = self._new(f"{name}.x_q", slabs or x.rows, x.columns, "signed char")
        scale = self._new(f"{name}.x_scale", x.rows, 1, "float")

        hadamard, rotation = operands.get("hadamard"), operands.get("rotation")
        block = hadamard.shape[0] if hadamard is not None else rotation.shape[-1] if rotation is not None else 0
        how = pointwise.rotate_quantize(
            x.rows, x.columns, x.type, "RMS_NORM" if fused else "PLAIN", "DENSE" if rotation is not None else block
        )
        vectors = [self._float32(operands.get("input_scale")), self._permutation(operands.get("permutation"))]
        vectors += [self._float32(rotation), self._float32(operands.get("activation_scale"))]
        arguments = [x.pointer, gain, shift, *vectors, x_q.pointer, scale.pointer]
        arguments += [x.columns, x.stride, block if rotation is not None else 0, slabs, Float(epsilon)]
        self._kernel(f"{name} (quantise)", how, arguments, [x], [x_q, scale])
        self.values[node.outputs[0]] = Quantized(x_q, scale, tactic)
        self.values[node.outputs[1]] = scale

    # Products

    def _linear(self, node: ir.Node) -> None:
        epilogue = epilogue_of(node)
        weight = node.inputs[2 if node.op_type in ops.QUANTIZED_LINEARS else 1]
        name, x = label(weight.name), self._value(node.inputs[0])
        if isinstance(x, Quantized):
            y = self._integer_linear(node, name, x, epilogue)
        elif isinstance(x, Normed) and weight.shape[-1] <= NARROW and self._value(epilogue.residual) is self.flow:
            y = self._flow_step(name, x, weight, epilogue)
        elif isinstance(x, Matrix) and x.type == "float" and x.columns <= NARROW:
            y = self._narrow_linear(name, x, weight, epilogue)
        elif node.op_type == "MatMul" and _source(x).rows <= FEW_TOKENS and not epilogue.activation == "gelu":
            y = self._small_linear(name, node.inputs[0], weight, epilogue)
        elif node.op_type == "MatMul":
            y = self._float_linear(name, self._matrix(node.inputs[0]), weight, epilogue)
        else:
            raise GraphError(f"{name}: --target cuda has no kernel for {node.op_type}; quantise its activations too")
        self.covered |= set(epilogue.nodes)
        if y is None:
            pass  # its parts are known
        elif not epilogue.parts:
            self.values[epilogue.out] = y
        elif is_rotated(epilogue):
            self._rotary(name, epilogue.parts, y)
        else:
            self.values |= dict(zip(epilogue.parts, y.split([part.shape[-1] for part in epilogue.parts])))

    def _integer_linear(self, node: ir.Node, name: str, x: Quantized, epilogue: Epilogue) -> Matrix:
        operands = dict(zip(ops.inputs_of(node.op_type, node.overload), node.inputs))
        geglu, bits, tactic = epilogue.activation == "geglu", ops.QUANTIZED_LINEARS[node.op_type][0], x.tactic
        if "output_rotation" in operands or epilogue.activation not in ("", "geglu"):
            what = "an output rotation" if "output_rotation" in operands else epilogue.activation
            raise GraphError(f"{name}: --target cuda has no integer kernel with {what}")
        k, n = operands["weight"].shape.numpy()
        m = x.scale.rows
        y = self._new_output(epilogue, m, n // 2 if geglu else n)
        biases = [operands["bias"]] if "bias" in operands else epilogue.bias
        _expect(not (biases and epilogue.gate) and epilogue.bias_table is None, node)
        if epilogue.gate is None:
            scale = self.weights.float32(operands["weight_scale"], order="gate-up" if geglu else "")
        else:  # (acc * weight_scale * x_scale) * gate: one table of weight_scale * gate
            scale = self.weights.table(epilogue.gate.producer().inputs[0], operands["weight_scale"])
        bias = self.weights.float32(*biases, order="gate-up" if geglu else "") if biases else None
        residual = self._residual(epilogue, y)
        packed = self.weights.packed(operands["weight"], bits, tactic.layout, geglu)
        workspace = self._workspace(tactic, m, n, x.x.buffer.branch)
        arguments = [x.x.pointer, x.scale.pointer, packed, scale, bias, residual and residual.pointer, y.pointer]
        arguments += [workspace and workspace.pointer, m, n, k, None, None, None]
        how = pointwise.Launch(tactic.source, tactic.expression(bits, y.type, geglu), tactic.shape(m, n, bits))
        reads = [x.x, x.scale, *([residual] if residual else [])]
        writes = [y, *([workspace] if workspace else [])]
        weight_bytes = n * k * bits // 8
        self._kernel(name, how, arguments, reads, writes, 2.0 * m * n * k, weight_bytes, headers=dict(tactic.headers()))
        self._offer_norm(y)
        return y

    def _small_linear(self, name: str, value: ir.Value, weight: ir.Value, epilogue: Epilogue) -> Matrix | None:
        """A float product of few tokens: one kernel with the norm in front and everything behind it, a rotary embedding
        included; then the parts are bound here and None is returned."""
        x = self._value(value)
        norm = self._norm_ahead(x) if isinstance(x, Normed) else None
        source = norm.x if norm else self._matrix(value)
        (k, n), m = weight.shape.numpy(), source.rows
        rotary = self._rotation(name, epilogue.parts, m) if is_rotated(epilogue) and len(epilogue.parts) == 3 else None
        finish = "ROTARY" if rotary else epilogue.activation.upper() or "NONE"
        order = {"ROTARY": "rotary", "GEGLU": "gate-up"}.get(finish, "")
        y = self._new(name, m, n, "Bf16") if rotary else self._new_output(epilogue, m, n // 2 if finish == "GEGLU" else n)
        residual = self._residual(epilogue, y)
        _expect(finish in ("NONE", "SILU", "GEGLU", "ROTARY") and (residual is None or finish == "NONE"), name)

        # norm(x) W with norm(x) = x r gain + shift: (x gain) W r + shift W, the last a bias, for each step one.
        biases = [value for value in (*epilogue.bias, epilogue.bias_table) if value is not None]
        scaled = None if epilogue.gate is None else self.weights.table(epilogue.gate.producer().inputs[0])
        shifted = norm is not None and x.shift is not None
        _expect(not (biases and (scaled or shifted)) and not (epilogue.bias and epilogue.bias_table), name)
        _expect(not order or (epilogue.bias_table is None and scaled is None), name)
        bias = None
        if shifted:
            bias = self.weights.shift_product(x.shift, weight, order)
        elif epilogue.bias_table is not None:
            bias = self.weights.table(epilogue.bias_table.producer().inputs[0])
        elif epilogue.bias:
            bias = self.weights.float32(*epilogue.bias, order=order)

        tactic = self._tactic(name, tactics.best_float, m, n, k)
        how = pointwise.Launch("gemm_float.cu", tactic.expression(y.type, norm is not None, finish), tactic.shape(m, n))
        _expect(source.stride == source.columns and source.type == "Bf16", name)
        key, value = (rotary.key, rotary.value) if rotary else (None, None)
        if rotary and key is None:  # the suffix's own, beside its queries
            key, value = y.split([n - 2 * rotary.dims, rotary.dims, rotary.dims])[1:]
        past = rotary.past if rotary else None
        squares = norm and norm.squares
        arguments = [source.pointer, squares and squares.pointer, self.weights.float_fragments(weight, order), scaled, bias]
        arguments += [residual and residual.pointer, y.pointer, key and key.pointer, value and value.pointer]
        arguments += rotary.tables if rotary else [None, None]
        arguments += [past and past.pointer, m, n, k, y.stride, key.stride if key else 0, rotary.first if rotary else 0]
        arguments += [int(rotary is not None and rotary.key is not None), Float(x.epsilon if norm else 0.0)]
        arguments += [None, None, None]
        reads = [each for each in (source, squares, residual, past) if each]
        writes = [y, *([rotary.key, rotary.value] if rotary and rotary.key else [])]
        self._kernel(name, how, arguments, reads, writes, 2.0 * m * n * k, 2 * n * k)
        if rotary is None:
            if finish == "NONE":
                self._offer_norm(y)
            return y
        self._bind_rotation(rotary, y)
        return None

    def _float_linear(self, name: str, x: Matrix, weight: ir.Value, epilogue: Epilogue) -> Matrix:
        n = weight.shape[-1]
        _expect(epilogue.bias_table is None and epilogue.activation in ("", "geglu", "gelu"), name)
        _expect(epilogue.gate is None, name)
        geglu = epilogue.activation == "geglu"
        y = self._new(name, x.rows, n, "Bf16") if geglu else self._new_output(epilogue, x.rows, n)
        residual = self._residual(epilogue, y)
        bias = None
        if epilogue.bias:
            bias = self.weights.float32(*epilogue.bias) if y.type == "float" else self.weights.bf16(epilogue.bias)
        self._matmul(name, x, self.weights.matrix(weight), y, bias, residual, gelu=epilogue.activation == "gelu")
        if not geglu:
            return y
        gated = self._new_output(epilogue, x.rows, n // 2)
        self._kernel(f"{name} (GeGLU)", pointwise.geglu(x.rows, n // 2), [y.pointer, gated.pointer, n // 2], [y], [gated])
        return gated

    def _narrow_linear(self, name: str, x: Matrix, weight: ir.Value, epilogue: Epilogue) -> Matrix:
        k, n = weight.shape.numpy()
        _expect(k % 4 == 0 and n % 16 == 0, name)
        _expect(epilogue.activation in ("", "silu") and epilogue.gate is None and epilogue.residual is None, name)
        y = self._new_output(epilogue, x.rows, n)
        bias = self.weights.float32(*epilogue.bias) if epilogue.bias else None
        if epilogue.bias_table is not None:
            _expect(bias is None, name)
            bias = self.weights.table(epilogue.bias_table.producer().inputs[0])
        how = pointwise.linear_narrow(x.rows, n, epilogue.activation.upper() or "NONE", y.type)
        arguments = [x.pointer, self.weights.float32(weight), bias, y.pointer, k, n, None, None, None]
        self._kernel(name, how, arguments, [x], [y], 2.0 * x.rows * n * k, 4 * n * k)
        self._offer_norm(y)
        return y

    def _flow_step(self, name: str, x: Normed, weight: ir.Value, epilogue: Epilogue) -> Matrix:
        """x + (norm(h) W + b): the last layer's output becomes the next state of the flow, in place."""
        k, n = weight.shape.numpy()
        _expect(epilogue.out.is_graph_output() and not epilogue.activation and epilogue.gate is None, name)
        _expect(bool(epilogue.bias) and n % 16 == 0, name)
        bias = self.weights.float32(*epilogue.bias)
        arguments = [x.x.pointer, x.gain, x.shift, self.weights.float32(weight), bias, self.flow.pointer, k, Float(x.epsilon)]
        how, work = pointwise.flow_step(x.x.rows, n), 2.0 * x.x.rows * n * k
        self._kernel(name, how, arguments, [x.x, self.flow], [self.flow], work, 4 * n * k)
        return self.flow

    def _matmul(self, name, x, weight, y, bias=None, addend=None, gelu=False, batch=1, addend_batch_stride=0) -> None:
        m, n, k = x.rows // batch, y.columns, x.columns
        values = dict(weight=weight, x=x.pointer, bias=bias, addend=addend, y=y.pointer, algorithm=0, n=n, m=m, k=k, x_stride=x.stride,
                      y_stride=y.stride, batch=batch, addend_batch_stride=addend_batch_stride,
                      y_type=BYTES[y.type], gelu=int(gelu))  # fmt: skip
        reads = [x]
        if isinstance(addend, Matrix):
            _expect(addend.stride == y.stride, name)
            reads, values["addend"] = [x, addend], addend.pointer
        arguments = [values[key] for key in MATMUL]
        moved = 2 * n * k + sum(each.rows * each.columns * BYTES[each.type] for each in [*reads, y])
        self._add(Launch(name, LIBRARY, "", arguments, work=2.0 * x.rows * n * k, moved=moved), reads, [y])

    # Attention

    def _rotation(self, name: str, parts: Sequence[ir.Value], rows: int) -> Rotation:
        """What becomes of the q, k and v (or k and v) of a product: a rotary embedding of q and k, perhaps the cache."""
        columns = [part.shape[-1] for part in parts]
        turned = [past_views(part) for part in parts]
        nodes = [readers_of(value)[0] for value in turned[:-1]]
        _expect(len(parts) in (2, 3) and all(node.op_type == "RotaryEmbedding" for node in nodes), name)
        results = [*(node.outputs[0] for node in nodes), turned[-1]]
        dims = nodes[-1].inputs[0].shape[-1]
        _expect(columns[-2:] == [dims, dims], name)  # one head of keys and values
        positions = self._integer(nodes[0].inputs[3]).reshape(-1)
        _expect((np.diff(positions) == 1).all() and len(positions) == rows, name)
        behind = int(positions[0]) > 0  # tokens behind the prefix are counted from the end of its real tokens
        first = int(positions[0]) - self.prefix_rows if behind else 0
        key, value = (self._cache(result) for result in results[-2:])
        tables = [self.weights.float32(operand) for operand in nodes[0].inputs[1:3]]
        views = [view for part, last in zip(parts, turned) for view in views_between(part, last)]
        return Rotation(columns, dims, results, [*nodes, *views], tables, first, self.past if behind else None, key, value)

    def _rotary(self, name: str, parts: Sequence[ir.Value], y: Matrix) -> None:
        """The rotary embedding as a launch of its own: q and k in place, or k and v into the cache."""
        r = self._rotation(name, parts, y.rows)
        heads = (sum(r.columns) - 2 * r.dims) // r.dims
        arguments = [y.pointer, *r.tables, r.key and r.key.pointer, r.value and r.value.pointer, r.past and r.past.pointer]
        arguments += [r.first, y.stride, r.key.stride if r.key else 0]
        reads, writes = [y, *([r.past] if r.past else [])], [y, *([r.key, r.value] if r.key else [])]
        self._kernel(f"{name} (rotary)", pointwise.rotary(y.rows, heads, r.dims), arguments, reads, writes)
        self._bind_rotation(r, y)

    def _bind_rotation(self, r: Rotation, y: Matrix) -> None:
        pieces = y.split(r.columns)
        if r.key is not None:  # the prefix's rows, or the one behind them
            start, stop = (0, self.prefix_rows) if r.past is None else (self.prefix_rows, self.prefix_rows + 1)
            pieces[-2:] = [each.slice_rows(start, stop) for each in (r.key, r.value)]
        self.covered |= set(r.nodes)
        self.values |= dict(zip(r.results, pieces))

    def _cache(self, value: ir.Value) -> Matrix | None:
        """The cache that keys or values belong in: those that the prefix hands to the steps."""
        names = [value.name] if value.is_graph_output() else []
        joined = [reader.outputs[0] for reader in readers_of(value) if reader.op_type == "Concat"]
        names += [each.name for each in joined if each.is_graph_output()]
        if not names:
            return None
        if names[0] not in self.caches:
            rows, dims = self.prefix_rows + self.has_state, self.graphs.config.llm.head_dim
            buffer = Buffer(names[0], rows * dims * BYTES["Bf16"], persistent=True)
            self.caches[names[0]] = Matrix(buffer, rows, dims, "Bf16")
        return self.caches[names[0]]

    def _attention(self, node: ir.Node) -> None:
        q, k, v = (self._value(operand) for operand in node.inputs[:3])
        _expect(all(operand is None for operand in node.inputs[3:]), node)
        batch, heads, _, dims = node.inputs[0].shape
        kv_heads = node.inputs[1].shape[1]
        own = (k.own, v.own) if isinstance(k, Joined) else (None, None)
        k, v = (k.past, v.past) if isinstance(k, Joined) else (k, v)
        images = 1 if batch == 1 else self.cameras
        own_rows = own[0].rows if own[0] else 0
        # Of the cache the first *past rows are real; the state token's row is behind them.
        in_cache = any(k.buffer is cache.buffer for cache in self.caches.values())
        keys = k.rows - self.prefix_rows if in_cache else k.rows // images
        if own[0] and own[0].buffer is k.buffer:  # the state token's own row is there already
            keys, own_rows, own = keys + own_rows, 0, (None, None)
        out = self._new(node.outputs[0].name, q.rows, q.columns, "Bf16")
        kernel = attention.best(dims, q.rows // images, images, self.sm)
        kernel = replace(kernel, heads=heads // kv_heads)
        scale = node.attributes.get_float("scale", dims**-0.5)
        _expect(k.stride == v.stride and (own[0] is None or own[0].stride == own[1].stride), node)
        past = self.past if in_cache else None
        arguments = [q.pointer, k.pointer, v.pointer, *(each and each.pointer for each in own), out.pointer]
        arguments.append(past and past.pointer)
        arguments += [q.rows // images, keys, own_rows, q.stride, k.stride, own[0].stride if own[0] else 0, out.stride]
        arguments.append(int(in_cache and self.caches_complete))
        shape = kernel.shape(q.rows // images, kv_heads, images)
        how = pointwise.Launch(kernel.source, kernel.expression(), shape)
        reads = [each for each in (q, k, v, *own, past) if each]
        work = 4.0 * q.rows * (k.rows // images + own_rows) * q.columns
        name = self._attention_name(q)
        self._kernel(name, how, [*arguments, Float(scale)], reads, [out], work, headers=dict(kernel.headers()))
        self.values[node.outputs[0]] = out

    def _attention_name(self, q: Matrix) -> str:
        product = next(launch for launch in reversed(self.launches) if q.buffer in launch.writes)
        return product.name.partition(" (")[0].rpartition(".")[0] + ".attention"

    def _concat(self, node: ir.Node) -> None:
        pieces = [self._value(operand) for operand in node.inputs]
        if node.attributes["axis"].value == 2 and node.outputs[0].is_graph_output():  # both are in the cache already
            self.values[node.outputs[0]] = self.caches[node.outputs[0].name]
        elif node.attributes["axis"].value == 2:
            self.values[node.outputs[0]] = Joined(*pieces)
        else:  # the producers have written into it: _new_output
            _expect(node in self.joined_rows, node)
            self.values[node.outputs[0]] = self.joined_rows[node]

    # Inputs

    def _patch_embedding(self, node: ir.Node) -> None:
        """A convolution without overlap is a product over the pixels of a patch; the positions are added to it.

        The graph's input is float, byte / 127.5 - 1 of the camera's bytes (ModelInputs.pixels). Here the bytes are uploaded, a
        quarter, and the kernel that makes patches computes the same float32 values before it rounds them to bf16.
        """
        weight, bias = node.inputs[1:3]
        added = readers_of(past_views(node.outputs[0]))[0]
        position = added.inputs[1]
        _expect(added.op_type == "Add" and is_weight(position, rank=2), node)
        n, _, patch, _ = weight.shape.numpy()
        size, tokens = self.graphs.config.vision.image_size, self.graphs.config.vision.tokens
        columns = -(-3 * patch * patch // 8) * 8  # whole 16 bytes
        x = self._new("patches", self.cameras * tokens, columns, "Bf16")
        arguments = [self.images.pointer, x.pointer, size, columns]
        self._kernel("patches", pointwise.patches(self.cameras, size, patch), arguments, [self.images], [x])
        y = self._new_output(Epilogue(added.outputs[0]), x.rows, n)

        def offsets() -> np.ndarray:
            return np.float32(position.const_value.numpy()) + np.float32(bias.const_value.numpy())

        addend = self.weights.computed(f"{position.name}+{bias.name}.float32", tokens * n, offsets)
        name = label(weight.name).removesuffix(".weight")
        self._matmul(name, x, self.weights.matrix(weight, columns), y, addend=addend, batch=self.cameras)
        self.covered |= {added, *views_between(node.outputs[0], past_views(node.outputs[0]))}
        self.values[added.outputs[0]] = y

    def _prompt(self, node: ir.Node) -> None:
        """The host looks up the tokens' rows (it alone keeps the table, a gigabyte); here they become float32, scaled."""
        value, factor = node.outputs[0], 1.0
        self.embedding_table = node.inputs[0]
        while (reader := reader_of(value)) is not None and reader.op_type in ("Cast", "Mul"):
            if reader.op_type == "Mul":
                factor *= float(small_constant(other_input(reader, value), limit=1).item())
            self.covered.add(reader)
            value = reader.outputs[0]
        y = self._new_output(Epilogue(value), self.prompt, self.embeddings.columns)
        arguments = [self.embeddings.pointer, y.pointer, y.columns, y.stride, Float(factor)]
        self._kernel("prompt", pointwise.tokens(self.prompt, y.columns), arguments, [self.embeddings], [y])
        self.values[value] = y

    # What a norm asks of the launch that writes its input

    def _offer_norm(self, y: Matrix) -> None:
        """The latest launch may leave something for a norm of y: sums of squares, read 4 at a time."""
        if y.type == "float" and y.stride == y.columns and y.columns % 64 == 0:
            self.launches[-1].for_norm = ForNorm(y)

    def _norm_ahead(self, norm: Normed) -> ForNorm | None:
        """x * gain and the sums of squares from the launch that writes x; None where it has none to give."""
        writer = next((launch for launch in reversed(self.launches) if norm.x.buffer in launch.writes), None)
        ahead = writer and writer.for_norm
        if norm.centre or ahead is None or ahead.y != norm.x or (ahead.x is not None and ahead.gain != norm.gain):
            return None
        if ahead.x is None:
            rows, columns = norm.x.rows, norm.x.columns
            ahead.gain, ahead.x = norm.gain, self._new(f"{writer.name} (normed)", rows, columns, "Bf16")
            ahead.squares = self._new(f"{writer.name} (squares)", rows, columns // 16, "float")
            writer.arguments[-3:] = [ahead.x.pointer, norm.gain, ahead.squares.pointer]
            self._writes(writer, [ahead.x, ahead.squares])
            writer.moved += ahead.x.buffer.bytes + ahead.squares.buffer.bytes
        return ahead

    # Values, memory, launches

    def _value(self, value: ir.Value | None):
        return None if value is None else self.values.get(value)

    def _matrix(self, value: ir.Value) -> Matrix:
        """The value in memory, as bf16: a norm that its reader cannot compute is written by a launch of its own."""
        found = self.values[value]
        if isinstance(found, Normed):
            if found.written is None:
                x = found.x
                y = self._new(f"{value.name}", x.rows, x.columns, "Bf16")
                how = pointwise.normalize(x.rows, x.columns, x.type, "Bf16", found.centre)
                arguments = [x.pointer, found.gain, found.shift, y.pointer, x.columns, x.stride, y.stride, Float(found.epsilon)]
                self._kernel("norm", how, arguments, [x], [y])
                found.written = y
            return found.written
        return found

    def _residual(self, epilogue: Epilogue, y: Matrix) -> Matrix | None:
        """What is added to a product: the residual stream, which goes on in y."""
        residual = self._value(epilogue.residual)
        fits = isinstance(residual, Matrix) and residual.type == y.type == "float" and residual.stride == residual.columns
        _expect(residual is None or fits, epilogue.out.name)
        return residual

    def _float32(self, value: ir.Value | None) -> Weight | None:
        return None if value is None else self.weights.float32(value)

    def _permutation(self, value: ir.Value | None) -> Weight | None:
        if value is None:
            return None

        def indices() -> np.ndarray:
            return value.const_value.numpy().astype(np.int32)

        return self.weights.computed(f"{value.name}.int32", value.shape[0], indices)

    def _new(self, name: str, rows: int, columns: int, kind: str) -> Matrix:
        return Matrix(Buffer(name, rows * columns * BYTES[kind]), rows, columns, kind)

    def _new_output(self, epilogue: Epilogue, rows: int, columns: int) -> Matrix:
        """Where a launch writes its result: float32 for the residual stream, bf16 for what a product reads; rows that
        are concatenated later are written where they end up."""
        value = epilogue.out
        readers = [] if epilogue.parts else final_readers(value)
        concat = next((node for node in readers if node.op_type == "Concat" and node.attributes["axis"].value != 2), None)
        if concat is not None:
            _expect(len(concat.inputs) == 2, concat)
            if concat not in self.joined_rows:
                self.joined_rows[concat] = self._new("prefix", self.prefix_rows, columns, "float")
            whole = self.joined_rows[concat]
            is_first = any(past_views(value) is operand or operand in views_of(value) for operand in concat.inputs[:1])
            return whole.slice_rows(0, rows) if is_first else whole.slice_rows(self.prefix_rows - rows, self.prefix_rows)
        stream = any(node.op_type in ("RMSNormalization", "LayerNormalization", "Add") for node in readers)
        return self._new(value.name, rows, columns, "float" if stream else "Bf16")

    def _tactic(self, name: str, best: Callable[..., Tactic | tactics.Float], *problem: int) -> Tactic | tactics.Float:
        try:
            return best(*problem, self.sm)
        except KernelError as error:
            raise KernelError(f"{name}: --target cuda has {error}") from error

    def _workspace(self, tactic: Tactic, m: int, n: int, branch: bool) -> Matrix | None:
        """Sums of the blocks that share K, on GPUs without clusters; zero before and after each launch."""
        if tactic.split == 1 or self.sm >= 90:
            return None
        words = -(-m // tactic.tile_tokens) * (tactic.tile_tokens * n + n // 16)
        workspace = self.workspaces[branch]
        workspace.bytes = max(workspace.bytes, 4 * words)
        return Matrix(workspace, 1, words, "int")

    def _integer(self, value: ir.Value) -> np.ndarray:
        """An integer of the graph, positions for example, for this size: computed now, by ONNX's own reference."""
        if value.const_value is not None:
            return value.const_value.numpy()
        if value not in self.integers:
            node = value.producer()
            if node is None or value.dtype not in INTEGERS:  # all that is asked of it is its shape
                return np.broadcast_to(np.float32(0), self._shape(value))
            operands = {each.name: self._integer(each) for each in node.inputs if each is not None}
            results = ReferenceEvaluator(ir.to_proto(node)).run(None, operands)
            self.integers |= dict(zip(node.outputs, results))
        return self.integers[value]

    def _shape(self, value: ir.Value) -> tuple[int, ...]:
        if value.name in self.input_shapes:
            return self.input_shapes[value.name]
        sizes = {"cameras": self.cameras, "prompt": self.prompt}
        return tuple(dim if isinstance(dim, int) else dim.evaluate(sizes) for dim in value.shape)

    def _kernel(self, name, how, arguments, reads, writes, work=0.0, weight_bytes=0, headers=None) -> None:
        moved = weight_bytes + sum(each.rows * each.columns * BYTES[each.type] for each in [*reads, *writes])
        # Without clusters the blocks that share K meet in the workspace.
        shape = how.shape if self.sm >= 90 else replace(how.shape, cluster=(1, 1, 1))
        launch = Launch(name, how.source, how.expression, arguments, shape, headers or {}, work=work, moved=moved)
        self._add(launch, reads, writes)

    def _add(self, launch: Launch, reads: Sequence[Matrix], writes: Sequence[Matrix]) -> None:
        """The state token's own pass through the expert (pi0) needs each layer's keys and values and nothing else of the
        prefix, so it is a branch, to run beside it: whatever is computed from the state, until it is in the caches."""
        launch.reads = [each.buffer for each in reads]
        launch.branch = any(buffer.branch for buffer in launch.reads)
        self._writes(launch, writes)
        self.launches.append(launch)

    def _writes(self, launch: Launch, matrices: Sequence[Matrix]) -> None:
        launch.writes = [*launch.writes, *(each.buffer for each in matrices)]
        for buffer in launch.writes:
            buffer.branch |= launch.branch and not buffer.persistent

    def _input(self, name: str, rows: int, columns: int, kind: str, branch: bool = False) -> Matrix:
        buffer = Buffer(name, rows * columns * BYTES[kind], persistent=True, branch=branch)
        return Matrix(buffer, rows, columns, kind)


def _source(x: Matrix | Normed) -> Matrix:
    return x.x if isinstance(x, Normed) else x


def _expect(condition: bool, where: ir.Node | str) -> None:
    if not condition:
        name = where if isinstance(where, str) else where.name or where.outputs[0].name
        raise GraphError(f"--target cuda: {name} is not in a form that it has kernels for")
