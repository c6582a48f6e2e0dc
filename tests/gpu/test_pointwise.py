"""The float kernels between the GEMMs against their definitions in float64; copies and conversions bit for bit."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.gpu.test_gemm_float import check_left, left_for_norm
from tests.support import launch

GUARD = 8  # rows past the last token and, in strided matrices, columns past the last channel
BF16 = 2**-8  # relative: half a unit in the last place, and as much for a value that is rounded the other way
FLOAT = 1e-5  # of the greatest value


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(dtype)


def guarded(x: torch.Tensor) -> torch.Tensor:
    """x as part of a wider and longer matrix of NaN."""
    matrix = x.new_full((len(x) + GUARD, x.shape[1] + GUARD), math.nan)
    matrix[: len(x), : x.shape[1]] = x
    return matrix[: len(x), : x.shape[1]]


def poisoned(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full((rows + GUARD, columns), math.nan, dtype=dtype, device="cuda")


def check(y: torch.Tensor, exact: torch.Tensor) -> None:
    """y begins with `exact`, in rows and columns, and is poison everywhere else."""
    rows, columns = exact.shape
    absolute = FLOAT * float(exact.abs().max())
    relative = BF16 if y.dtype == torch.bfloat16 else 0
    torch.testing.assert_close(y[:rows, :columns].double(), exact, rtol=relative, atol=absolute)
    assert y[rows:].isnan().all() and y[:, columns:].isnan().all()


def normalized(x, gain, shift, center: bool) -> torch.Tensor:
    x = x.double()
    x = x - x.mean(-1, keepdim=True) if center else x
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    x = x if gain is None else x * gain
    return x if shift is None else x + shift


def gain_and_shift(features: str, depth: int):
    gain = 1 + 0.3 * random(depth, seed=1) if "gain" in features else None
    return gain, random(depth, seed=2) if "shift" in features else None


@pytest.mark.parametrize("features", ["", "gain", "shift", "gain shift"])
@pytest.mark.parametrize(("tokens", "depth"), [(1, 1024), (51, 2048), (3, 8), (257, 1152), (2, 8200)])
@pytest.mark.parametrize("types", [*product((torch.float32, torch.bfloat16), repeat=2)], ids=str)
@pytest.mark.parametrize("center", [True, False])
def test_normalize(center, types, tokens, depth, features):
    x = guarded(random(tokens, depth, seed=depth, dtype=types[0]) * 5)
    gain, shift = gain_and_shift(features, depth)
    y = poisoned(tokens, depth + GUARD, types[1])
    launch.normalize(x, y[:tokens, :depth], gain, shift, center=center)
    check(y, normalized(x, gain, shift, center))


def test_layer_norm_of_rows_far_from_zero():
    """A variance as E[x^2] - E[x]^2 would lose all its digits here."""
    x, y = 1000 + random(51, 1152, seed=1), poisoned(51, 1152)
    launch.normalize(x, y[:51], center=True)
    torch.testing.assert_close(y[:51].double(), normalized(x, None, None, True), rtol=0, atol=1e-3)


def test_norm_of_a_zero_row_is_its_shift():
    x, shift = torch.zeros(3, 1024, device="cuda"), random(1024, seed=1)
    for center in (True, False):
        y = poisoned(3, 1024)
        launch.normalize(x, y[:3], None, shift, center=center)
        assert torch.equal(y[:3], shift.expand(3, -1))


@pytest.mark.parametrize(
    ("cameras", "size", "patch", "pitch"),
    [(1, 224, 14, 592), (3, 224, 14, 640), (2, 56, 14, 1024), (2, 32, 16, 768), (1, 6, 2, 16)],
)
def test_patches(cameras, size, patch, pitch):
    images = np.random.default_rng(size).integers(0, 256, (cameras, size, size, 3), np.uint8)
    pixels = torch.from_numpy(images.astype(np.float32) / np.float32(127.5) - np.float32(1)).permute(0, 3, 1, 2)
    exact = functional.unfold(pixels, patch, stride=patch).transpose(1, 2).flatten(0, 1).bfloat16().cuda()
    y = poisoned(len(exact), pitch, torch.bfloat16)
    launch.patches(torch.from_numpy(images).cuda(), y[: len(exact)], patch)
    assert torch.equal(y[: len(exact)], functional.pad(exact, (0, pitch - exact.shape[1])))
    assert y[len(exact) :].isnan().all()


@pytest.mark.parametrize(
    ("cameras", "size", "patch", "pitch"),
    [(1, 224, 14, 592), (3, 224, 14, 640), (2, 56, 14, 1024), (2, 32, 16, 768), (1, 6, 2, 16)],
)
def test_patches_of_floats(cameras, size, patch, pitch):
    images = torch.rand(cameras, size, size, 3, generator=torch.Generator().manual_seed(size)) * 2 - 1
    images[:, : size // 4] = -3  # padding of LeRobot 0.4
    exact = functional.unfold(images.permute(0, 3, 1, 2), patch, stride=patch)
    exact = exact.transpose(1, 2).flatten(0, 1).bfloat16().cuda()
    y = poisoned(len(exact), pitch, torch.bfloat16)
    launch.patches(images.cuda(), y[: len(exact)], patch)
    assert torch.equal(y[: len(exact)], functional.pad(exact, (0, pitch - exact.shape[1])))
    assert y[len(exact) :].isnan().all()


@pytest.mark.parametrize(("count", "depth"), [(1, 8), (48, 2048), (201, 2048), (3, 8200)])
def test_tokens(count, depth):
    rows, y = random(count, depth, seed=depth, dtype=torch.bfloat16), poisoned(count, depth + GUARD)
    launch.tokens(rows, y[:count, :depth], depth**0.5)
    assert torch.equal(y[:count, :depth], rows.float() * torch.tensor(depth**0.5, dtype=torch.float32))
    assert y[count:].isnan().all() and y[:, depth:].isnan().all()


@pytest.mark.parametrize("activation", ["NONE", "SILU"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("k", "n"), [(32, 1024), (64, 128), (4, 16), (20, 1040)])
@pytest.mark.parametrize("m", [1, 50, 51, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_narrow(dtype, m, k, n, bias, activation):
    x, weight, bias = random(m, k, seed=1), random(k, n, seed=2), random(n, seed=3) if bias else None
    exact = x.double() @ weight.double() + (0 if bias is None else bias.double())
    y = poisoned(m, n, dtype)
    launch.linear_narrow(x, weight, bias, y[:m], activation)
    check(y, functional.silu(exact) if activation == "SILU" else exact)


@pytest.mark.parametrize("m", [1, 50])
def test_linear_narrow_leaves_what_a_norm_wants(m):
    x, weight, y, left = random(m, 32, seed=1), random(32, 1024, seed=2), poisoned(m, 1024), left_for_norm(m, 1024, True)
    launch.linear_narrow(x, weight, None, y[:m], for_norm=left)
    check_left(left, y[:m])


def test_silu_of_extreme_values():
    x = torch.tensor([[-1e4, -100, -88, -30, -20, -10, -3, -1, 0, 1, 3, 10, 20, 30, 100, 1e4]], device="cuda")
    y = poisoned(1, 16)
    launch.linear_narrow(x, torch.eye(16, device="cuda"), None, y[:1], "SILU")
    torch.testing.assert_close(y[:1].double(), functional.silu(x.double()), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("features", ["", "gain", "shift", "gain shift"])
@pytest.mark.parametrize(("depth", "columns"), [(1024, 32), (1024, 16), (72, 64), (1500, 32), (3072, 32)])
@pytest.mark.parametrize("tokens", [1, 50, 51])
def test_flow_step(tokens, depth, columns, features):
    x, weight, bias = random(tokens, depth, seed=1) * 5, random(depth, columns, seed=2), random(columns, seed=3)
    gain, shift = gain_and_shift(features, depth)
    flow = poisoned(tokens, columns)
    flow[:tokens] = before = random(tokens, columns, seed=4)
    launch.flow_step(x, gain, shift, weight, bias, flow[:tokens])
    check(flow, before + normalized(x, gain, shift, center=False) @ weight.double() + bias)


@pytest.mark.parametrize("coefficients", [(1.5, -0.5), (23 / 12, -16 / 12, 5 / 12), (1.0, 0.0)])
@pytest.mark.parametrize(("tokens", "columns"), [(1, 16), (50, 32), (51, 64)])
def test_flow_step_with_a_history(tokens, columns, coefficients):
    """Three steps: what one leaves in the history, the next ones read, and nothing beside it is touched."""
    depth, earlier = 1024, len(coefficients) - 1
    weight, bias = random(depth, columns, seed=2) / 32, random(columns, seed=3)
    flow = poisoned(tokens, columns)
    flow[:tokens] = random(tokens, columns, seed=4)
    history = poisoned(earlier * tokens, columns)
    history[: earlier * tokens] = 0
    exact, changes = flow[:tokens].double(), [torch.zeros(tokens, columns, device="cuda").double()] * earlier
    factors = torch.tensor(coefficients, device="cuda")
    for step in range(3):
        x = random(tokens, depth, seed=10 + step) * 5
        kept = history[: earlier * tokens].view(earlier, tokens, columns)
        launch.flow_step(x, None, None, weight, bias, flow[:tokens], history=kept, coefficients=factors)
        changes = [normalized(x, None, None, center=False) @ weight.double() + bias, *changes]
        exact = exact + sum(b * change for b, change in zip(factors.double(), changes, strict=False))
        check(flow, exact)
        check(history, torch.cat(changes[:earlier]))


@pytest.mark.parametrize("width", [8, 1096, 4096, 16384])
@pytest.mark.parametrize("tokens", [1, 51])
def test_geglu(tokens, width):
    x, y = random(tokens, 2 * width, seed=width, dtype=torch.bfloat16) * 3, poisoned(tokens, width, torch.bfloat16)
    x[0, :4] = torch.tensor([-1e4, -30, 30, 1e4])
    launch.geglu(x, y[:tokens])
    gate, up = x.double().chunk(2, -1)
    exact = functional.gelu(gate, approximate="tanh") * up
    torch.testing.assert_close(y[:tokens].double(), exact, rtol=BF16, atol=1e-12)
    assert y[tokens:].isnan().all()


def dequantized(acc, x_scale, weight_scale, rotation, bias, gate, residual, activation: str) -> torch.Tensor:
    """The definition in float64, after the multiplications that are float32."""
    v = ((acc.float() * weight_scale) * x_scale[:, None]).double()
    if rotation is not None:
        v = torch.einsum("mbi,bij->mbj", v.unflatten(-1, rotation.shape[:2]), rotation.double()).flatten(-2)
    v = v if bias is None else v + bias
    v = v if gate is None else v * gate
    if activation == "GEGLU":
        v, up = v.chunk(2, -1)
        v = functional.gelu(v, approximate="tanh") * up
    v = functional.gelu(v, approximate="tanh") if activation == "GELU" else v
    return v if residual is None else v + residual.double()


@pytest.mark.parametrize("features", ["", "bias", "bias residual", "gate residual"])
@pytest.mark.parametrize("activation", ["NONE", "GELU", "GEGLU"])
@pytest.mark.parametrize("block", [0, 16, 64])
@pytest.mark.parametrize(("m", "n"), [(1, 128), (51, 2560), (7, 6144)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_epilogue(dtype, m, n, block, activation, features):
    generator = torch.Generator("cuda").manual_seed(n)
    acc = torch.randint(-(2**24), 2**24, (m, n), dtype=torch.int32, device="cuda", generator=generator)
    columns = n // 2 if activation == "GEGLU" else n
    operands = {
        "x_scale": random(m, seed=1).abs() * 1e-3,
        "weight_scale": random(n, seed=2).abs() * 1e-4,
        "rotation": torch.linalg.qr(random(n // block, block, block, seed=3))[0].contiguous() if block else None,
        "bias": random(n, seed=4) if "bias" in features else None,
        "gate": random(n, seed=5) if "gate" in features else None,
        "residual": random(m, columns, seed=6, dtype=dtype) if "residual" in features else None,
    }
    y = poisoned(m, columns, dtype)
    launch.epilogue(acc, y=y[:m], activation=activation, **operands)
    check(y, dequantized(acc, **operands, activation=activation))


def test_overlapped_launches_wait_for_their_inputs():
    """A chain through every kernel, each started before the one ahead has ended, gives the same bits."""
    m, k, n = 50, 32, 1024
    weight_in, weight_out = random(k, n, seed=1), random(n // 2, k, seed=2) / n
    bias, gain = random(k, seed=3) / n, 1 + 0.3 * random(n // 2, seed=4)
    outputs = []
    for overlap in (False, True):
        flow, wide, normal = random(m, k, seed=5), poisoned(m, n)[:m], poisoned(m, n, torch.bfloat16)[:m]
        images, patches = (
            wide.view(torch.uint8).flatten()[: 3 * 224**2].view(1, 224, 224, 3),
            poisoned(256, 592, torch.bfloat16)[:256],
        )
        gated, residual = poisoned(m, n // 2, torch.bfloat16)[:m], poisoned(m, n // 2)[:m]
        for _ in range(20):
            launch.linear_narrow(flow, weight_in, None, wide, "SILU", overlap=overlap)
            launch.patches(images, patches, 14, overlap=overlap)
            launch.normalize(wide, normal, center=True, overlap=overlap)
            launch.geglu(normal, gated, overlap=overlap)
            launch.tokens(gated, residual, 3.0, overlap=overlap)
            launch.flow_step(residual, gain, None, weight_out, bias, flow, overlap=overlap)
        outputs.append((flow, patches))
    for ordinary, overlapped in zip(*outputs, strict=True):
        assert ordinary.isfinite().all() and torch.equal(ordinary, overlapped)
