"""The kernel that rounds with error compensation against its definition, and the quantizer's rounding by it against PyTorch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from duq.compiler.quant import gpu
from duq.compiler.quant.rounding import error_feedback, round_compensated, round_weights, search_scales
from tests.support import launch

GUARD = 3  # columns past the last


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("count", [1, 31, 32])
@pytest.mark.parametrize("rows", [1, 300, 16384])
def test_the_kernel_is_its_definition(rows, count, bits):
    """To the bit, integers and errors, by numpy, which fuses no multiplication with an addition either."""
    random = np.random.default_rng(rows + count)
    w, carried = (random.standard_normal((count + GUARD, rows), np.float32) for _ in range(2))
    feedback = random.standard_normal((count, count + GUARD), np.float32)
    feedback[np.tril_indices(count)] = np.nan  # never read
    scale = random.random(rows, np.float32) - np.float32(0.5)
    quantized = np.full((count + GUARD, rows), 99, np.int8)
    operands = (torch.from_numpy(each).cuda() for each in (w, scale, feedback, carried, quantized))
    columns, scales, factor, sums, integers = operands
    launch.compensate(columns[:count], scales, factor[:, :count], sums[:count], integers[:count], bits)
    high = (1 << (bits - 1)) - 1
    for k in range(count):
        q = np.clip(np.rint((w[k] + carried[k]) / scale), -high - 1, high)
        quantized[k], carried[k] = q, w[k] - q * scale
        carried[k + 1 : count] += feedback[k, k + 1 : count, None] * carried[k]
    assert np.array_equal(integers.cpu().numpy(), quantized)  # the guard included
    assert np.array_equal(sums.cpu().numpy(), carried)


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
