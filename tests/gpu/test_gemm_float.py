"""The float GEMM for small M, with the norm before it and every epilogue, against float64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from duq.plugins.kernels import GemmFloat
from duq.plugins.layout import interleave_gate_up, interleave_rotary, pack_int4_fragments
from duq.plugins.tactics import best_float
from tests.support import launch

GUARD = 8  # rows past the last token: poisoned in x, to be left alone in y
HEADS, DIMS = 8, 256
SPLITS = [1, 2, 3, 4, 8]


def tactics_for(m: int) -> list[GemmFloat]:
    """Tiles of all kinds; tokens in one block or, of more than 32, in two; K split over a cluster or in memory."""
    gpu, tokens8 = launch.gpu(), -(-m // 8)
    tiles = [(1, tokens8, 4, 3), (2, tokens8, 4, 2), (2, min(tokens8, 4), 8, 1), (4, tokens8, 4, 1), (1, tokens8, 8, 1)]
    tactics = [GemmFloat(*tile, split) for tile, split in zip(tiles, SPLITS, strict=True)]
    return [tactic for tactic in tactics if tactic.shape(m, 64).shared_bytes <= gpu.block_shared_bytes]


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, math.nan, dtype=dtype, device="cuda")


def operands(m: int, n: int, k: int, seed: int = 0) -> SimpleNamespace:
    """All that a GEMM may be given. x [m, k] and the squares are made from a `stream`, rows of all sizes in front of rows
    of NaN, as its writer would; accumulators are O(1)."""
    generator = torch.Generator("cuda").manual_seed(seed)
    randn = lambda *shape: torch.randn(shape, device="cuda", generator=generator)  # noqa: E731
    stream, gain = poisoned(m + GUARD, k, dtype=torch.float32), 1 + 0.3 * randn(k)
    stream[:m] = randn(m, k) * (0.5 + torch.rand(m, 1, device="cuda", generator=generator))
    stream[m // 2] = 0  # epsilon keeps it finite
    return SimpleNamespace(
        stream=stream[:m],
        x=(stream * gain).bfloat16()[:m],
        squares=left_squares(stream)[:m],
        weight=(randn(n, k) / math.sqrt(k)).bfloat16(),
        channel_scale=1 + 0.3 * randn(n),
        bias=randn(n),
        residual=randn(m, n),
    )


def left_squares(stream: torch.Tensor) -> torch.Tensor:
    """Of every 16 channels the sum of squares; the channels behind the last 16 are left out."""
    return stream[:, : stream.shape[1] // 16 * 16].unflatten(1, (-1, 16)).square().sum(-1)


def definition(o: SimpleNamespace, norm: bool, features: str, epsilon: float) -> torch.Tensor:
    """y before the last step, in float64."""
    y = o.x.double() @ o.weight.double().T
    if norm:
        y = y * torch.rsqrt(o.stream.double().pow(2).mean(-1, keepdim=True) + epsilon)
    y = y * o.channel_scale if "scale" in features else y
    return y + o.bias if "bias" in features else y


def chosen(o: SimpleNamespace, features: str) -> dict:
    names = {"norm": "squares", "scale": "channel_scale", "bias": "bias", "residual": "residual"}
    return {name: getattr(o, name) for feature, name in names.items() if feature in features}


def check(y: torch.Tensor, expected: torch.Tensor):
    tolerance = {"rtol": 2e-5, "atol": 2e-5} if y.dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-4}
    torch.testing.assert_close(y.double(), expected, **tolerance)


BF16, FLOAT = torch.bfloat16, torch.float32


@pytest.mark.parametrize("features", ["", "scale bias", "scale bias residual", "norm", "norm scale bias residual"])
@pytest.mark.parametrize("dtype", [BF16, FLOAT], ids=str)
@pytest.mark.parametrize("m", [1, 7, 50, 64])
def test_product_is_the_definition(m, dtype, features):
    n, k = 192, 1088 if "norm" in features else 1040  # the last chunk is not whole, and some warps have none
    o = operands(m, n, k)
    expected = definition(o, "norm" in features, features, 1e-6)
    expected = expected + o.residual if "residual" in features else expected
    packed = launch.pack_float_weight(o.weight)
    for tactic in tactics_for(m):
        y = poisoned(m + GUARD, n, dtype=dtype)
        launch.gemm_float(tactic, o.x, packed, y, n=n, **chosen(o, features))
        check(y[:m], expected)
        assert y[m:].isnan().all()


@pytest.mark.parametrize("features", ["scale", "scale bias residual", "norm scale"])
@pytest.mark.parametrize("dtype", [BF16, FLOAT], ids=str)
@pytest.mark.parametrize("m", [1, 7, 50, 64])
def test_int4_weight(m, dtype, features):
    n, k = 192, 1088 if "norm" in features else 1040
    o = operands(m, n, k)
    integers = torch.randint(-8, 8, (n, k), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    o.weight, o.channel_scale = integers.cuda().bfloat16(), o.channel_scale / (5 * math.sqrt(k))
    expected = definition(o, "norm" in features, features, 1e-6)
    expected = expected + o.residual if "residual" in features else expected
    packed = torch.from_numpy(pack_int4_fragments(integers.numpy())).cuda()
    for tactic in tactics_for(m):
        y = poisoned(m + GUARD, n, dtype=dtype)
        launch.gemm_float(tactic, o.x, packed, y, n=n, bits=4, **chosen(o, features))
        check(y[:m], expected)
        assert y[m:].isnan().all()


@pytest.mark.parametrize("epilogue", ["GEGLU", "SILU"])
def test_int4_weight_with_an_activation(epilogue):
    m, n, k, tactic = 50, 256, 1024, GemmFloat(2, 7, 8, 1)
    o = operands(m, n, k)
    integers = torch.randint(-8, 8, (n, k), generator=torch.Generator().manual_seed(1), dtype=torch.int8).numpy()
    scale = torch.rand(n, device="cuda") / math.sqrt(k)
    expected = (o.x.double() @ torch.from_numpy(integers).cuda().double().T) * scale
    if epilogue == "GEGLU":
        gate, up = expected.chunk(2, -1)
        expected = torch.nn.functional.gelu(gate, approximate="tanh") * up
        integers = interleave_gate_up(*integers.reshape(2, n // 2, k))
        scale = torch.from_numpy(interleave_gate_up(*scale.cpu().numpy().reshape(2, n // 2))).cuda()
    else:
        expected = torch.nn.functional.silu(expected)
    y = poisoned(m + GUARD, expected.shape[1], dtype=FLOAT)
    packed = torch.from_numpy(pack_int4_fragments(integers)).cuda()
    launch.gemm_float(tactic, o.x, packed, y, n=n, bits=4, epilogue=epilogue, channel_scale=scale)
    check(y[:m], expected)


@pytest.mark.parametrize(("n", "k"), [(16, 16), (1152, 4304), (2560, 2048), (48, 80)])
def test_dequantize_weight(n, k):
    integers = torch.randint(-8, 8, (n, k), generator=torch.Generator().manual_seed(k), dtype=torch.int8)
    scale, y = torch.rand(n, device="cuda"), poisoned(n + GUARD, k, dtype=BF16)
    launch.dequantize_weight(torch.from_numpy(pack_int4_fragments(integers.numpy())).cuda(), scale, y[:n])
    assert torch.equal(y[:n], (integers.cuda().float() * scale[:, None]).bfloat16()) and y[n:].isnan().all()


def left_for_norm(m: int, n: int, gain: bool) -> launch.ForNorm:
    """Where a launch leaves it, poisoned."""
    x, squares = poisoned(m + GUARD, n, dtype=BF16), poisoned(m + GUARD, n // 16, dtype=FLOAT)
    return launch.ForNorm(x, 1 + 0.3 * torch.randn(n, device="cuda") if gain else None, squares)


def check_left(left: launch.ForNorm, y: torch.Tensor) -> None:
    """Of y [m, n], in whose rows it was computed."""
    m = len(y)
    scaled = y if left.gain is None else y * left.gain
    assert torch.equal(left.x[:m], scaled.bfloat16()) and left.x[m:].isnan().all()
    torch.testing.assert_close(left.squares[:m], left_squares(y), rtol=1e-5, atol=0)
    assert left.squares[m:].isnan().all()


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("m", [1, 50, 64])
def test_what_is_left_for_a_norm(m, gain):
    n, k = 192, 1024
    o = operands(m, n, k)
    packed = launch.pack_float_weight(o.weight)
    for tactic in tactics_for(m):
        y, left = poisoned(m + GUARD, n, dtype=FLOAT), left_for_norm(m, n, gain)
        launch.gemm_float(tactic, o.x, packed, y, n=n, residual=o.residual, for_norm=left)
        check(y[:m], definition(o, False, "", 0) + o.residual)
        check_left(left, y[:m])


@pytest.mark.parametrize("split", SPLITS)
def test_residual_in_place_and_the_same_again(split):
    m, n, k, tactic = 50, 256, 1024, GemmFloat(2, 7, 4, 2, split)
    o = operands(m, n, k)
    packed, outputs = launch.pack_float_weight(o.weight), []
    for _ in range(3):
        y = poisoned(m + GUARD, n, dtype=torch.float32)
        y[:m] = o.residual
        launch.gemm_float(tactic, o.x, packed, y, n=n, residual=y)
        outputs.append(y[:m])
        assert y[m:].isnan().all()
    check(outputs[0], definition(o, False, "", 0) + o.residual)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize(("epilogue", "dtype"), [("SILU", FLOAT), ("GEGLU", FLOAT), ("GEGLU", BF16)], ids=str)
@pytest.mark.parametrize("m", [1, 50])
def test_activations(m, epilogue, dtype):
    n, k = 256, 512
    o = operands(m, n, k)
    y = definition(o, True, "scale bias", 1e-6)
    if epilogue == "GEGLU":
        gate, up = y.chunk(2, -1)
        expected = torch.nn.functional.gelu(gate, approximate="tanh") * up
        for name in ("weight", "channel_scale", "bias"):
            value = getattr(o, name)
            halves = value.float().cpu().numpy().reshape(2, n // 2, -1)
            setattr(o, name, torch.from_numpy(interleave_gate_up(*halves)).reshape(value.shape).to(value))
    else:
        expected = torch.nn.functional.silu(y)
    width = expected.shape[1]
    packed = launch.pack_float_weight(o.weight)
    for tactic in tactics_for(m):
        y = poisoned(m + GUARD, width + 16, dtype=dtype)  # rows further apart than they are long
        features = chosen(o, "norm scale bias")
        launch.gemm_float(tactic, o.x, packed, y[:, :width], n=n, epilogue=epilogue, **features)
        check(y[:m, :width], expected)
        assert y[m:].isnan().all() and y[:, width:].isnan().all()


def turned(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """[m, heads, DIMS], a pair c, c + DIMS / 2 at a time."""
    first, second = heads.chunk(2, -1)
    c, s = cosine.double()[:, None], sine.double()[:, None]
    return torch.cat([first * c - second * s, second * c + first * s], -1)


@pytest.mark.parametrize("to_cache", [False, True])
@pytest.mark.parametrize("past", [None, 5])
@pytest.mark.parametrize("m", [1, 7, 50, 64])
def test_rotary(m, past, to_cache):
    n, k, first_position = (HEADS + 2) * DIMS, 256, 3
    o = operands(m, n, k)
    cosine, sine = tables = launch.rotary_tables(128, DIMS)
    start = first_position + (past or 0)
    angles = cosine[start : start + m], sine[start : start + m]
    heads = definition(o, True, "bias", 1e-6).unflatten(-1, (HEADS + 2, DIMS))
    expected_q, expected_k = turned(heads[:, :HEADS], *angles).flatten(-2), turned(heads[:, HEADS:-1], *angles)[:, 0]
    for name in ("weight", "bias"):
        value = getattr(o, name)
        rows = torch.from_numpy(interleave_rotary(value.float().cpu().numpy(), DIMS))
        setattr(o, name, rows.to(value))
    packed = launch.pack_float_weight(o.weight)
    past_tokens = None if past is None else torch.tensor([past], dtype=torch.int32, device="cuda")
    for tactic in tactics_for(m):
        q = poisoned(m + GUARD, HEADS * DIMS + 8, dtype=torch.bfloat16)
        cache = poisoned(128, 2 * DIMS, dtype=torch.bfloat16)
        launch.gemm_float(
            tactic, o.x, packed, q, cache[:, :DIMS], cache[:, DIMS:], n=n, squares=o.squares, epilogue="ROTARY",
            bias=o.bias, tables=tables, past=past_tokens, first_position=first_position, to_cache=to_cache,
        )  # fmt: skip
        check(q[:m, : HEADS * DIMS], expected_q)
        assert q[m:].isnan().all() and q[:, HEADS * DIMS :].isnan().all()
        row = start if to_cache else 0
        check(cache[row : row + m, :DIMS], expected_k)
        check(cache[row : row + m, DIMS:], heads[:, -1])
        assert cache[:row].isnan().all() and cache[row + m :].isnan().all()


@pytest.mark.parametrize("m", [1, 50, 51, 64])
@pytest.mark.parametrize(("n", "k"), [(2560, 1024), (1024, 2048), (1024, 1024), (8192, 1024), (1024, 4096)])
def test_best_tactic_at_full_size(n, k, m):
    o = operands(m, n, k)
    y = poisoned(m + GUARD, n, dtype=torch.float32)
    tactic = best_float(m, n, k, launch.gpu())
    packed = launch.pack_float_weight(o.weight)
    launch.gemm_float(tactic, o.x, packed, y, n=n, residual=o.residual)
    check(y[:m], definition(o, False, "", 0) + o.residual)
    assert y[m:].isnan().all()
