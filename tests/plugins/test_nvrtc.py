"""Compiling CUDA kernels with no GPU, and the cache of what is compiled; what the driver says where it cannot be used."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from duq.plugins import driver, nvrtc
from duq.plugins.errors import KernelError
from duq.plugins.libraries import Version
from duq.plugins.nvrtc import Cubin, compile_cubin, compile_ptx, read_cached

SMALLEST = "gemm_small<4, 1, 1, 1, 1, NONE, int>"


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:100] + b"?" + b[101:], lambda b: b""])
def test_cache_is_used_and_rebuilt_when_damaged(tmp_path, monkeypatch, damage):
    first = compile_cubin("gemm_small.cu", 80, [SMALLEST], cache=tmp_path)
    (entry,) = tmp_path.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(nvrtc, "_compile", lambda *_: pytest.fail("compiled again"))
        assert compile_cubin("gemm_small.cu", 80, [SMALLEST], cache=tmp_path) == first
    entry.write_bytes(damage(entry.read_bytes()))
    assert compile_cubin("gemm_small.cu", 80, [SMALLEST], cache=tmp_path) == first
    assert read_cached(entry).endswith(first.image) and list(tmp_path.iterdir()) == [entry]


def test_key_of_the_cache_holds_all_that_matters(tmp_path, monkeypatch):
    monkeypatch.setattr(nvrtc, "_compile", lambda *arguments: Cubin(b"\x7fELF", {}))
    for arguments in [("gemm_small.cu", 80), ("gemm_small.cu", 86), ("gemm_large.cu", 80)]:
        compile_cubin(*arguments, ["k"], cache=tmp_path)
    compile_cubin("gemm_small.cu", 80, ["other"], cache=tmp_path)
    compile_cubin("gemm_small.cu", 80, ["k"], {"a.cuh": ""}, cache=tmp_path)
    compile_cubin("gemm_small.cu", 80, ["k"], options=["-DA"], cache=tmp_path)
    compile_ptx("gemm_small.cu", 80, ["k"], cache=tmp_path)
    compile_ptx("gemm_small.cu", 86, ["k"], cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 8


def test_ptx_is_text_of_the_same_symbols(tmp_path):
    cubin, ptx = (compile("gemm_small.cu", 86, [SMALLEST], cache=tmp_path) for compile in (compile_cubin, compile_ptx))
    assert ptx.symbols == cubin.symbols and ptx.image.endswith(b"\0") and ptx.image.count(b"\0") == 1
    text = ptx.image.decode("ascii")
    assert ".target sm_86\n" in text and f".entry {ptx.symbols[SMALLEST]}(" in text
    assert compile_ptx("gemm_small.cu", 86, [SMALLEST], cache=tmp_path) == ptx  # from the cache


def test_refuses_ptx_that_one_sm_alone_would_run(tmp_path):
    with pytest.raises(KernelError, match="PTX for sm_90a runs on SM 90 alone"):
        compile_ptx("gemm_small.cu", 90, [SMALLEST], cache=tmp_path)


def test_text_without_an_end_is_not_given_to_the_driver():
    with pytest.raises(KernelError, match="PTX has to end with a NUL"):
        driver.load(Cubin(b".version 9.0", {}))


def test_error_of_the_compiler_is_shown(tmp_path):
    with pytest.raises(KernelError, match="(?s)gemm_small.cu does not compile for .*sm_86.*no_such_kernel"):
        compile_cubin("gemm_small.cu", 86, ["no_such_kernel<1>"], cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_refuses_an_unknown_architecture(tmp_path):
    with pytest.raises(KernelError, match="SM 75.*80, 86, 87, 89, 90"):
        compile_cubin("gemm_small.cu", 75, [SMALLEST], cache=tmp_path)


def test_an_sm_that_cuda_12_does_not_know_names_the_extra_of_cuda_13(tmp_path, monkeypatch):
    monkeypatch.setattr(nvrtc, "supported_sms", lambda: [80, 86, 87, 89, 90])
    monkeypatch.setattr(nvrtc, "nvrtc_version", lambda: Version(12, 6))
    says = r"NVRTC 12\.6 compiles for SM 80, 86, 87, 89, 90, not for SM 120; CUDA 13's does: pip install 'duq-vla\[cuda\]'"
    with pytest.raises(KernelError, match=says):
        compile_cubin("gemm_small.cu", 120, [SMALLEST], cache=tmp_path)


def test_names_the_extra_that_brings_a_missing_wheel(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(KernelError, match=r"duq-vla\[cuda\]"):
        compile_cubin("gemm_small.cu", 90, [SMALLEST], cache=tmp_path)


def test_driver_names_the_extra_that_brings_its_bindings(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(KernelError, match=r"duq-vla\[cuda-runtime\]"):
        driver.open_device()


def test_the_bindings_have_every_function_that_is_called():
    """Also those for CUDA 12 (make test-cuda12)."""
    text = Path(driver.__file__).read_text()
    called = set(re.findall(r'"(cu[A-Z]\w+)"', text)) | set(re.findall(r"(?:_driver\(\)|driver)\.(cu\w+|CU\w+)", text))
    assert len(called) > 30 and [name for name in called if not hasattr(driver._driver(), name)] == []


@pytest.mark.parametrize(
    ("found", "bindings", "says"),
    [
        ((12, 6), 13, r"is for CUDA 12\.6; update it to one for CUDA 13\.0 .*, or stay with it \(JetPack 6\).*cuda12\]"),
        ((12, 2), 13, r"is for CUDA 12\.2; update it to one for CUDA 13\.0 \(580 or newer\)$"),
        ((11, 8), 12, r"is for CUDA 11\.8; update it to one for CUDA 12\.0"),
    ],
)
def test_a_driver_older_than_the_bindings(found, bindings, says):
    with pytest.raises(KernelError, match=says):
        driver._check_driver(Version(*found), bindings)
    for newer in ((bindings, 0), (bindings + 1, 2)):
        driver._check_driver(Version(*newer), bindings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine with no GPU")
def test_driver_says_that_there_is_none():
    with pytest.raises(KernelError, match="driver|device"):
        driver.open_device()
