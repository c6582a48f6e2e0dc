"""The kernel that rounds with error compensation against its definition, and the quantizer's rounding by it against PyTorch's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from duq.compiler.quant import gpu
from duq.compiler.quant.rounding import error_feedback, round_columns, round_compensated, round_weights, search_scales
from tests.support import launch

GUARD = 3  # columns past the last


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("count", [1, 31, 32])
@pytest.mark.parametrize("rows", [1, 300, 16384])
def test_the_kernel_is_its_definition(rows, count, bits):
    """To the bit, integers and errors: PyTorch on the CPU fuses no multiplication with an addition either."""
    generator = torch.Generator().manual_seed(rows + count)
    columns, carried = (torch.randn(count + GUARD, rows, generator=generator) for _ in range(2))
    feedback = torch.randn(count, count + GUARD, generator=generator).tril_(-1).fill_diagonal_(math.nan) + torch.randn(
        count, count + GUARD, generator=generator
    ).triu_(1)
    scale = torch.rand(rows, generator=generator) - 0.5
    quantized = torch.full((count + GUARD, rows), 99, dtype=torch.int8)
    operands = columns, scale, feedback, carried, quantized
    w, s, f, c, q = (each.cuda() for each in operands)
    launch.compensate(w[:count], s, f[:, :count], c[:count], q[:count], bits)
    round_columns(columns[:count], carried[:count], scale, feedback[:, :count], quantized[:count], bits)
    assert torch.equal(q.cpu(), quantized)  # the guard included
    assert torch.equal(c.cpu(), carried)


@pytest.mark.parametrize(("rows", "channels"), [(512, 2048), (100, 1000), (256, 8192)])
def test_rounds_as_pytorch_does(rows, channels, monkeypatch):
    """Products of blocks sum in another order, so that some weights fall on the other side of a tie, and their row after them."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(768, channels, generator=generator, device="cuda") + torch.randn(
        768, 1, generator=generator, device="cuda"
    )
    weight = torch.randn(rows, channels, generator=generator, device="cuda")
    scale, feedback = search_scales(weight, x.square().mean(0), 4), error_feedback(x, 1.0)
    assert gpu.can_round(x.device)
    by_kernel = round_compensated(weight, scale, feedback, 4)
    monkeypatch.setattr(gpu, "can_round", lambda device: False)
    by_pytorch = round_compensated(weight, scale, feedback, 4)
    assert np.mean((by_kernel == by_pytorch).cpu().numpy()) > 0.99

    def error(integers):
        return float((x @ (weight - integers * scale[:, None]).T).square().sum())

    assert abs(error(by_kernel) / error(by_pytorch) - 1) < 1e-3
    assert error(by_kernel) < 0.9 * error(round_weights(weight, scale, 4))
