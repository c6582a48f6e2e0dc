"""The `duq::` operators. What an operator means is its ONNX function body below, and nothing else defines it.

    RotateQuantize   float activations -> INT8 activations and their scale     (one per group of linears)
    Rotate           the same without the quantizer, for linears with float activations
    W4A8Linear       INT8 activations x INT4 weights -> float                  (one per linear or merged group)
    W8A8Linear       INT8 activations x INT8 weights -> float
    W4A16Linear      float activations x INT4 weights -> float; W8A16Linear likewise
    Multistep        the end of a denoising step of a solver that reads earlier steps (runtime/solver.py)

An operator has variants (with or without a permutation, a bias, ...). ONNX functions cannot branch on the presence
of an input, so each variant is an *overload* of the operator, named after the stages it has: `RotateQuantize` with
overload `permute+hadamard+per_token` takes x, permutation and hadamard. A node's overload thus states its inputs.

With K inputs and N outputs of the linear, B the rotation's block size and Bo the output rotation's:

    input_scale       float32 [K]            1 / balance factor
    permutation       int64   [K]            x'[k] = x[permutation[k]]
    hadamard          float32 [B, B]         H / sqrt(B), the same for every block
    rotation          float32 [K/B, B, B]    one matrix a block, x'[block] = x[block] R
    activation_scale  float32 []             per_tensor only
    weight            int4 or int8 [K, N]    ONNX packs two INT4 a byte, the first in the low nibble
    weight_scale      float32 [N]
    output_rotation   float32 [N/Bo, Bo, Bo] y[block] = y'[block] R_out ("restore")
    bias              float32 [N]

Multistep takes the state of the flow, what Euler's method would add to it, and what it would have added in the P steps before,
the latest first. It returns the next state, and the history with this step's change in it:

    x, change         float32 [H, A]
    history           float32 [P, H, A]; zeros before the first step
    coefficients      float32 [steps, 1 + P]
    step              int64   []
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_ir as ir

DOMAIN = "duq"
VERSION = 1
CPU_OPERATORS = {"com.microsoft": 1}  # of ONNX Runtime, in the bodies for CPUs

# Stage -> (its inputs, its lines of ONNX). Each stage reads `x` and writes `x`; _function numbers the assignments.
_PROLOGUE = {
    "scale": (["input_scale"], "x = Mul(x, input_scale)"),
    "permute": (["permutation"], "x = Gather<axis = -1>(x, permutation)"),
    "hadamard": (
        ["hadamard"],
        """whole = Shape(x)
           block = Shape<start = 0, end = 1>(hadamard)
           many = Constant<value_ints = [-1]>()
           blocked = Concat<axis = 0>(many, block)
           blocks = Reshape(x, blocked)
           turned = MatMul(blocks, hadamard)
           x = Reshape(turned, whole)""",
    ),
    "rotation": (
        ["rotation"],
        """whole = Shape(x)
           counts = Shape<start = 0, end = 2>(rotation)
           many = Constant<value_ints = [-1]>()
           one = Constant<value_ints = [1]>()
           count = Shape<start = 0, end = 1>(rotation)
           block = Shape<start = 1, end = 2>(rotation)
           blocked = Concat<axis = 0>(many, count, one, block)
           blocks = Reshape(x, blocked)
           turned = MatMul(blocks, rotation)
           x = Reshape(turned, whole)""",
    ),
}

# s = max(absmax, 1e-12) / 127 for each token; the tiny floor keeps an all-zero token from dividing by zero.
_SCALE = {
    "per_token": (
        [],
        """magnitude = Abs(x)
           last = Constant<value_ints = [-1]>()
           absmax = ReduceMax<keepdims = 1>(magnitude, last)
           floor = Constant<value_float = 1e-12>()
           positive = Max(absmax, floor)
           levels = Constant<value_float = 127.0>()
           x_scale = Div(positive, levels)""",
    ),
    "per_tensor": (["activation_scale"], "x_scale = Identity(activation_scale)"),
}

# x_q = clamp(round_half_even(x / s), -128, 127)
_QUANTIZE = """
    ratio = Div(x, x_scale)
    whole_ratio = Round(ratio)
    lowest = Constant<value_float = -128.0>()
    highest = Constant<value_float = 127.0>()
    clamped = Clip(whole_ratio, lowest, highest)
    x_q = Cast<to = 3>(clamped)"""

# acc = sum_k x_q[k] w_q[k, n] in int32, exact. MatMulInteger is asked for u8 x u8, u8 = s8 + 128 with zero point 128, which
# is the same sum: ONNX Runtime adds pairs of u8 x s8 in saturating INT16 on x86 processors without VNNI.
_INTEGER_MATMUL = """
    wide = Cast<to = 6>(x_q)
    offset = Constant<value = int32 {128}>()
    shifted = Add(wide, offset)
    x_u8 = Cast<to = 2>(shifted)
    zero_point = Constant<value = uint8 {128}>()
    weight_s8 = Cast<to = 3>(weight)
    wide_weight = Cast<to = 6>(weight_s8)
    shifted_weight = Add(wide_weight, offset)
    weight_u8 = Cast<to = 2>(shifted_weight)
    acc = MatMulInteger(x_u8, weight_u8, zero_point, zero_point)
    acc_float = Cast<to = 1>(acc)
    scaled = Mul(acc_float, weight_scale)
    y = Mul(scaled, x_scale)"""

# CPUs want the activations as unsigned bytes all the way. These compute the same integers as the two above, with x_q
# carried as x_q + 128 between them; QuantizeLinear rounds half to even and saturates. ONNX Runtime's own
# MatMulIntegerToFloat multiplies by the weight scale while the accumulators are in registers, and by an activation scale,
# 1 here: the rounding of (acc * weight_scale) * x_scale is part of the definition.
_SCALE_PER_TOKEN_UNSIGNED = """
    last = Constant<value_ints = [-1]>()
    largest = ReduceMax<keepdims = 1>(x, last)
    smallest = ReduceMin<keepdims = 1>(x, last)
    below = Neg(smallest)
    floor = Constant<value_float = 1e-12>()
    positive = Max(largest, below, floor)
    levels = Constant<value_float = 127.0>()
    x_scale = Div(positive, levels)"""
_QUANTIZE_UNSIGNED = """
    whole_x = Shape(x)
    many_x = Constant<value_ints = [-1]>()
    channels = Shape<start = -1>(x)
    flat_shape = Concat<axis = 0>(many_x, channels)
    flat = Reshape(x, flat_shape)
    token_scale = Reshape(x_scale, many_x)
    tokens = Shape(token_scale)
    zero = Constant<value = uint8 {128}>()
    zeros = Expand(zero, tokens)
    flat_q = com.microsoft.QuantizeLinear<axis = 0>(flat, token_scale, zeros)
    x_q = Reshape(flat_q, whole_x)"""
_QUANTIZE_UNSIGNED_PER_TENSOR = """
    zero = Constant<value = uint8 {128}>()
    x_q = com.microsoft.QuantizeLinear(x, x_scale, zero)"""
_UNSIGNED_MATMUL = """
    zero_point = Constant<value = uint8 {128}>()
    one = Constant<value_float = 1.0>()
    weight_s8 = Cast<to = 3>(weight)
    scaled = com.microsoft.MatMulIntegerToFloat(x_q, weight_s8, one, weight_scale, zero_point)
    y = Mul(scaled, x_scale)"""

# The same with 8-bit weights as w + 128, for processors where u8 x s8 saturates (runtime/executors/integers.py). Pairs with
# INT4 weights reach 2 * 255 * 8 at most and never saturate. Flipping the sign bit adds 128; ONNX Runtime folds both lines.
_UNSIGNED_MATMUL_UNSIGNED_WEIGHTS = """
    zero_point = Constant<value = uint8 {128}>()
    one = Constant<value_float = 1.0>()
    weight_bits = Cast<to = 2>(weight)
    weight_u8 = BitwiseXor(weight_bits, zero_point)
    scaled = com.microsoft.MatMulIntegerToFloat(x_q, weight_u8, one, weight_scale, zero_point, zero_point)
    y = Mul(scaled, x_scale)"""

_FLOAT_MATMUL = """
    weight_float = Cast<to = 1>(weight)
    product = MatMul(x, weight_float)
    y = Mul(product, weight_scale)"""

_EPILOGUE = {
    "output_rotation": (
        ["output_rotation"],
        """whole_y = Shape(y)
           many_y = Constant<value_ints = [-1]>()
           one_y = Constant<value_ints = [1]>()
           count_y = Shape<start = 0, end = 1>(output_rotation)
           block_y = Shape<start = 1, end = 2>(output_rotation)
           blocked_y = Concat<axis = 0>(many_y, count_y, one_y, block_y)
           blocks_y = Reshape(y, blocked_y)
           restored = MatMul(blocks_y, output_rotation)
           y = Reshape(restored, whole_y)""",
    ),
    "bias": (["bias"], "y = Add(y, bias)"),
}

_MULTISTEP = """
    row = Gather<axis = 0>(coefficients, step)
    first = Constant<value_ints = [0]>()
    newest = Unsqueeze(change, first)
    changes = Concat<axis = 0>(newest, history)
    behind = Constant<value_ints = [1, 2]>()
    factors = Unsqueeze(row, behind)
    weighted = Mul(changes, factors)
    combined = ReduceSum<keepdims = 0>(weighted, first)
    x_next = Add(x, combined)
    kept = Shape<start = 0, end = 1>(history)
    history_next = Slice(changes, first, kept, first)"""

QUANTIZED_LINEARS = {"W4A8Linear": (4, 8), "W8A8Linear": (8, 8), "W4A16Linear": (4, 16), "W8A16Linear": (8, 16)}
"""Operator -> (weight bits, activation bits)."""


def weight_index(op_type: str) -> int:
    """Which input of a linear is its weight: behind x_q and x_scale, or behind x. MatMul is a linear as well."""
    return 2 if QUANTIZED_LINEARS.get(op_type, (0, 16))[1] == 8 else 1


def stages(overload: str) -> list[str]:
    return [] if overload == "plain" else overload.split("+")


def overload_name(names: Sequence[str]) -> str:
    return "+".join(names) or "plain"


def inputs_of(op_type: str, overload: str) -> list[str]:
    """The names of a variant's inputs, in order."""
    if op_type == "Multistep":
        return ["x", "change", "history", "coefficients", "step"]
    tables = _PROLOGUE | _SCALE | _EPILOGUE
    extra = [name for stage in stages(overload) for name in tables[stage][0]]
    if op_type in ("Rotate", "RotateQuantize"):
        return ["x", *extra]
    activations = ["x_q", "x_scale"] if op_type.endswith("A8Linear") else ["x"]
    return [*activations, "weight", "weight_scale", *extra]


def function(
    op_type: str, overload: str, opset: int, unsigned: bool = False, unsigned_weights: bool = False
) -> ir.Function:
    """The body of one variant as a model-local function of standard operators of `opset`.

    `unsigned` gives the equivalent body for CPUs, with activations as uint8 = int8 + 128 between the operators;
    `unsigned_weights`, for those CPUs that multiply uint8 by int8 inexactly, has 8-bit weights in that form as well.
    """
    chosen = stages(overload)
    if op_type == "Multistep":
        body, outputs = [_MULTISTEP], ["x_next", "history_next"]
    elif op_type in ("Rotate", "RotateQuantize"):
        body = [_PROLOGUE[stage][1] for stage in chosen if stage in _PROLOGUE]
        scale = _SCALE | ({"per_token": ([], _SCALE_PER_TOKEN_UNSIGNED)} if unsigned else {})
        body += [scale[stage][1] for stage in chosen if stage in scale]
        quantize = _QUANTIZE if not unsigned else _QUANTIZE_UNSIGNED
        quantize = _QUANTIZE_UNSIGNED_PER_TENSOR if unsigned and "per_tensor" in chosen else quantize
        body += [quantize if op_type == "RotateQuantize" else "rotated = Identity(x)"]
        outputs = ["x_q", "x_scale"] if op_type == "RotateQuantize" else ["rotated"]
    else:
        integer_matmul = _UNSIGNED_MATMUL if unsigned else _INTEGER_MATMUL
        if unsigned and unsigned_weights and op_type == "W8A8Linear":
            integer_matmul = _UNSIGNED_MATMUL_UNSIGNED_WEIGHTS
        body = [integer_matmul if op_type.endswith("A8Linear") else _FLOAT_MATMUL]
        body += [_EPILOGUE[stage][1] for stage in chosen]
        outputs = ["y"]
    imports = {"": opset} | (CPU_OPERATORS if unsigned else {})
    return _parse(op_type, overload, inputs_of(op_type, overload), outputs, body, imports)


def _parse(
    op_type: str, overload: str, inputs: list[str], outputs: list[str], body: list[str], imports: dict[str, int]
) -> ir.Function:
    domains = ", ".join(f'"{domain}" : {version}' for domain, version in imports.items())
    lines = _single_assignment([line.strip() for part in body for line in part.strip().splitlines()], inputs, outputs)
    text = (
        f'<domain: "{DOMAIN}", opset_import: [{domains}]>\n'
        f"{op_type} ({', '.join(inputs)}) => ({', '.join(outputs)}) {{\n" + "\n".join(lines) + "\n}"
    )
    proto = onnx.parser.parse_function(text)
    proto.overload = overload
    return ir.serde.deserialize_function(proto)


def _single_assignment(lines: list[str], inputs: list[str], outputs: list[str]) -> list[str]:
    """Renames `x = ...; x = ...` to fresh names, as ONNX asks; the last assignment of an output keeps its name."""
    current = {name: name for name in inputs}
    last = {line.split(" = ", 1)[0]: index for index, line in enumerate(lines)}
    renamed = []
    for index, line in enumerate(lines):
        target, call = line.split(" = ", 1)
        head, arguments = call.rsplit("(", 1)
        names = [argument.strip() for argument in arguments.rstrip(")").split(",") if argument.strip()]
        operands = ", ".join(current[name] for name in names)
        final = target in outputs and last[target] == index
        current[target] = target if final else f"{target}_{index}"
        renamed.append(f"{current[target]} = {head}({operands})")
    return renamed


def add_functions(model: ir.Model, unsigned: bool = False, unsigned_weights: bool = False) -> None:
    """Gives the model the function of every duq node in it, and the domain's opset import.

    `unsigned`, `unsigned_weights`: the bodies for CPUs (see `function`). Each variant then becomes an operator of its own name,
    `W4A8Linear.bias`: ONNX Runtime looks overloads up correctly only from 1.24 on, which Python 3.10 does not have. Such a
    model can be given the other of these bodies later.
    """
    opset = model.opset_imports[""]
    model.functions.clear()
    for node in model.graph:
        if node.domain == DOMAIN:
            op_type, _, overload = node.op_type.partition(".")
            overload = overload or node.overload
            body = function(op_type, overload, opset, unsigned, unsigned_weights)
            if unsigned:
                node.op_type, node.overload = f"{op_type}.{overload}", ""
                body.name, body.overload = node.op_type, ""
            model.functions.setdefault(node.op_identifier(), body)
    if model.functions:
        model.opset_imports[DOMAIN] = VERSION
        model.opset_imports.update(CPU_OPERATORS if unsigned else {})
