"""Float32 linears between the robot's action dimensions and the expert's width: linear_narrow.cu."""

from __future__ import annotations

from duq.plugins.kernel import Instance, Kernel, Shape
from duq.plugins.kernels.reference import Launched, Pointer, affine, leave_for_norm, rms_norm, silu

MAX_DEPTH = 64  # inputs of linear_narrow
NARROW_COLUMNS = 16  # of a block of linear_narrow
FLOW_COLUMNS = 16  # of a block of flow_step


def _reference_of_linear_narrow(
    launch: Launched,
    x: Pointer,
    weight: Pointer,
    bias: Pointer | None,
    y: Pointer,
    depth: int,
    columns: int,
    normed: Pointer | None,
    normed_gain: Pointer | None,
    normed_squares: Pointer | None,
) -> None:
    assert depth <= MAX_DEPTH and launch.grid[0] * NARROW_COLUMNS == columns
    v = affine(x.read("float", launch.number("TOKENS"), depth) @ weight.read("float", depth, columns), None, bias)
    v = silu(v) if launch["ACTIVATION"] == "SILU" else v
    y.write(launch["Out"], v)
    if launch["Out"] == "float":
        leave_for_norm(v, normed, normed_gain, normed_squares)


def _reference_of_flow_step(
    launch: Launched,
    x: Pointer,
    gain: Pointer | None,
    shift: Pointer | None,
    weight: Pointer,
    bias: Pointer,
    flow: Pointer,
    depth: int,
    epsilon: float,
) -> None:
    columns, m = launch.number("COLUMNS"), launch.grid[1]
    assert launch.grid[0] * FLOW_COLUMNS == columns
    v = affine(rms_norm(x.read("float", m, depth), epsilon), gain, shift)
    step = affine(v @ weight.read("float", depth, columns), None, bias)
    flow.write("float", flow.read("float", m, columns) + step)


LINEAR_NARROW = Kernel(
    "linear_narrow.cu",
    "linear_narrow",
    "int ACTIVATION, class Out, int TOKENS",
    """const float* x, const float* weight, const float* bias?, Out* y, int depth, int columns, Bf16* normed?,
    const float* normed_gain?, float* normed_squares?""",
    _reference_of_linear_narrow,
)
FLOW_STEP = Kernel(
    "linear_narrow.cu",
    "flow_step",
    "int COLUMNS",
    """const float* x, const float* gain?, const float* shift?, const float* weight, const float* bias, float* flow,
    int depth, float epsilon""",
    _reference_of_flow_step,
)


def linear_narrow(tokens: int, columns: int, activation: str, out_type: str) -> Instance:
    """A linear of at most MAX_DEPTH inputs and `columns` (a multiple of 16) outputs; `activation` is NONE or SILU."""
    shape = Shape((columns // NARROW_COLUMNS, 1, 1), 256)
    return LINEAR_NARROW.instance(shape, ACTIVATION=activation, Out=out_type, TOKENS=tokens)


def flow_step(tokens: int, columns: int) -> Instance:
    """Final norm, output projection to `columns` (a multiple of 16) action dimensions, and Euler step."""
    return FLOW_STEP.instance(Shape((columns // FLOW_COLUMNS, tokens, 1), 512), COLUMNS=columns)
