"""Compiling CUDA kernels with no GPU, the cache of cubins, and the choice of tile shapes."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from duq.plugins import attention, driver, kernels, pointwise, tactics
from duq.plugins.errors import KernelError
from duq.plugins.nvrtc import ARCHITECTURES, Cubin, compile_cubin, read_cached
from duq.plugins.tactics import FEW_TOKENS, Wgmma, WgmmaFew, best, best_float, candidates, fits, wgmma_header

POINTWISE = [
    pointwise.normalize(1, 1152, "float", "Bf16", center=True),
    pointwise.normalize(1, 8192, "Bf16", "float", center=False),
    pointwise.patches(3, 224, 14),
    pointwise.patches(3, 224, 14, "float"),
    pointwise.tokens(48, 2048),
    pointwise.linear_narrow(50, 1024, "NONE", "float"),
    pointwise.linear_narrow(1, 1024, "SILU", "Bf16"),
    pointwise.flow_step(50, 32),
    pointwise.geglu(50, 4096),
    pointwise.expand(64, 4304),
    pointwise.hadamard_quantize(816, 16384),
    pointwise.dequantize(50, 1024, "Bf16", True, "GEGLU"),
    pointwise.dequantize(50, 1024, "float", False),
]
SMALLEST = "gemm_small<4, 1, 1, 1, 1, NONE, int>"


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize(
    ("source", "expression"),
    [
        ("gemm_small.cu", SMALLEST),
        ("gemm_large.cu", "gemm_large<8, 1, 1, 1, 1, 2, GEGLU, Bf16>"),
        ("gemm_float.cu", "gemm_float<1, 1, 1, 1, 1, true, ROTARY, Bf16, 16>"),
        ("gemm_float.cu", "gemm_float<1, 1, 1, 1, 1, false, GEGLU, float, 4>"),
        ("rotate_quantize.cu", "rotate_quantize<Half, RMS_NORM, 64, 1, signed char>"),
        ("attention.cu", "attention<72, 1, 1, 2, 16, 2, 1>"),
        ("rotary.cu", "rotary<8, 256>"),
        *(launch[:2] for launch in POINTWISE),
    ],
)
def test_compiles_for_every_architecture(source, expression, sm, tmp_path):
    cubin = compile_cubin(source, sm, [expression], cache=tmp_path)
    assert cubin.image.startswith(b"\x7fELF") and cubin.symbols[expression].encode() in cubin.image


@pytest.mark.parametrize("tactic", [Wgmma(1, 1, 2), Wgmma(1, 1, 2, 2), WgmmaFew(1, 4, 2)], ids=str)
def test_compiles_wgmma(tactic, tmp_path):
    expression = tactic.expression(4, "float")
    cubin = compile_cubin(tactic.source, 90, [expression], tactic.headers(), cache=tmp_path)
    assert cubin.image.startswith(b"\x7fELF")


def test_compiles_wgmma_attention(tmp_path):
    kernel = attention.best(256, 50, 1, 90)
    cubin = compile_cubin(kernel.source, 90, [kernel.expression()], kernel.headers(), cache=tmp_path)
    assert cubin.image.startswith(b"\x7fELF")


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:100] + b"?" + b[101:], lambda b: b""])
def test_cache_is_used_and_rebuilt_when_damaged(tmp_path, monkeypatch, damage):
    first = compile_cubin("gemm_small.cu", 80, [SMALLEST], cache=tmp_path)
    (entry,) = tmp_path.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_compile", lambda *_: pytest.fail("compiled again"))
        assert compile_cubin("gemm_small.cu", 80, [SMALLEST], cache=tmp_path) == first
    entry.write_bytes(damage(entry.read_bytes()))
    assert compile_cubin("gemm_small.cu", 80, [SMALLEST], cache=tmp_path) == first
    assert read_cached(entry).endswith(first.image) and list(tmp_path.iterdir()) == [entry]


def test_key_of_the_cache_holds_all_that_matters(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "_compile", lambda *arguments: Cubin(b"\x7fELF", {}))
    for arguments in [("gemm_small.cu", 80), ("gemm_small.cu", 86), ("gemm_large.cu", 80)]:
        compile_cubin(*arguments, ["k"], cache=tmp_path)
    compile_cubin("gemm_small.cu", 80, ["other"], cache=tmp_path)
    compile_cubin("gemm_small.cu", 80, ["k"], {"a.cuh": ""}, cache=tmp_path)
    compile_cubin("gemm_small.cu", 80, ["k"], options=["-DA"], cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 6


def test_error_of_the_compiler_is_shown(tmp_path):
    with pytest.raises(KernelError, match="(?s)gemm_small.cu does not compile for .*sm_86.*no_such_kernel"):
        compile_cubin("gemm_small.cu", 86, ["no_such_kernel<1>"], cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_refuses_an_unknown_architecture(tmp_path):
    with pytest.raises(KernelError, match="SM 75.*80, 86, 89, 90"):
        compile_cubin("gemm_small.cu", 75, [SMALLEST], cache=tmp_path)


def test_names_the_extra_that_brings_a_missing_wheel(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(KernelError, match=r"duq\[cuda\]"):
        compile_cubin("gemm_small.cu", 90, [SMALLEST], cache=tmp_path)


def test_driver_names_the_extra_that_brings_its_bindings(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(KernelError, match=r"duq\[cuda\]"):
        driver.open_device()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine with no GPU")
def test_driver_says_that_there_is_none():
    with pytest.raises(KernelError, match="driver|device"):
        driver.open_device()


# Tactics

EXPERT = [(2560, 1024), (1024, 2048), (8192, 1024), (1024, 4096)]
PREFIX = [(2560, 2048), (2048, 2048), (32768, 2048), (2048, 16384)]
PROBLEMS = [(m, *s) for m in (50, 51, 64) for s in EXPERT] + [(m, *s) for m in (256, 306, 562, 818, 968) for s in PREFIX]


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("m", "n", "k"), PROBLEMS)
def test_every_gemm_of_the_policy_has_a_tactic(m, n, k, bits, sm):
    tactic = best(m, n, k, bits, sm)
    assert fits(tactic, m, n, k, bits, sm)
    assert tactic.shape(m, n, bits).shared_bytes <= tactics.MAX_SHARED_BYTES[sm]


@given(
    st.integers(1, 2000),
    st.integers(1, 300),
    st.integers(1, 100),
    st.sampled_from([4, 8]),
    st.sampled_from(list(ARCHITECTURES)),
)
def test_every_gemm_of_whole_tiles_has_a_tactic(m, rows16, chunks, bits, sm):
    """N in multiples of 16 and K of 64, those of a fragment (plugins/layout.py)."""
    n, k = 16 * rows16, 64 * chunks
    found = candidates(m, n, k, bits, sm)
    assert found and all(fits(tactic, m, n, k, bits, sm) for tactic in found)


def test_timed_tactics_are_chosen():
    for (n, k, bits), rows in tactics._timed().items():
        for m, tactic in rows:
            assert tactic in candidates(m, n, k, bits, 90) and best(m, n, k, bits, 90) == tactic


def test_the_first_candidate_of_many_tokens_is_mostly_the_fastest():
    timed = [
        (m, n, k, bits, tactic) for (n, k, bits), rows in tactics._timed().items() for m, tactic in rows if m > FEW_TOKENS
    ]
    first = [candidates(*problem, 90)[0] == tactic for *problem, tactic in timed]
    assert len(timed) == 24 and sum(first) >= 18


def test_says_when_nothing_fits():
    with pytest.raises(KernelError, match="100, 24, 1024"):
        best(100, 24, 1024, 4, 90)
    with pytest.raises(KernelError, match="65, 1024, 1024"):
        best_float(65, 1024, 1024, 90)
    with pytest.raises(KernelError, match="50, 24, 1024"):
        best_float(50, 24, 1024, 90)


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize("m", [1, 50, 64])
@pytest.mark.parametrize(("n", "k"), [*EXPERT, (1024, 1024), (16, 64), (256, 16)])
def test_every_float_gemm_of_the_expert_has_a_tactic(n, k, m, sm):
    tactic = best_float(m, n, k, sm)
    shape = tactic.shape(m, n)
    assert tactic.divides(n, k) and shape.shared_bytes <= tactics.MAX_SHARED_BYTES[sm]
    assert shape.grid[2] == 1 and (sm == 90 or shape.cluster == (1, 1, 1))


def test_wgmma_has_an_operand_for_every_accumulator():
    text = wgmma_header(26)
    assert "m64n208k32" in text and text.count('"+r"(d[') == 104 and "%108, add" in text


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


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize(("dims", "tokens", "images"), [(256, 1, 1), (256, 50, 1), (256, 306, 1), (256, 1018, 1)] + [
    (72, 256, images) for images in (1, 2, 3, 4)
])  # fmt: skip
def test_every_attention_of_the_policy_has_a_kernel(dims, tokens, images, sm):
    kernel = attention.best(dims, tokens, images, sm)
    shape = kernel.shape(tokens, 1 if dims == 256 else 16, images)
    assert kernel.dims == dims and shape.shared_bytes <= tactics.MAX_SHARED_BYTES[sm]
    assert sm == 90 or shape.cluster == (1, 1, 1)


@pytest.mark.parametrize(
    ("cached", "own", "keys"), [(833, 50, 112), (577, 50, 80), (321, 51, 48), (969, 50, 80), (3, 1, 32), (0, 0, 32)]
)
def test_a_suffix_has_tiles_of_its_share_of_the_keys(cached, own, keys):
    assert attention.best(256, 50, 1, 90, cached, own).keys == keys


def test_refuses_heads_without_a_kernel():
    with pytest.raises(KernelError, match="heads of 128.*72 and 256"):
        attention.best(128, 50, 1, 90)
