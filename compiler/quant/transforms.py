"""Changes of basis around a linear that leave its function unchanged but make it easier to quantize.

For y = W x, a :class:`LinearTransform` quantizes x' = (x * s)[P] R and W' = R_out (W / s)[:, P] R instead, with R and
R_out orthogonal and block-diagonal, so that x' W'^T R_out = x W^T. docs/quantization.md derives where each factor goes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

# Steps of the greedy rotation; the outliers of a block are spread after a handful.
GREEDY_STEPS = 16


@dataclass(kw_only=True, eq=False)
class LinearTransform:
    """What happens to the K inputs and N outputs of a linear.

    Attributes:
        input_scale: s, float32 [K], or None.
        permutation: P, int64 [K]: x'[i] = x[P[i]]; or None.
        rotation: R: ``"hadamard"`` for H_B / sqrt(B) in every block (Sylvester's order), or float32 [K/B, B, B], or None.
        block_size: B, 0 without a rotation.
        output_rotation: R_out, float32 [N/Bo, Bo, Bo], or None.
    """

    input_scale: np.ndarray | None = None
    permutation: np.ndarray | None = None
    rotation: np.ndarray | Literal["hadamard"] | None = None
    block_size: int = 0
    output_rotation: np.ndarray | None = None

    def parts(self) -> dict[str, Any]:
        """The attributes of the transform alone, where this is a pack."""
        return {field.name: getattr(self, field.name) for field in fields(LinearTransform)}

    def transform_input(self, x: Tensor) -> Tensor:
        """x [..., K] -> x' [..., K]."""
        return self._rotate(self._permute(x if self.input_scale is None else x * _like(self.input_scale, x)))

    def restore_input(self, x: Tensor) -> Tensor:
        """x' [..., K] -> x [..., K]."""
        if self.rotation is not None:
            x = rotate(x, _transposed(self.rotation), self.block_size)
        if self.permutation is not None:
            x = x[..., torch.from_numpy(np.argsort(self.permutation))]
        return x if self.input_scale is None else x / _like(self.input_scale, x)

    def transform_weight(self, weight: Tensor) -> Tensor:
        """W [N, K] -> W' [N, K]."""
        if self.input_scale is not None:
            weight = weight / _like(self.input_scale, weight)
        weight = self._rotate(self._permute(weight))
        if self.output_rotation is not None:
            weight = rotate(weight.T, _transposed(self.output_rotation), self.output_rotation.shape[-1]).T.contiguous()
        return weight

    def restore_output(self, y: Tensor) -> Tensor:
        """y' [..., N] -> y [..., N]: undoes R_out."""
        return y if self.output_rotation is None else rotate(y, self.output_rotation, self.output_rotation.shape[-1])

    def _permute(self, x: Tensor) -> Tensor:
        return x if self.permutation is None else x[..., torch.from_numpy(self.permutation)]

    def _rotate(self, x: Tensor) -> Tensor:
        return x if self.rotation is None else rotate(x, self.rotation, self.block_size)


def rotate(x: Tensor, rotation: np.ndarray | str, block_size: int) -> Tensor:
    """x [..., K] times the block-diagonal matrix of ``rotation`` (see :class:`LinearTransform`)."""
    blocks = x.unflatten(-1, (-1, block_size))
    if isinstance(rotation, str):
        return (blocks @ hadamard(block_size).to(x)).flatten(-2)
    return torch.einsum("...bi,bij->...bj", blocks, _like(rotation, x)).flatten(-2)


def hadamard(size: int) -> Tensor:
    """The orthonormal Hadamard matrix of a power of two in Sylvester's order, float32 [size, size]."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / size**0.5


def block_size_for(channels: int, block_size: int) -> int:
    """The largest power of two up to ``block_size`` that divides ``channels``."""
    return min(block_size, channels & -channels)


def balance(input_rms: Tensor, weight_rms: Tensor) -> Tensor:
    """d = sqrt(rms(x) / rms(W)) per input channel, float32 [K]: x / d and W d then share the spread equally.

    Normalized to a geometric mean of 1 over the live channels. Channels that calibration or the weights leave (nearly)
    dead get the factor at the floor of 1e-4 of the root mean square instead of 0 or infinity.
    """
    ratio = _floored(input_rms) / _floored(weight_rms)
    log = 0.5 * ratio.log()
    return (log - log.mean()).exp().to(torch.float32)


def _floored(rms: Tensor) -> Tensor:
    rms = rms.to(torch.float64)
    typical = rms.square().mean().sqrt()
    return rms.clamp_min(1e-4 * typical) if typical > 0 else torch.ones_like(rms)


def zigzag_permutation(magnitude: Tensor, block_size: int) -> np.ndarray:
    """DuQuant's zigzag (arXiv 2406.01721): deals the channels, largest first, to the blocks in serpentine order.

    Every block then holds the same share of large channels. magnitude [K] -> int64 [K].
    """
    order = torch.argsort(magnitude, descending=True, stable=True).view(block_size, -1).clone()
    order[1::2] = order[1::2].flip(1)
    return order.T.flatten().cpu().numpy()


def interleaving_permutation(magnitude: Tensor) -> np.ndarray:
    """The permutation of the original openpi packs: largest, smallest, second largest, second smallest, ..."""
    order = torch.argsort(magnitude, descending=True, stable=True)
    half = (len(order) + 1) // 2
    interleaved = torch.empty_like(order)
    interleaved[0::2], interleaved[1::2] = order[:half], order[half:].flip(0)
    return interleaved.cpu().numpy()


def unit_power(x: Tensor) -> float:
    """The power of two at or below the largest magnitude of x; 1 where all is zero. x / it has its largest in [1, 2)."""
    largest = float(x.abs().max()) if x.numel() else 0.0
    return 2.0 ** (math.frexp(largest)[1] - 1) if 0 < largest < math.inf else 1.0


def weight_rotation(weight: Tensor, block_size: int) -> np.ndarray:
    """Per block of columns, the left singular vectors of W[:, block]^T: weight [N, K] -> float32 [K/B, B, B]."""
    blocks = weight.unflatten(-1, (-1, block_size)).transpose(0, 1).to(torch.float32)  # [K/B, N, B]
    blocks = blocks / unit_power(blocks)  # squares of the largest and the smallest floats are none
    gram = blocks.transpose(1, 2) @ blocks  # its eigenvectors are those singular vectors, at the cost of B x B
    try:
        vectors = torch.linalg.eigh(gram).eigenvectors
    except torch.linalg.LinAlgError:  # many equal eigenvalues, which float32 does not tell from each other
        vectors = torch.linalg.eigh(gram.double()).eigenvectors.float()
    return vectors.flip(-1).cpu().numpy()


def greedy_rotation(x: Tensor, block_size: int, seed: int = 0) -> np.ndarray:
    """DuQuant's greedy block rotation (arXiv 2406.01721, section 3.2): rows x [M, K] -> float32 [K/B, B, B].

    Each step takes the channel with the largest magnitude in the block and rotates it evenly into all others; the
    product of steps with the smallest remaining magnitude is kept, for each block on its own.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = x.unflatten(-1, (-1, block_size)).transpose(0, 1).contiguous()  # [K/B, M, B]
    count = torch.arange(len(blocks), device=x.device)
    rotation = torch.eye(block_size, device=x.device).repeat(len(blocks), 1, 1)
    best, best_peak = rotation.clone(), blocks.abs().amax((1, 2))
    for _ in range(GREEDY_STEPS):
        outlier = blocks.abs().amax(1).argmax(1)
        step = _spreading_rotation(block_size, generator).to(x.device).repeat(len(blocks), 1, 1)
        # Swap row 0 (the one that spreads evenly) with the outlier's row.
        step[count, 0], step[count, outlier] = step[count, outlier].clone(), step[count, 0].clone()
        blocks, rotation = blocks @ step, rotation @ step
        peak = blocks.abs().amax((1, 2))
        better = peak < best_peak
        best[better], best_peak[better] = rotation[better], peak[better]
    return best.cpu().numpy()


def _spreading_rotation(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal [size, size] whose first row is 1 / sqrt(size) everywhere."""
    basis = torch.randn(size, size, generator=generator, dtype=torch.float64)
    basis[:, 0] = 1.0
    q = torch.linalg.qr(basis).Q
    return (q * q[0, 0].sign()).T.to(torch.float32)


def _transposed(rotation: np.ndarray | str) -> np.ndarray | str:
    """R^T = R^-1, block by block; Sylvester's Hadamard matrix is symmetric."""
    return rotation if isinstance(rotation, str) else np.ascontiguousarray(rotation.swapaxes(1, 2))


def _like(array: np.ndarray, x: Tensor) -> Tensor:
    return torch.from_numpy(array).to(x)
