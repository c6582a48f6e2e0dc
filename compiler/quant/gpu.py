"""Rounding with error compensation on a GPU: 32 columns a launch, which NVRTC compiles for the GPU at hand."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from duq.plugins import driver
from duq.plugins.errors import DuqWarning, KernelError
from duq.plugins.kernels.compensate import COLUMNS as LEAF
from duq.plugins.kernels.compensate import compensate
from duq.plugins.nvrtc import compile_cubin

__all__ = ["LEAF", "can_round", "round_columns"]


def can_round(device: torch.device) -> bool:
    """Whether :func:`round_columns` works there. Where it does not on a GPU a DuqWarning says why: PyTorch takes longer."""
    return device.type == "cuda" and _kernel(torch.cuda.current_device()) is not None


def round_columns(columns: Tensor, carried: Tensor, scale: Tensor, feedback: Tensor, quantized: Tensor, bits: int) -> None:
    """As :func:`duq.compiler.quant.rounding.round_columns`, for at most LEAF columns, dense within each row."""
    count, rows = columns.shape
    instance, kernel = compensate(rows), _kernel(torch.cuda.current_device())
    assert kernel is not None, "can_round says whether there is one"
    arguments = instance.scalars({
        "columns": columns.data_ptr(), "scale": scale.data_ptr(), "feedback": feedback.data_ptr(),
        "carried": carried.data_ptr(), "quantized": quantized.data_ptr(),
        "rows": rows, "count": count, "stride": feedback.stride(0), "bits": bits,
    })  # fmt: skip
    kernel.launch(instance.shape, arguments, torch.cuda.current_stream().cuda_stream)


@functools.cache
def _kernel(ordinal: int) -> driver.Kernel | None:
    code = compensate(1).code
    try:
        cubin = compile_cubin(code.source, driver.open_device(ordinal), [code.expression])
        return driver.load(cubin)[code.expression]
    except KernelError as error:
        warnings.warn(f"compensating with PyTorch's operations, which takes longer: {error}", DuqWarning, stacklevel=2)
        return None
