"""The descriptions of the kernels against their sources, and that every kernel compiles for every GPU."""

from __future__ import annotations

import inspect
import re
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duq.plugins import kernels
from duq.plugins.gpu import GPUS, stand_in
from duq.plugins.kernel import Instance
from duq.plugins.kernels import (
    KERNELS,
    Attention,
    GemmFloat,
    Large,
    ProjectedAttention,
    Small,
    SplitAttention,
    TileAttention,
    Wgmma,
    WgmmaSmall,
    reference,
)
from duq.plugins.kernels.attention_wgmma import wgmma_header as attention_header
from duq.plugins.kernels.bitblas import BITBLAS
from duq.plugins.kernels.gemm_wgmma import wgmma_header
from duq.plugins.layout import pack_head_slabs
from duq.plugins.nvrtc import SOURCES, compile_cubin, nvrtc_version, supported_sms
from duq.plugins.tactics import best_attention

IN_SOURCES = {name: each for name, each in KERNELS.items() if not each.is_library and name != BITBLAS.name}


class Declared(NamedTuple):
    """A __global__ function as C++ has it: (kind, name) of the template's parameters, (type, name) of its own."""

    source: str
    template: list[tuple[str, str]]
    parameters: list[tuple[str, str]]


_NESTED = r"\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"
_GLOBAL = re.compile(
    rf"(?:template\s*<(?P<template>[^<>]*)>\s*)?__global__\s+void\s+(?:__launch_bounds__{_NESTED}\s*)?"
    r"(?P<name>\w+)\s*\((?P<parameters>[^()]*)\)\s*\{"
)


def declared_in(source: str, text: str) -> dict[str, Declared]:
    text = re.sub(r"//[^\n]*", "", text)
    found = {}
    for match in _GLOBAL.finditer(text):
        assert match["name"] not in found
        found[match["name"]] = Declared(source, _pairs(match["template"] or ""), _pairs(match["parameters"]))
    assert len(found) == text.count("__global__"), f"{source}: a kernel of a form that this test does not read"
    return found


def _pairs(text: str) -> list[tuple[str, str]]:
    """ "const In* x, int depth" -> ("const In*", "x"), ("int", "depth")"""
    each = (" ".join(item.split()) for item in text.split(",") if item.strip())
    return [(kind.strip(), name) for item in each for kind, name in re.findall(r"^(.*[\s*])(\w+)$", item)]


DECLARED = {
    name: declared
    for path in sorted(SOURCES.glob("*.cu"))
    for name, declared in declared_in(path.name, path.read_text()).items()
}


def test_every_kernel_has_a_description_and_every_description_a_kernel():
    assert DECLARED.keys() == IN_SOURCES.keys() and len(DECLARED) >= 19


@pytest.mark.parametrize("name", IN_SOURCES)
def test_a_description_is_what_the_source_declares(name):
    declared, kernel = DECLARED[name], IN_SOURCES[name]
    assert kernel.source == declared.source and kernel.name == name
    assert _pairs(kernel.template_declaration) == declared.template
    assert kernel.template == tuple(each for _, each in declared.template)
    assert [(each.type, each.name) for each in kernel.parameters.values()] == declared.parameters


@pytest.mark.parametrize("name", IN_SOURCES)
def test_only_pointers_may_be_null_and_outputs_must_not(name):
    parameters = IN_SOURCES[name].parameters.values()
    assert all(each.is_pointer for each in parameters if each.optional)
    assert any(each.is_pointer and not each.optional and not each.type.startswith("const") for each in parameters)


@pytest.mark.parametrize("name", KERNELS)
def test_a_reference_has_the_kernels_parameters(name):
    """A reference that hands the rest on to another, as `**arguments`, names only those that the other lacks."""
    _, *parameters = inspect.signature(KERNELS[name].reference).parameters.values()
    named = [each.name for each in parameters if each.kind is not each.VAR_KEYWORD]
    if len(named) < len(parameters):
        _, *others = inspect.signature(IN_SOURCES["attention"].reference).parameters
        assert not set(named) & set(others)
        named = [each for each in KERNELS[name].parameters if each in {*named, *others}]
    assert named == list(KERNELS[name].parameters)


def test_the_parser_sees_differences():
    text = "// __global__ void no() {\ntemplate <class T, int N>\n__global__ void __launch_bounds__(32 * (N + f(2)), 1)\n"
    found = declared_in("a.cu", text + "a(const T* x, unsigned char* y,\n  int n) { }\n__global__ void b(int m) {}")
    assert found["a"] == Declared(
        "a.cu", [("class", "T"), ("int", "N")], [("const T*", "x"), ("unsigned char*", "y"), ("int", "n")]
    )
    assert found["b"] == Declared("a.cu", [], [("int", "m")])
    with pytest.raises(AssertionError, match="does not read"):
        declared_in("a.cu", "extern __global__ int odd(int);")


def test_every_kernel_is_checked_as_each_program_launches_it():
    from tests.gpu.test_kernels_of_programs import CHECKS

    assert CHECKS.keys() == {name for name, each in IN_SOURCES.items() if "wgmma" not in each.source}


# Compiling

SMALLEST = [
    Small(1, 1, 1, 1).instance(8, 16, 4, "int"),
    Large(1, 1, 1, 1, 2).instance(8, 16, 8, "Bf16", "GEGLU"),
    GemmFloat(1, 1, 1, 1).instance(8, 768, "Bf16", True, "ROTARY"),
    GemmFloat(1, 1, 1, 1).instance(8, 16, "float", False, "GEGLU", bits=4),
    GemmFloat(1, 1, 1, 1, 2).instance(8, 16, "float", False, "NONE"),
    kernels.rotate_quantize(8, 1024, "Half", "RMS_NORM", 64),
    kernels.residual_quantize(8, 1024, 8, 64),
    Attention(72, 1, 1, 2, 16, 2).instance(8),
    SplitAttention(8, 1, 16, 2).instance(8),
    TileAttention(8).instance(8),
    kernels.rotary(8, 8, 256),
    kernels.normalize(1, 1152, "float", "Bf16", center=True),
    kernels.normalize(1, 8192, "Bf16", "float", center=False),
    kernels.patches(3, 224, 14),
    kernels.patches(3, 224, 14, "float"),
    kernels.tokens(48, 2048),
    kernels.linear_narrow(50, 1024, "NONE", "float"),
    kernels.linear_narrow(1, 1024, "SILU", "Bf16"),
    kernels.flow_step(50, 32),
    kernels.flow_step(50, 32, 2),
    kernels.geglu(50, 4096),
    kernels.dequantize_weight(64, 4304),
    kernels.hadamard_quantize(816, 16384),
    kernels.epilogue(50, 1024, "Bf16", True, "GEGLU"),
    kernels.epilogue(50, 1024, "float", False),
]
QUICK_SMS = (80, 120)  # the plans of tests/conftest.py are for 86 and 90; the others are of the same generations
BY_WGMMA = [
    Wgmma(1, 1, 2).instance(8, 64, 4, "float"),
    Wgmma(1, 1, 2, 2).instance(8, 64, 4, "float"),
    WgmmaSmall(1, 4, 2).instance(8, 64, 4, "float"),
    best_attention(256, 50, 1, GPUS[90]).instance(50),
    ProjectedAttention(112).instance(50, 8, 1024),
    ProjectedAttention(32).instance(8, 2, 256),  # as many columns of the weight as keys
]


def test_every_kernel_is_compiled_here_for_every_gpu():
    assert supported_sms() == [sm for sm in GPUS if sm <= 90 or nvrtc_version().major > 12]
    assert {each.kernel.name for each in SMALLEST + BY_WGMMA} == IN_SOURCES.keys()


@pytest.mark.parametrize(
    ("instance", "sm"),
    [
        pytest.param(each, sm, marks=[] if sm in QUICK_SMS else pytest.mark.slow)
        for each in SMALLEST
        for sm in supported_sms()
    ]
    + [(each, 90) for each in BY_WGMMA],
    ids=lambda value: value.expression if isinstance(value, Instance) else str(value),
)
def test_compiles_for_every_gpu(instance, sm, tmp_path):
    cubin = compile_cubin(instance.source, sm, [instance.expression], instance.headers, cache=tmp_path)
    assert cubin.image.startswith(b"\x7fELF") and cubin.symbols[instance.expression].encode() in cubin.image


WITHOUT_CLUSTERS = [  # of the kernels that use clusters, what a GPU without them launches
    Small(1, 1, 1, 1, 2).instance(8, 16, 4, "int"),
    GemmFloat(1, 1, 1, 1).instance(8, 768, "Bf16", True, "ROTARY"),
    Attention(72, 1, 1, 2, 16, 2).instance(8),
    SplitAttention(8, 1, 16, 2).instance(8),
]


@pytest.mark.parametrize("instance", WITHOUT_CLUSTERS, ids=lambda instance: instance.expression)
def test_compiles_for_a_stand_in(instance, tmp_path):
    """SM 120's, in code for SM 90, which does have clusters."""
    own, foreign = (
        compile_cubin(instance.source, gpu, [instance.expression], cache=tmp_path)
        for gpu in (GPUS[90], stand_in(GPUS[120], 90))
    )
    assert foreign.image.startswith(b"\x7fELF") and foreign.symbols == own.symbols and foreign.image != own.image


def test_wgmma_has_an_operand_for_every_accumulator():
    text = wgmma_header(26)
    assert "m64n208k32" in text and text.count('"+r"(d[') == 104 and "%108, add" in text


@pytest.mark.parametrize(("keys", "outputs", "columns"), [(112, 128, [112, 128]), (32, 32, [32]), (48, 0, [48])])
def test_attention_has_each_width_of_wgmma_once(keys, outputs, columns):
    text = attention_header(keys, outputs)
    assert [text.count(f"m64n{each}k16") for each in columns] == [1] * len(columns)
    assert text.count("void wgmma_scores") == len(columns) and text.count('"+f"(s[') == sum(columns) // 2


# What the references compute with


@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_bf16_is_the_nearest(values):
    values = np.array(values, np.float32)
    bits = reference.to_bf16(values)
    back = reference.from_bf16(bits)
    assert (np.isnan(back) == np.isnan(values)).all()
    with np.errstate(invalid="ignore", over="ignore"):
        for neighbor in (bits - np.uint16(1), bits + np.uint16(1)):
            other, exact = reference.from_bf16(neighbor).astype(np.float64), values.astype(np.float64)
            nearer = np.abs(other - exact) < np.abs(back.astype(np.float64) - exact)
            assert not (nearer & np.isfinite(back) & np.isfinite(other)).any()


def test_memory_notices_a_launch_that_overwrites_what_it_reads():
    memory = reference.Memory(np.zeros(64, np.uint8))
    rows, shifted = reference.Pointer(memory), reference.Pointer(memory, 16)
    rows.write("float", rows.read("float", 8))
    memory.end_launch()  # in place
    shifted.write("float", rows.read("float", 8))
    with pytest.raises(AssertionError, match="overwrites what it reads"):
        memory.end_launch()


@pytest.mark.parametrize("counter", [0, 1])
def test_attention_split_needs_counters_of_zero_and_room_for_every_part(counter):
    tactic, tokens, keys = SplitAttention(8, 2, 16, 3), 5, 40
    sizes = {"q": 2 * tokens * 2048, "k": 2 * keys * 256, "v": 2 * keys * 256, "out": 2 * tokens * 2048}
    sizes |= {"partial": 4 * tactic.partial_words(tokens), "counters": 4 * tactic.groups(tokens)}
    memory = {name: reference.Memory(np.zeros(size, np.uint8)) for name, size in sizes.items()}
    memory["counters"].data[-4] = counter
    one = reference.to_bf16(np.ones((keys, 256), np.float32))
    memory["v"].data[:] = one.reshape(-1).view(np.uint8)
    numbers = dict(tokens=tokens, keys=keys, own_keys=0, q_stride=2048, kv_stride=256, own_stride=0, out_stride=2048)
    pointers = {name: reference.Pointer(each) for name, each in memory.items()}
    instance = tactic.instance(tokens)
    arguments = instance.bind(**pointers, **numbers, cache_ready=0, scale=1.0)
    template = {name: str(value) for name, value in instance.template.items()}
    launched = reference.Launched("attention_split", template, instance.shape.grid, instance.shape.threads)
    if counter:
        with pytest.raises(AssertionError, match="counters are zero"):
            instance.kernel.reference(launched, **arguments)
        return
    instance.kernel.reference(launched, **arguments)
    assert (memory["out"].data.view(np.uint16) == one[0, 0]).all()  # equal scores: the mean of the values


def pointers(**arrays: np.ndarray | int) -> dict[str, reference.Pointer]:
    """To copies of the arrays, bf16 for float16, and to so many bytes of NaN."""

    def memory(value: np.ndarray | int) -> reference.Memory:
        if isinstance(value, int):
            return reference.Memory(np.full(value, 0xFF, np.uint8))
        return reference.Memory(np.ascontiguousarray(value).view(np.uint8).reshape(-1).copy())

    return {name: reference.Pointer(memory(value)) for name, value in arrays.items()}


def compute(instance: Instance, memory: dict[str, reference.Pointer], **numbers: int | float) -> None:
    shape, template = instance.shape, {name: str(value) for name, value in instance.template.items()}
    launched = reference.Launched(instance.kernel.name, template, shape.grid, shape.threads, shape.cluster)
    instance.kernel.reference(launched, **instance.bind(**memory, **numbers))


@pytest.mark.parametrize("tokens", [3, 70])
def test_parts_of_the_output_projection_sum_to_it(tokens):
    heads, width, keys, own = 2, 256, 20, 5
    random = np.random.default_rng(tokens)
    bits = {
        "q": reference.to_bf16(random.standard_normal((tokens, heads * 256))),
        "weight": reference.to_bf16(random.standard_normal((width, heads * 256))),
        **{name: reference.to_bf16(random.standard_normal((keys, 256))) for name in ("k", "v")},
        **{name: reference.to_bf16(random.standard_normal((own, 256))) for name in ("own_k", "own_v")},
    }
    exact = {name: reference.from_bf16(each).astype(np.float64) for name, each in bits.items()}
    tactic = ProjectedAttention(32)
    packed = pack_head_slabs(bits.pop("weight"), width // tactic.split)
    memory = pointers(**bits, weight=packed, out=4 * heads * tokens * width)
    strides = dict(q_stride=heads * 256, kv_stride=256, own_stride=256, out_stride=width)
    numbers = dict(tokens=tokens, keys=keys, own_keys=own, cache_ready=1, scale=1 / 16)
    compute(tactic.instance(tokens, heads, width), memory, **strides, **numbers)
    k, v = (np.concatenate([exact[name], exact[f"own_{name}"]]) for name in ("k", "v"))
    for head, part in enumerate(memory["out"].read("float", heads, tokens, width)):
        channels = slice(256 * head, 256 * head + 256)
        expected = reference.softmax(exact["q"][:, channels] @ k.T / 16) @ v @ exact["weight"][:, channels].T
        assert np.linalg.norm(part - expected) < 3e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("adaptive", [True, False])
def test_a_residual_of_parts_is_quantized_as_their_sum_is(adaptive):
    m, depth, parts = 5, 256, 3
    random = np.random.default_rng(0)
    floats = lambda *shape: random.standard_normal(shape).astype(np.float32)  # noqa: E731
    x, added = floats(m, depth), floats(parts, m, depth)
    vectors = {name: floats(depth) for name in ("gate", "gain", "shift")} if adaptive else {}
    outputs = dict(x_q=m * depth, x_scale=4 * m)
    memory = pointers(x=x, parts=added, **vectors, y=x.nbytes, **outputs)
    sizes = dict(depth=depth, slab_tokens=0, epsilon=1e-6)
    compute(kernels.residual_quantize(m, depth, parts, 64), memory, **sizes)
    y = memory["y"].read("float", m, depth)
    np.testing.assert_allclose(y, x + added.sum(0) * vectors.pop("gate", 1), rtol=1e-5, atol=1e-5)
    of_sum = pointers(x=y, **vectors, **outputs)
    compute(
        kernels.rotate_quantize(m, depth, "float", "RMS_NORM", 64),
        of_sum,
        padded_depth=depth,
        row_stride=depth,
        block=0,
        **sizes,
    )
    for name in outputs:
        np.testing.assert_array_equal(memory[name].memory.data, of_sum[name].memory.data)


# What the prologue's rounding relies on (rotate_quantize.cu, quantize8)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.25, 0.125, 2**-2.5, 2**-3.5, 1.0]))
def test_product_with_the_inverse_finds_every_tie(seed, norm):
    """Where v * (norm / scale) rounds to another integer than the true quotient, it is within 1e-4 of a tie."""
    random, norm = np.random.default_rng(seed), np.float32(norm)
    v = (random.standard_normal(2000) * 10 ** random.uniform(-6, 6)).astype(np.float32)
    scale = np.float32(np.abs(v).max() * norm) / np.float32(127)
    factor = norm / scale
    v[: len(v) // 2] = ((random.integers(-127, 127, len(v) // 2) + 0.5) * float(scale) / float(norm)).astype(np.float32)
    exact_product = v.astype(np.float64) * np.float64(factor)  # as a fused multiply-add sees it
    quotient = (v * norm) / scale
    differ = np.rint(exact_product) != np.rint(quotient)
    distance = np.abs(exact_product - np.rint(exact_product))
    assert (distance[differ] > 0.4999).all()
