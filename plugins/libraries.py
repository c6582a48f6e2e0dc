"""NVIDIA's libraries of one CUDA: of the major version that the installed cuda-bindings is for.

Several may lie side by side (PyTorch brings those of its own CUDA), and what a library makes loads on some drivers alone: code
by NVRTC 13 is of no use on the driver of JetPack 6, which is for CUDA 12.6. So a library is looked for by its major version.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from duq.plugins.errors import KernelError

# library -> the folder of its wheel for CUDA 12 (those of CUDA 13 share one), the wheel's name, the extra that brings it
_WHEELS = {"nvrtc": ("cuda_nvrtc", "nvidia-cuda-nvrtc", "cuda"), "cublasLt": ("cublas", "nvidia-cublas", "cuda-runtime")}


class Version(NamedTuple):
    """Of CUDA, of a driver by the CUDA that it is for, or of NVRTC."""

    major: int
    minor: int

    @classmethod
    def of(cls, number: int) -> Version:
        """Of NVIDIA's number: 12060 is 12.6."""
        return cls(number // 1000, number % 1000 // 10)

    @classmethod
    def parse(cls, text: str) -> Version:
        """Of "12.6"; ValueError for anything else."""
        major, minor = text.split(".")
        return cls(int(major), int(minor))

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


def bindings_version() -> Version:
    """The CUDA that cuda-bindings is for. Raises KernelError where it is not installed."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise KernelError(f"CUDA needs cuda-bindings ({error}): pip install '{extra('cuda')}'") from error
    return Version.of(driver.CUDA_VERSION)


def extra(name: str, major: int = 13) -> str:
    """The extra "cuda" or "cuda-runtime" of a CUDA version, as pip takes it: duq-vla[cuda12]."""
    return f"duq-vla[{name if major == 13 else name.replace('cuda', f'cuda{major}')}]"


def load(name: str, needed_by: str) -> ctypes.CDLL:
    """Loads libNAME.so ("nvrtc" or "cublasLt") of the bindings' CUDA: from its wheel, else where the system has it.

    Raises KernelError that names the extra where there is none.
    """
    major = bindings_version().major
    for path in _candidates(name, major):
        try:
            for part in sorted(Path(path).parent.glob(f"lib{name}-builtins.so.{major}.*")):  # NVRTC opens it by its name
                ctypes.CDLL(str(part), mode=os.RTLD_GLOBAL)
            return ctypes.CDLL(path, mode=os.RTLD_GLOBAL)  # global: the bindings find it loaded
        except OSError:
            continue
    _, wheel, brought_by = _WHEELS[name]
    raise KernelError(
        f"{needed_by} needs {wheel}{'-cu12' if major == 12 else ''} (lib{name}.so.{major}): "
        f"pip install '{extra(brought_by, major)}'"
    )


def _candidates(name: str, major: int) -> Iterator[str]:
    file = f"lib{name}.so.{major}"
    folder = _WHEELS[name][0] if major == 12 else f"cu{major}"
    for place in sys.path:
        if (path := Path(place or ".", "nvidia", folder, "lib", file)).is_file():
            yield str(path)
    yield file  # wherever the system's loader looks; on a Jetson, JetPack's
    for variable in ("CUDA_PATH", "CUDA_HOME"):
        if root := os.environ.get(variable):
            yield str(Path(root, "lib64", file))
