"""Weights to integers: a fine search for each row's scale, and error compensation.

Everything happens in the transformed basis: W' [N, K], rows x' [M, K].
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from duq.compiler.quant import gpu
from duq.compiler.quant.transforms import unit_power
from duq.plugins.errors import DuqWarning

# A step of the scale that clips the tails of a row buys finer steps for all other weights. Ratios of the scale to the
# one that clips nothing: first every twentieth, then every hundredth around the best.
COARSE = [0.40 + 0.05 * i for i in range(13)]
FINE = [0.01 * i for i in range(-4, 5) if i]

CHUNK = {"cpu": 1 << 17, "cuda": 1 << 26}  # weights searched at a time; on CPUs the temporaries stay in the cache
SEGMENT = 4096  # columns whose errors compensate each other
LEAF = 16  # columns rounded one after the other, whose errors the others get as one product; on CPUs the fastest
DAMPING_STEP, DAMPING_START = 10.0, 1e-12  # by and from which a damping that leaves the Hessian singular is raised


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


def round_compensated(weight: Tensor, scale: Tensor, feedback: Sequence[Tensor], bits: int) -> Tensor:
    """GPTQ (arXiv 2210.17323): each column's rounding error is made up for by the columns after it.

    Minimizes |x' E^T|^2 / M + damping * mean_k |x'_k|^2 / M * |E|^2 of the error E = W' - scale q greedily, column by column:
    column k is rounded from W'_k + sum_(i < k) E_i feedback[i, k].

    Args:
        weight: W', float32 [N, K]. scale: [N]. feedback: of the rows x', by :func:`error_feedback`.
    Returns: int8 [N, K].
    """
    segments = zip(weight.split(SEGMENT, dim=1), feedback, strict=True)
    return torch.cat([_round_segment(w.T.contiguous(), scale, each, bits).T for w, each in segments], dim=1)


def _round_segment(columns: Tensor, scale: Tensor, feedback: Tensor, bits: int) -> Tensor:
    """`columns` is W'^T [K, N], so that a column of W' is contiguous; integers come likewise, int8 [K, N]."""
    quantized = torch.empty_like(columns, dtype=torch.int8)
    carried = torch.zeros_like(columns)  # what the columns so far ask of each one to come; of those so far, their errors
    leaf, round_leaf = (gpu.LEAF, gpu.round_columns) if gpu.can_round(columns.device) else (LEAF, round_columns)

    def descend(start: int, end: int) -> None:
        if end - start <= leaf:
            part = slice(start, end)
            round_leaf(columns[part], carried[part], scale, feedback[part, part], quantized[part], bits)
        else:
            middle = start + leaf * ((end - start + leaf) // (2 * leaf))
            descend(start, middle)
            carried[middle:end].addmm_(feedback[start:middle, middle:end].T, carried[start:middle])
            descend(middle, end)

    descend(0, len(columns))
    return quantized


def round_columns(columns: Tensor, carried: Tensor, scale: Tensor, feedback: Tensor, quantized: Tensor, bits: int) -> None:
    """Rounds W'^T [K, N] a column of W' after the other, into `quantized`. plugins/cuda/compensate.cu computes the same.

    carried: float32 [K, N]; what was carried to each column comes in, its error goes out. feedback: [K, K], read above its
    diagonal.
    """
    for k, column in enumerate(columns):
        q = torch.add(column, carried[k]).div_(scale).round_().clamp_(*integer_range(bits))
        quantized[k] = q
        carried[k] = column - q * scale
        carried[k + 1 :].addr_(feedback[k, k + 1 :], carried[k])


def error_feedback(x: Tensor, damping: float, name: str = "a linear") -> list[Tensor]:
    """For rows x' [M, K] what :func:`round_compensated` takes: a matrix float32 [k, k] for each segment of 4096 columns.

    Columns compensate each other within segments, which bounds the matrices of the widest linears to 64 MB each.
    The linears that share x' share them; name: of those linears, for the warning where a Hessian takes more damping.
    """
    return [_feedback(rows, damping, name) for rows in x.split(SEGMENT, dim=1)]


def _feedback(x: Tensor, damping: float, name: str) -> Tensor:
    """U diag(U)^-1 for the upper triangular U of H = x^T x / M + damping * mean(diag) I = U U^T: float32 [K, K].

    |E U|^2 = sum_k u_kk^2 (E_k + sum_(i < k) E_i u_ik / u_kk)^2 is what compensation makes small, term by term.

    In float32; where that finds the Hessian singular (fewer rows than channels, dead or equal channels) in float64; and
    where this does too, with ten times the damping, and ten times that, until it does not, which a DampingWarning says.
    """
    x = x / unit_power(x)  # a constant factor changes no compensation; a power of two not even a rounding
    feedback = _damped_feedback(x, damping)
    if feedback is None:
        x, used = x.double(), damping
        while (feedback := _damped_feedback(x, used)) is None:
            used = max(DAMPING_STEP * used, DAMPING_START)
        if used != damping:
            warnings.warn(
                f"{name}: --damping {damping:g} leaves the Hessian singular; compensated with {used:g}",
                DampingWarning, stacklevel=2,
            )  # fmt: skip
    return feedback


def _damped_feedback(x: Tensor, damping: float) -> Tensor | None:
    """:func:`_feedback` in the type of x [M, K], whose largest magnitude is about 1; None where it is singular."""
    x = x.flip(1)  # the lower factor of the Hessian in reverse is the upper one
    hessian = (x.T @ x).div_(len(x))
    hessian.diagonal().add_(damping * hessian.diagonal().mean() + 1e-30)
    lower, failed = torch.linalg.cholesky_ex(hessian)
    feedback = lower.flip(0, 1)
    feedback = feedback.div_(feedback.diagonal().clone()).float().contiguous()
    return None if failed or not feedback.sum().isfinite() else feedback
