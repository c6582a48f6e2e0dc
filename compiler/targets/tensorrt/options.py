"""The options of the `tensorrt` target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import ml_dtypes
import numpy as np
import onnx_ir as ir

from duq.compiler.targets import GpuOptions

LOOPS = ("unrolled", "graph")


class FloatType(NamedTuple):
    """The type of everything that is not quantized: its --float-type, ONNX's and numpy's type, and the kernels' word for it."""

    name: str
    onnx: ir.DataType
    numpy: Any
    kernels: str


FLOAT_TYPES = {
    "bf16": FloatType("bf16", ir.DataType.BFLOAT16, ml_dtypes.bfloat16, "Bf16"),
    "fp16": FloatType("fp16", ir.DataType.FLOAT16, np.float16, "Half"),
}


@dataclass(frozen=True, kw_only=True)
class TensorRTOptions(GpuOptions):
    """What the engines look like.

    Attributes:
        loop: "unrolled" into one network, or "graph": the executor repeats the step's engine.
        float_type: of what is not quantized, "bf16" or "fp16".
    """

    target: ClassVar[str] = "tensorrt"
    loop: str = "graph"
    float_type: str = "bf16"
