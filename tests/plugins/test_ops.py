"""The duq operators: their definition against numpy, and the bodies for CPUs against the definition, bit for bit."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from duq.compiler.graph.export import OPSET
from duq.plugins import ops
from duq.plugins.layout import pack_int4
from duq.runtime.executors.integers import multiplies_exactly

K, N, BLOCK = 32, 24, 8
PROLOGUES = [
    "per_token",
    "per_tensor",
    "scale+per_token",
    "permute+hadamard+per_token",
    "scale+permute+rotation+per_tensor",
]
EPILOGUES = ["plain", "bias", "output_rotation", "output_rotation+bias"]


def make_operands(rng: np.random.Generator, shape: tuple[int, ...], bits: int) -> dict[str, np.ndarray]:
    """x of this shape [..., K] and a value for every input of any variant; weights reach both ends of their range."""

    def orthogonal(count: int) -> np.ndarray:
        return np.linalg.qr(rng.standard_normal((count, BLOCK, BLOCK)))[0].astype(np.float32)

    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    weight = rng.integers(low, high + 1, (K, N)).astype(np.int8)
    weight[:2, 0] = low, high
    return {
        "x": (rng.standard_normal(shape) * np.exp(rng.standard_normal(K))).astype(np.float32),
        "input_scale": np.exp(rng.standard_normal(K)).astype(np.float32),
        "permutation": rng.permutation(K),
        "hadamard": orthogonal(1)[0],
        "rotation": orthogonal(K // BLOCK),
        "activation_scale": np.array(0.03, np.float32),
        "weight": weight,
        "weight_scale": rng.uniform(0.01, 0.1, N).astype(np.float32),
        "output_rotation": orthogonal(N // BLOCK),
        "bias": rng.standard_normal(N).astype(np.float32),
    }


def run(
    operands: dict[str, np.ndarray],
    bits: int,
    *variants: tuple[str, str],
    unsigned: bool = False,
    unsigned_weights: bool | None = None,
) -> list[np.ndarray]:
    """Runs a row of (operator, overload) in ONNX Runtime; returns what each puts out. unsigned_weights: None takes those
    bodies that the executor would take on this CPU."""
    if unsigned_weights is None:
        unsigned_weights = not multiplies_exactly(unsigned_weights=False)
    nodes, outputs, functions, given_inputs = [], [], [], set()
    for op_type, overload in variants:
        inputs = ops.inputs_of(op_type, overload)
        function = ops.function(op_type, overload, OPSET, unsigned, unsigned_weights)
        made = [value.name for value in function.outputs]
        nodes.append(helper.make_node(op_type, inputs, made, domain=ops.DOMAIN, overload=overload))
        functions.append(ir.serde.serialize_function(function))
        given_inputs |= set(inputs) - set(outputs)
        outputs += made
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, operands["x"].shape)
    graph = helper.make_graph(
        nodes,
        "variants",
        [x],
        [helper.make_value_info(name, onnx.TypeProto()) for name in outputs],
        [_initializer(name, operands[name], bits) for name in sorted(given_inputs - {"x"})],
    )
    domains = {"": OPSET, ops.DOMAIN: ops.VERSION, **(ops.CPU_OPERATORS if unsigned else {})}
    imports = [helper.make_opsetid(domain, version) for domain, version in domains.items()]
    model = helper.make_model(graph, functions=functions, opset_imports=imports, ir_version=10)
    for function in functions:
        onnx.checker.check_function(function)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(outputs, {"x": operands["x"]})


def _initializer(name: str, array: np.ndarray, bits: int) -> TensorProto:
    if name == "weight" and bits == 4:
        return helper.make_tensor(name, TensorProto.INT4, array.shape, pack_int4(array.reshape(-1)).tobytes(), raw=True)
    return onnx.numpy_helper.from_array(array, name)


def transformed(operands: dict[str, np.ndarray], overload: str) -> np.ndarray:
    """x' in float64."""
    x = operands["x"].astype(np.float64)
    for stage in ops.stages(overload):
        if stage == "scale":
            x = x * operands["input_scale"]
        elif stage == "permute":
            x = x[..., operands["permutation"]]
        elif stage == "hadamard":
            x = (x.reshape(*x.shape[:-1], -1, BLOCK) @ operands["hadamard"]).reshape(x.shape)
        elif stage == "rotation":
            x = np.einsum("...bi,bij->...bj", x.reshape(*x.shape[:-1], -1, BLOCK), operands["rotation"]).reshape(x.shape)
    return x


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1 << 30), st.sampled_from(PROLOGUES), st.sampled_from([(1, K), (3, K), (2, 3, K)]))
def test_quantizer_equals_numpy(seed, overload, shape):
    operands = make_operands(np.random.default_rng(seed), shape, 4)
    x_q, scale = run(operands, 4, ("RotateQuantize", overload))
    x = transformed(operands, overload)
    if "per_token" in overload:
        np.testing.assert_allclose(scale, np.abs(x).max(-1, keepdims=True) / 127, rtol=1e-5)
    else:
        assert scale == operands["activation_scale"]
    assert x_q.dtype == np.int8 and x_q.shape == shape
    assert np.abs(x_q - np.clip(x / scale, -128, 127)).max() <= 0.5 + 1e-3


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 1 << 30),
    st.sampled_from(EPILOGUES),
    st.sampled_from([4, 8]),
    st.sampled_from(["per_token", "per_tensor"]),
)
def test_integer_linear_equals_numpy(seed, overload, bits, scale_kind):
    operands = make_operands(np.random.default_rng(seed), (2, 3, K), bits)
    x_q, scale, y = run(operands, bits, ("RotateQuantize", scale_kind), (f"W{bits}A8Linear", overload))
    accumulators = x_q.astype(np.int64) @ operands["weight"].astype(np.int64)
    expected = accumulators.astype(np.float32) * operands["weight_scale"] * scale
    if "output_rotation" in overload:
        blocks = expected.reshape(2, 3, -1, BLOCK).astype(np.float64)
        expected = np.einsum("...bi,bij->...bj", blocks, operands["output_rotation"]).reshape(expected.shape)
    if "bias" in overload:
        expected = expected + operands["bias"]
    if overload in ("plain", "bias"):
        np.testing.assert_array_equal(y, expected)  # the same three operations on the same integers
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1 << 30), st.sampled_from([4, 8]), st.booleans())
def test_float_linear_equals_numpy(seed, bits, rotated):
    operands = make_operands(np.random.default_rng(seed), (3, K), bits)
    if rotated:
        expected = transformed(operands, "scale+permute+rotation")
        (operands["x"],) = run(operands, bits, ("Rotate", "scale+permute+rotation"))
        np.testing.assert_allclose(operands["x"], expected, rtol=1e-5, atol=1e-5)
    (y,) = run(operands, bits, (f"W{bits}A16Linear", "bias"))
    expected = (operands["x"].astype(np.float64) @ operands["weight"]) * operands["weight_scale"] + operands["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 1 << 30), st.sampled_from(PROLOGUES), st.sampled_from(EPILOGUES), st.sampled_from([4, 8]),
    st.sampled_from([(1, K), (5, K), (1, 4, K)]), st.sampled_from([None, True]),
)  # fmt: skip
def test_bodies_for_cpus_equal_the_definition(seed, prologue, epilogue, bits, shape, unsigned_weights):
    operands = make_operands(np.random.default_rng(seed), shape, bits)
    variants = ("RotateQuantize", prologue), (f"W{bits}A8Linear", epilogue)
    x_q, scale, y = run(operands, bits, *variants)
    x_u8, scale_u8, y_u8 = run(operands, bits, *variants, unsigned=True, unsigned_weights=unsigned_weights)
    np.testing.assert_array_equal(x_u8.astype(np.int16) - 128, x_q)
    np.testing.assert_array_equal(scale_u8, scale)
    np.testing.assert_array_equal(y_u8, y)


@pytest.mark.parametrize("unsigned", [False, True])
def test_ties_round_to_even_and_the_ends_saturate(unsigned):
    operands = make_operands(np.random.default_rng(0), (1, K), 4)
    operands["activation_scale"] = np.array(1, np.float32)
    values = [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 127.4, 127.5, 300, -128.4, -128.5, -300, 126.5]
    operands["x"] = np.array([values + [0] * (K - len(values))], np.float32)
    x_q, _ = run(operands, 4, ("RotateQuantize", "per_tensor"), unsigned=unsigned)
    signed = x_q.astype(np.int16) - (128 if unsigned else 0)
    assert signed[0, : len(values)].tolist() == [0, 2, 2, 0, -2, -2, 127, 127, 127, -128, -128, -128, 126]


BODIES = [{}, {"unsigned": True}, {"unsigned": True, "unsigned_weights": True}]


@pytest.mark.parametrize("body", BODIES, ids=str)
@pytest.mark.parametrize("x, weight, bits", [(-128, -8, 4), (127, 7, 4), (-128, -128, 8), (127, -128, 8), (127, 127, 8)])
def test_accumulators_are_exact_at_their_largest(body, x, weight, bits):
    """INT16 saturation of pairs, as older x86 processors have it, would show here."""
    _, _, y = run(extremes(np.array([[x]]), np.array([[weight]])), bits, *INTEGERS[bits], **body)
    assert (y == K * x * weight).all()


INTEGERS = {bits: (("RotateQuantize", "per_tensor"), (f"W{bits}A8Linear", "plain")) for bits in (4, 8)}


def extremes(x: np.ndarray, weight: np.ndarray) -> dict[str, np.ndarray]:
    """Operands whose integers are these, repeated to [rows, K] and [K, N] where they are of size 1; y are the accumulators."""
    x, weight = np.broadcast_to(x, (len(x), max(K, x.shape[1]))), np.broadcast_to(weight, (max(K, len(weight)), N))
    return {
        "x": x.astype(np.float32),
        "activation_scale": np.array(1, np.float32),
        "weight": weight.astype(np.int8),
        "weight_scale": np.ones(N, np.float32),
    }


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 1 << 30), st.sampled_from([4, 8]), st.sampled_from([1, 5, 50]), st.sampled_from([33, 512, 2048]),
    st.sampled_from(BODIES),
)  # fmt: skip
def test_accumulators_of_extreme_integers_are_exact(seed, bits, rows, channels, body):
    """Long sums of the ends of both ranges: INT16 pairs saturate in nearly all of them, INT32 never (2048 * 128 * 128 < 2^31)."""
    rng, largest = np.random.default_rng(seed), 1 << bits - 1
    x = rng.choice([-128, 127, 126, 0], (rows, channels), p=[0.3, 0.5, 0.1, 0.1])
    weight = rng.choice([-largest, largest - 1, 0], (channels, N), p=[0.5, 0.4, 0.1])
    _, _, y = run(extremes(x, weight), bits, *INTEGERS[bits], **body)
    np.testing.assert_array_equal(y, (x @ weight).astype(np.float32))


@pytest.mark.parametrize(
    ("bits", "unsigned_weights", "product"), [(8, True, "BitwiseXor"), (8, False, "Cast"), (4, True, "Cast")]
)
def test_what_is_multiplied(bits, unsigned_weights, product):
    """On CPUs with VNNI no number tells the two bodies apart: int8 weights as they are, or with the sign bit flipped."""
    body = ops.function(f"W{bits}A8Linear", "plain", OPSET, unsigned=True, unsigned_weights=unsigned_weights)
    made = {node.op_type: node for node in body}
    matmul, weight = made["MatMulIntegerToFloat"], made[product].outputs[0]
    zero = [value is matmul.inputs[4] for value in matmul.inputs[5:]]  # 128 for both operands, or 0 for the weights
    assert matmul.inputs[1] is weight and zero == ([True] if product == "BitwiseXor" else [])


def test_a_token_of_zeros_stays_zero():
    operands = make_operands(np.random.default_rng(0), (2, K), 4)
    operands["x"][0] = 0
    x_q, scale, y = run(operands, 4, ("RotateQuantize", "hadamard+per_token"), ("W4A8Linear", "plain"))
    assert not x_q[0].any() and not y[0].any() and y[1].any() and (scale > 0).all()
