"""Float32 linears between the robot's action dimensions and the expert's width: linear_narrow.cu."""

from __future__ import annotations

import numpy as np

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
    history: Pointer | None,
    coefficients: Pointer | None,
    depth: int,
    epsilon: float,
) -> None:
    columns, m, earlier = launch.number("COLUMNS"), launch.grid[1], launch.number("HISTORY")
    assert launch.grid[0] * FLOW_COLUMNS == columns
    v = affine(rms_norm(x.read("float", m, depth), epsilon), gain, shift)
    change = affine(v @ weight.read("float", depth, columns), None, bias)
    if earlier:
        assert history is not None and coefficients is not None
        changes = np.concatenate([change, history.read("float", earlier * m, columns)])
        history.write("float", changes[: earlier * m])
        factors = coefficients.read_each("float", 1 + earlier)
        change = np.tensordot(factors, changes.reshape(1 + earlier, m, columns), 1)
    flow.write("float", flow.read("float", m, columns) + change)


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
    "int COLUMNS, int HISTORY",
    """const float* x, const float* gain?, const float* shift?, const float* weight, const float* bias, float* flow,
    float* history?, const float* coefficients?, int depth, float epsilon""",
    _reference_of_flow_step,
)


def linear_narrow(tokens: int, columns: int, activation: str, out_type: str) -> Instance:
    """A linear of at most MAX_DEPTH inputs and `columns` (a multiple of 16) outputs; `activation` is NONE or SILU."""
    shape = Shape((columns // NARROW_COLUMNS, 1, 1), 256)
    return LINEAR_NARROW.instance(shape, ACTIVATION=activation, Out=out_type, TOKENS=tokens)


def flow_step(tokens: int, columns: int, history: int = 0) -> Instance:
    """Final norm, output projection to `columns` (a multiple of 16) action dimensions, and the step of Euler's method, or of
    one that reads the changes of `history` earlier steps."""
    shape = Shape((columns // FLOW_COLUMNS, tokens, 1), 512)
    return FLOW_STEP.instance(shape, COLUMNS=columns, HISTORY=history)
