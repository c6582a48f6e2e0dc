"""The CUDA kernels, each described in one place: signature, launch, layouts and meaning (plugins/kernel.py).

One module a source of plugins/cuda. Functions and tactics make an `Instance`, whose arguments are bound by name:

    kernels.normalize(50, 1024, "float", "Bf16", center=False).bind(x=x, y=y, depth=1024, ...)
"""

from __future__ import annotations

from duq.plugins.kernel import Kernel
from duq.plugins.kernels.attention import ATTENTION, Attention
from duq.plugins.kernels.attention_split import ATTENTION_SPLIT, SplitAttention
from duq.plugins.kernels.attention_tile import ATTENTION_TILE, TileAttention
from duq.plugins.kernels.attention_wgmma import ATTENTION_WGMMA, ProjectedAttention, WgmmaAttention
from duq.plugins.kernels.bitblas import BITBLAS, Generated
from duq.plugins.kernels.dequantize_weight import DEQUANTIZE_WEIGHT, dequantize_weight
from duq.plugins.kernels.embed import FLOAT_PATCHES, PATCHES, TOKENS, patches, tokens
from duq.plugins.kernels.epilogue import EPILOGUE, epilogue
from duq.plugins.kernels.geglu import GEGLU, geglu
from duq.plugins.kernels.gemm_float import GEMM_FLOAT, GemmFloat
from duq.plugins.kernels.gemm_large import GEMM_LARGE, Large
from duq.plugins.kernels.gemm_small import GEMM_SMALL, Small
from duq.plugins.kernels.gemm_wgmma import GEMM_WGMMA, Wgmma
from duq.plugins.kernels.gemm_wgmma_small import GEMM_WGMMA_SMALL, WgmmaSmall
from duq.plugins.kernels.hadamard_quantize import HADAMARD_DEPTHS, HADAMARD_QUANTIZE, hadamard_quantize
from duq.plugins.kernels.library import MATMUL, matmul
from duq.plugins.kernels.linear_narrow import FLOW_STEP, LINEAR_NARROW, flow_step, linear_narrow
from duq.plugins.kernels.normalize import NORMALIZE, normalize
from duq.plugins.kernels.residual_quantize import RESIDUAL_QUANTIZE, residual_quantize
from duq.plugins.kernels.rotary import ROTARY, rotary
from duq.plugins.kernels.rotate_quantize import ROTATE_QUANTIZE, rotate_quantize

__all__ = [
    "HADAMARD_DEPTHS",
    "KERNELS",
    "Attention",
    "GemmFloat",
    "Generated",
    "Large",
    "ProjectedAttention",
    "Small",
    "SplitAttention",
    "TileAttention",
    "Wgmma",
    "WgmmaAttention",
    "WgmmaSmall",
    "dequantize_weight",
    "epilogue",
    "flow_step",
    "geglu",
    "hadamard_quantize",
    "linear_narrow",
    "matmul",
    "normalize",
    "patches",
    "residual_quantize",
    "rotary",
    "rotate_quantize",
    "tokens",
]

KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        ATTENTION,
        ATTENTION_SPLIT,
        ATTENTION_TILE,
        ATTENTION_WGMMA,
        BITBLAS,
        DEQUANTIZE_WEIGHT,
        EPILOGUE,
        FLOAT_PATCHES,
        FLOW_STEP,
        GEGLU,
        GEMM_FLOAT,
        GEMM_LARGE,
        GEMM_SMALL,
        GEMM_WGMMA,
        GEMM_WGMMA_SMALL,
        HADAMARD_QUANTIZE,
        LINEAR_NARROW,
        MATMUL,
        NORMALIZE,
        PATCHES,
        RESIDUAL_QUANTIZE,
        ROTARY,
        ROTATE_QUANTIZE,
        TOKENS,
    )
}
