"""The integer arithmetic of a quantized linear in PyTorch: the oracle of the engines, and the model for studies.

For a linear with pack p and input x::

    x'  = (x * input_scale)[permutation] R
    s_x = max(max_k |x'|, 1e-12) / 127 for each token, or one calibrated number
    x_q = clamp(round_half_even(x' / s_x), -128, 127)
    y   = ((float(sum_k x_q w_q) * weight_scale) * s_x) R_out + b        the sum is exact
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from duq.compiler.quant.pack import LinearPack

if TYPE_CHECKING:
    from duq.compiler.quant.quantize import Quantization

Model = TypeVar("Model", bound=nn.Module)


def quantize_activations(x: Tensor, activation_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """x' float32 [..., K] -> (x_q with integer values, as float32 [..., K]; s_x, broadcastable to x').

    ``activation_scale`` None means one scale per token from the row itself.
    """
    if activation_scale is None:
        activation_scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return torch.round(x / activation_scale).clamp(-128, 127), activation_scale


def integer_matmul(x_q: Tensor, weight_q: Tensor) -> Tensor:
    """sum_k x_q[m, k] w_q[n, k], exact, as float32 [..., N]; x_q holds integers in -128..127, weight_q is int8 [N, K].

    A float matrix product of integers is exact while every partial sum stays within the mantissa.
    """
    largest = 128 * int(weight_q.abs().amax()) * weight_q.shape[1] if weight_q.numel() else 0
    exact = torch.float32 if largest <= 1 << 24 else torch.float64
    return (x_q.to(exact) @ weight_q.to(exact).T).to(torch.float32)


def quantized_product(x: Tensor, pack: LinearPack, weight_q: Tensor) -> Tensor:
    """x' [..., K] -> y' [..., N], before R_out and bias. ``weight_q`` is the pack's weight as int8 [N, K]."""
    weight_scale = torch.from_numpy(pack.weight_scale).to(x.device)
    if pack.activation_bits == 0:
        return (x @ weight_q.to(torch.float32).T) * weight_scale
    static = None if pack.activation_scale is None else torch.from_numpy(pack.activation_scale).to(x.device)
    x_q, activation_scale = quantize_activations(x, static)
    if static is not None and static.ndim:  # per-channel: the scale cannot leave the sum, so there are no integers
        return ((x_q * activation_scale) @ weight_q.to(torch.float32).T) * weight_scale
    return (integer_matmul(x_q, weight_q) * weight_scale) * activation_scale


class IntegerLinear(nn.Module):
    """A linear computed from its pack. x [..., K] float32 -> [..., N] float32."""

    def __init__(self, pack: LinearPack, bias: Tensor | None):
        super().__init__()
        self.pack = pack
        self.weight_q: Tensor
        self.register_buffer("weight_q", torch.from_numpy(pack.weight()))
        self.bias = None if bias is None else bias.to(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        y = quantized_product(self.pack.transform_input(x), self.pack, self.weight_q)
        y = self.pack.restore_output(y)
        return y if self.bias is None else y + self.bias


def fake_quantize(model: Model, quantization: Quantization) -> Model:
    """A copy of ``model`` with every packed linear an :class:`IntegerLinear` and the edited float weights in place.

    Tensors that quantization leaves alone are shared with ``model``, not copied.
    """
    tensors = [*model.parameters(), *model.buffers()]
    fake = copy.deepcopy(model, memo={id(tensor): tensor for tensor in tensors})
    for name, tensor in quantization.float_weights.items():
        module, _, attribute = name.rpartition(".")
        setattr(fake.get_submodule(module), attribute, nn.Parameter(tensor, requires_grad=False))
    for name, pack in quantization.packs.items():
        parent, _, child = name.rpartition(".")
        linear = fake.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(fake.get_submodule(parent), child, IntegerLinear(pack, linear.bias))
    return fake
