"""The graphs after all passes -> launches, for one GPU architecture and one size of the observation.

A launch covers one or several nodes: an anchor (a product, an attention, a quantizer) with the norm in front of it and
the element-wise nodes behind it. Reshapes and transposes between tokens and heads cost nothing: activations stay
[tokens, channels] in memory, whatever their shape in the graph. A norm becomes a launch of its own only where its reader
cannot take it in. A node that nothing covers is an error that names it.

Which node is covered by what is the table RULES. Its functions (inputs.py, norms.py, products.py, attention.py) get a
node and the Builder (builder.py), which knows what the operands have become and takes the launches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from duq.compiler.errors import GraphError
from duq.compiler.graph.export import Graphs
from duq.compiler.targets.cuda import attention, inputs, norms, products
from duq.compiler.targets.cuda.builder import INTEGERS, Builder, expect
from duq.compiler.targets.cuda.patterns import is_linear, is_prompt, is_table_row, is_view, is_whole, joins_rows
from duq.compiler.targets.cuda.problems import Choose
from duq.compiler.targets.cuda.program import Buffer, Launch, Matrix
from duq.compiler.targets.cuda.weights import Weights


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
    embedding_table: ir.Value  # of the prompt's tokens; the host's


def lower_variant(
    graphs: Graphs, sm: int, cameras: int, prompt: int, weights: Weights, choose: Choose, pixel: str = "unsigned char"
) -> Variant:
    """Adds what the launches read to `weights`; `choose` has the tactics; `pixel` is the type of the images (Builder).

    Raises GraphError for a node that no launch covers, KernelError for a size that no kernel takes.
    """
    config = graphs.config
    has_state = any(value.name == "state" for value in graphs.prefix.graph.inputs)
    builder = Builder(config, sm, cameras, prompt, has_state, weights, choose, pixel)

    size = config.vision.image_size
    shapes = {"images": (cameras, 3, size, size), "tokens": (prompt,), "state": (config.state_width,)}
    prefix = _cover(builder, graphs.prefix, {"images": builder.images, "state": builder.state}, shapes)
    outputs = {value.name: builder.value(value) for value in graphs.prefix.graph.outputs}
    for name, output in outputs.items():
        expect(isinstance(output, Matrix), name)
    written = {name: _last_write(prefix, matrix) for name, matrix in outputs.items() if name not in builder.caches}
    written |= {name: (cache, len(prefix) - 1) for name, cache in builder.caches.items()}

    shapes = {name: (1, config.llm.kv_heads, cache.rows, cache.columns) for name, cache in builder.caches.items()}
    step = _cover(builder, graphs.step, {"x": builder.flow, **builder.caches}, shapes)
    for value in graphs.step.graph.outputs:
        expect(builder.values[value] is builder.flow, value.name)  # the next step reads it where this one did
    zeroed = [workspace for workspace in builder.workspaces if workspace.bytes]
    return Variant(cameras, prompt, prefix, step, builder.inputs, zeroed, written, builder.embedding_table)


def _cover(builder: Builder, model: ir.Model, places: dict[str, Matrix], shapes: dict[str, tuple]) -> list[Launch]:
    """The launches of a graph. `places`: where its inputs lie; `shapes`: their shapes in this variant; both by name."""
    builder.start({value: places[value.name] for value in model.graph.inputs if value.name in places}, shapes)
    for node in model.graph:
        # Integers, positions for example, are computed when they are needed, by Builder.integer.
        if node not in builder.covered and not all(output.dtype in INTEGERS for output in node.outputs):
            rule_of(node)(builder, node)
    return builder.launches


def _last_write(launches: list[Launch], matrix: Matrix) -> tuple[Matrix, int]:
    return matrix, max(index for index, launch in enumerate(launches) if matrix.buffer in launch.writes)


def _view(builder: Builder, node: ir.Node) -> None:
    builder.values[node.outputs[0]] = builder.value(node.inputs[0])


def _nothing(builder: Builder, node: ir.Node) -> None:
    """Whoever reads the node's output looks at the node itself."""


def _one_of(*op_types: str) -> Callable[[ir.Node], bool]:
    return lambda node: node.op_type in op_types


RULES: tuple[tuple[Callable[[ir.Node], bool], Callable[[Builder, ir.Node], None]], ...] = (
    # which nodes, and what covers them; the first that fits
    (is_view, _view),
    (is_whole, _view),
    (is_linear, products.linear),
    (_one_of("RotateQuantize"), norms.rotate_quantize),
    (_one_of("Rotate"), norms.rotate),
    (_one_of("RMSNormalization", "LayerNormalization"), norms.norm),
    (_one_of("Attention"), attention.attention),
    (joins_rows, inputs.join_rows),
    (_one_of("Concat"), attention.join),
    (_one_of("Conv"), inputs.patch_embedding),
    (is_prompt, inputs.prompt),
    (lambda node: is_table_row(node.outputs[0]), _nothing),
)


def rule_of(node: ir.Node) -> Callable[[Builder, ir.Node], None]:
    """What covers the node. Raises GraphError if nothing does."""
    for fits, cover in RULES:
        if fits(node):
            return cover
    name = ", ".join(output.name for output in node.outputs)
    overload = f" ({node.overload})" if node.overload else ""
    raise GraphError(f"--target cuda has no kernel for {node.domain or 'onnx'}::{node.op_type}{overload}, computing {name}")
