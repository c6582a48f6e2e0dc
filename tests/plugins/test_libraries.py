"""Which of NVIDIA's libraries is loaded where several versions lie side by side, and what is said where none does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from duq.plugins import libraries
from duq.plugins.errors import KernelError
from duq.plugins.libraries import Version, bindings_version


def test_versions_are_numbers_of_nvidia_and_text():
    assert [Version.of(number) for number in (12060, 12080, 13000, 13010)] == [(12, 6), (12, 8), (13, 0), (13, 1)]
    assert str(Version(12, 6)) == "12.6" and Version.parse("13.0") == (13, 0) and Version(12, 9) < Version(13, 0)
    for text in ("13", "a.b", "1.2.3", ""):
        with pytest.raises(ValueError):
            Version.parse(text)


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """Folders like site-packages with a library of each CUDA; what would be loaded is returned as its path."""
    for place, file in (
        ("a/nvidia/cuda_nvrtc", "libnvrtc.so.12"),
        ("a/nvidia/cu13", "libnvrtc.so.13"),
        ("b/nvidia/cublas", "libcublasLt.so.12"),
        ("b/nvidia/cu13", "libcublasLt.so.13"),
    ):
        path = tmp_path / place / "lib" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setattr(libraries.sys, "path", [str(tmp_path / "a"), str(tmp_path / "b")])
    monkeypatch.setattr(libraries.ctypes, "CDLL", lambda path, mode: Path(path).relative_to(tmp_path).as_posix())
    return tmp_path


@pytest.mark.parametrize(
    ("name", "major", "found"),
    [
        ("nvrtc", 12, "a/nvidia/cuda_nvrtc/lib/libnvrtc.so.12"),
        ("nvrtc", 13, "a/nvidia/cu13/lib/libnvrtc.so.13"),
        ("cublasLt", 12, "b/nvidia/cublas/lib/libcublasLt.so.12"),
        ("cublasLt", 13, "b/nvidia/cu13/lib/libcublasLt.so.13"),
    ],
)
def test_takes_the_library_of_the_bindings_cuda(name, major, found, wheels, monkeypatch):
    monkeypatch.setattr(libraries, "bindings_version", lambda: Version(major, 9))
    assert libraries.load(name, "this") == found


def test_then_the_loader_and_the_toolkit_are_asked(wheels, monkeypatch):
    tried = []

    def nowhere(path, mode):
        tried.append(path)
        raise OSError(path)

    monkeypatch.setattr(libraries.ctypes, "CDLL", nowhere)
    monkeypatch.setattr(libraries, "bindings_version", lambda: Version(12, 6))
    monkeypatch.setenv("CUDA_HOME", "/usr/local/cuda-12.6")
    with pytest.raises(KernelError, match=r"this needs nvidia-cublas-cu12 .*: pip install 'duq-vla\[cuda12-runtime\]'"):
        libraries.load("cublasLt", "this")
    assert tried[1:] == ["libcublasLt.so.12", "/usr/local/cuda-12.6/lib64/libcublasLt.so.12"]


@pytest.mark.parametrize(
    ("name", "major", "extra"),
    [("nvrtc", 13, "cuda"), ("nvrtc", 12, "cuda12"), ("cublasLt", 13, "cuda-runtime"), ("cublasLt", 12, "cuda12-runtime")],
)
def test_names_the_extra_that_brings_it(name, major, extra, monkeypatch, tmp_path):
    monkeypatch.setattr(libraries, "bindings_version", lambda: Version(major, 0))
    monkeypatch.setattr(libraries.sys, "path", [str(tmp_path)])
    monkeypatch.setattr(libraries.ctypes, "CDLL", SimpleNamespace)  # raises TypeError were it reached with a real file
    monkeypatch.setattr(libraries, "_candidates", lambda *_: ())
    with pytest.raises(KernelError, match=rf"duq-vla\[{extra}\]'$"):
        libraries.load(name, "this")


def test_nvrtc_of_another_cuda_that_was_loaded_before_is_refused():
    """As PyTorch may have done. In a process of its own: what is loaded stays loaded."""
    code = (
        "from duq.plugins import libraries, nvrtc\nfrom duq.plugins.errors import KernelError\n"
        "libraries.load('nvrtc', 'this')\n"
        "libraries.bindings_version = lambda: libraries.Version(12, 9)\n"
        "libraries.load = lambda *_: None\n"
        "try:\n    nvrtc.nvrtc_version()\nexcept KernelError as error:\n    print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert f"NVRTC {bindings_version().major}." in said and "cuda-bindings is for CUDA 12.9" in said
