"""Layers whose weights stay in the checkpoint's dtype.

A full-size pi0 is 6.5 GB in bfloat16 and would be 13 GB in float32. The weights therefore stay as they lie in the
memory-mapped file, and each layer upcasts its own to float32 when it computes: one temporary at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """y = x W^T + b in the dtype of x; W is [out, in]."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class RMSNorm(nn.Module):
    """Gemma's norm, x * rsqrt(mean(x^2) + 1e-6) * (1 + weight)."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, condition: None = None) -> tuple[Tensor, None]:
        gain = 1.0 + self.weight.to(x.dtype)
        return F.rms_norm(x, gain.shape, gain, eps=1e-6), None


class AdaptiveRMSNorm(nn.Module):
    """pi0.5's norm: scale, shift and the residual's gate are linear in the time embedding (adaRMS).

    Args of forward: x [B, T, width], condition [B, width].
    Returns: (normalized x * (1 + scale) + shift, gate [B, 1, width]).
    """

    def __init__(self, width: int):
        super().__init__()
        self.dense = Linear(width, 3 * width)

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        modulation, width = self.dense(condition).unsqueeze(1), x.shape[-1]
        scale, shift, gate = modulation[..., :width], modulation[..., width : 2 * width], modulation[..., 2 * width :]
        ones = torch.ones(width, dtype=x.dtype, device=x.device)
        return F.rms_norm(x, ones.shape, ones, eps=1e-6) * (1.0 + scale) + shift, gate
