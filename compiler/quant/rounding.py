"""Weights to integers: a fine search for each row's scale, and error compensation.

Everything happens in the transformed basis: W' [N, K], rows x' [M, K].
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from duq.compiler.quant.transforms import unit_power
from duq.plugins.errors import DuqWarning

# A step of the scale that clips the tails of a row buys finer steps for all other weights. Ratios of the scale to the
# one that clips nothing: first every twentieth, then every hundredth around the best.
COARSE = [0.40 + 0.05 * i for i in range(13)]
FINE = [0.01 * i for i in range(-4, 5) if i]

CHUNK = {"cpu": 1 << 17, "cuda": 1 << 26}  # weights searched at a time; on CPUs the temporaries stay in the cache
SEGMENT = 4096  # columns whose errors compensate each other
DAMPING_STEP, DAMPING_START = 10.0, 1e-12  # by and from which a damping that leaves the Hessian singular is raised
LAZY = 128  # columns after which the rest of the segment is brought up to date


def integer_range(bits: int) -> tuple[int, int]:
    """(-8, 7) or (-128, 127)."""
    return -(1 << bits - 1), (1 << bits - 1) - 1


def round_weights(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """clamp(round(W' / scale)): float32 [N, K] and [N] -> int8 [N, K]."""
    return torch.round(weight / scale[:, None]).clamp_(*integer_range(bits)).to(torch.int8)


def search_scales(weight: Tensor, energy: Tensor, bits: int) -> Tensor:
    """The scale of every row with the least sum_k energy[k] (W'[n, k] - scale[n] q[n, k])^2: float32 [N].

    Args:
        weight: W', float32 [N, K].
        energy: mean square of x' per channel, float32 [K].
    """
    rows = max(1, CHUNK[weight.device.type] // weight.shape[1])
    return torch.cat([_search(part, energy, bits) for part in weight.split(rows)])


def _search(rows: Tensor, energy: Tensor, bits: int) -> Tensor:
    low, high = integer_range(bits)
    # The integers reach one step further down than up: point the longer tail of the row there.
    top, bottom = rows.amax(1), -rows.amin(1)
    widest = torch.maximum(top, bottom).clamp_min(1e-30)
    unclipped = torch.where(top > bottom, -widest, widest) / high
    normalized = rows / unclipped[:, None]  # in steps of the unclipped scale
    quantized = torch.empty_like(normalized)

    def error(ratio: Tensor) -> Tensor:
        torch.div(normalized, ratio[:, None], out=quantized).round_().clamp_(low, high).mul_(ratio[:, None])
        return quantized.sub_(normalized).square_() @ energy

    best_ratio = torch.ones_like(top)
    best_error = torch.full_like(top, torch.inf)
    for ratios in (COARSE, FINE):
        center = best_ratio.clone() if ratios is FINE else torch.zeros_like(top)
        for ratio in ratios:
            candidate = center + ratio
            e = error(candidate)
            better = e < best_error
            best_error = torch.where(better, e, best_error)
            best_ratio = torch.where(better, candidate, best_ratio)
    return best_ratio * unclipped


class DampingWarning(DuqWarning):
    """A Hessian took more damping than the recipe gives it."""


def round_compensated(
    weight: Tensor, scale: Tensor, x: Tensor, bits: int, damping: float, name: str = "a linear"
) -> Tensor:
    """GPTQ (arXiv 2210.17323): each column's rounding error is made up for by the columns after it.

    Minimizes |x' (W' - scale q)^T|^2 + damping * mean_k |x'_k|^2 |W' - scale q|^2 greedily, column by column. Columns
    compensate each other within segments of 4096, which bounds the Hessian of the widest linears to 64 MB.

    Args:
        weight: W', float32 [N, K]. scale: [N]. x: calibration rows x' [M, K].
        name: of the linear, for the warning where its Hessian takes more damping.
    Returns: int8 [N, K].
    """
    segments = zip(weight.split(SEGMENT, dim=1), x.split(SEGMENT, dim=1), strict=True)
    return torch.cat([_compensate(w, scale, _inverse_factor(rows, damping, name), bits) for w, rows in segments], dim=1)


def _compensate(weight: Tensor, scale: Tensor, factor: Tensor, bits: int) -> Tensor:
    low, high = integer_range(bits)
    columns = weight.T.contiguous()  # [K, N]: a column of W' is a contiguous row here
    quantized = torch.empty_like(columns, dtype=torch.int8)
    for start in range(0, len(columns), LAZY):
        end = min(start + LAZY, len(columns))
        block, errors = columns[start:end], torch.empty_like(columns[start:end])
        for i, k in enumerate(range(start, end)):
            q = torch.round(block[i] / scale).clamp_(low, high)
            quantized[k] = q.to(torch.int8)
            errors[i] = (block[i] - q * scale) / factor[k, k]
            block[i + 1 :].addr_(factor[k, k + 1 : end], errors[i], alpha=-1)
        columns[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return quantized.T.contiguous()


def _inverse_factor(x: Tensor, damping: float, name: str) -> Tensor:
    """The upper Cholesky factor of (x^T x / M + damping * mean(diag) I)^-1, up to a constant factor: float32 [K, K].

    In float32; where that finds the Hessian singular (fewer rows than channels, dead or equal channels) in float64; and
    where this does too, with ten times the damping, and ten times that, until it does not, which a DampingWarning says.
    """
    x = x / unit_power(x)  # a constant factor changes no compensation; a power of two not even a rounding
    factor = _damped_factor(x, damping)
    if factor is None:
        x, used = x.double(), damping
        while (factor := _damped_factor(x, used)) is None:
            used = max(DAMPING_STEP * used, DAMPING_START)
        if used != damping:
            warnings.warn(
                f"{name}: --damping {damping:g} leaves its Hessian singular; it was compensated with {used:g}",
                DampingWarning, stacklevel=2,
            )  # fmt: skip
    return factor


def _damped_factor(x: Tensor, damping: float) -> Tensor | None:
    """:func:`_inverse_factor` in the type of x [M, K], whose largest magnitude is about 1; None where it is singular."""
    hessian = x.T @ x / len(x)
    hessian.diagonal().add_(damping * hessian.diagonal().mean() + 1e-30)
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if failed:
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    upper = upper.float()
    return None if failed or not upper.isfinite().all() or not upper.diagonal().all() else upper
