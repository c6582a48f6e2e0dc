"""The CUDA kernels against the operators' definitions: the GEMMs bit for bit, the prologue up to rounding ties."""

from __future__ import annotations

import math

import pytest
import torch

from duq.plugins import tactics
from duq.plugins.layout import activation_slabs, interleave_gate_up
from duq.plugins.tactics import Large, Small, Wgmma, WgmmaSmall, best
from tests.gpu.test_gemm_float import check_left, left_for_norm
from tests.support import launch

TACTICS = [
    Small(1, 7, 4, 4),
    Small(1, 8, 8, 2, split=2),
    Small(2, 7, 4, 2),
    Small(2, 7, 8, 1, split=4),
    Small(4, 8, 4, 2),
    Small(1, 8, 2, 2),
    Small(1, 8, 1, 2),
    Large(4, 8, 4, 2, 3),
    Large(2, 13, 2, 2, 3),
    Large(2, 10, 4, 2, 3),
    Wgmma(2, 26, 3),
    Wgmma(2, 24, 3),
    WgmmaSmall(8, 8, 1),
    WgmmaSmall(8, 6, 2),
    WgmmaSmall(8, 8, 4),
    WgmmaSmall(8, 4, 1, split=4),
    WgmmaSmall(8, 4, 2, split=8),
    Wgmma(2, 26, 5, split=2),
    Wgmma(1, 20, 5, split=2),
    Wgmma(1, 20, 4),
]
GUARD = 8  # rows of y past the last token, which must stay as they are


def operands(m: int, n: int, k: int, bits: int):
    """Values over the whole range, the extremes included, and the exact accumulators."""
    generator = torch.Generator("cuda").manual_seed(m * n + k + bits)
    low = -(2 ** (bits - 1))
    x_q = torch.randint(-128, 128, (m, k), dtype=torch.int8, device="cuda", generator=generator)
    weight = torch.randint(low, -low, (n, k), dtype=torch.int8, device="cuda", generator=generator)
    x_q[0], weight[0], weight[1] = -128, low, -low - 1  # the largest accumulators
    exact = x_q.double() @ weight.double().T  # below 2^53, hence exact
    return x_q, weight, exact


def poisoned(m: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((m + GUARD, n), 0x7FFFFFFF if dtype == torch.int32 else math.nan, dtype=dtype, device="cuda")


def run(tactic, bits: int, x_q, weight, y, scales=None, bias=None, residual=None, workspace=None, **settings):
    (m, k), n = x_q.shape, weight.shape[0]
    x_scale, weight_scale = scales or (torch.ones(m, device="cuda"), torch.ones(n, device="cuda"))
    packed, x = launch.pack_weight(weight, tactic, bits), launch.arrange_activations(x_q, tactic)
    tensors = x, x_scale, packed, weight_scale, bias, residual, y, workspace
    launch.gemm(tactic, bits, *tensors, n=n, k=k, **settings)
    torch.cuda.synchronize()


def fits(tactic, m: int, n: int, k: int, bits: int) -> bool:
    return tactics.fits(tactic, m, n, k, bits, launch.gpu())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("m", [1, 50, 131])
@pytest.mark.parametrize("tactic", TACTICS, ids=str)
def test_integer_sums_are_exact(tactic, m, bits):
    n, k = 512, 2304  # an odd number of K steps
    if not fits(tactic, m, n, k, bits):
        pytest.skip("the tactic does not fit this GPU")
    x_q, weight, exact = operands(m, n, k, bits)
    y = poisoned(m, n, torch.int32)
    run(tactic, bits, x_q, weight, y)
    torch.testing.assert_close(y[:m].double(), exact, rtol=0, atol=0)
    assert (y[m:] == 0x7FFFFFFF).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("extras", ["", "bias", "residual", "bias residual", "in place"])
@pytest.mark.parametrize(
    "tactic",
    [
        Small(2, 7, 4, 2),
        Small(1, 7, 4, 2, split=4),
        Large(4, 8, 4, 2, 3),
        Wgmma(2, 26, 3),
        Wgmma(2, 14, 3),
        WgmmaSmall(8, 4, 2, split=4),
    ],
    ids=str,
)
def test_epilogue_is_the_definition_in_float32(tactic, extras, dtype):
    m, n, k = 51, 256, 1024
    if not fits(tactic, m, n, k, 4):
        pytest.skip("the tactic does not fit this GPU")
    x_q, weight, exact = operands(m, n, k, 4)
    x_scale, weight_scale = torch.rand(m, device="cuda") * 1e-2, torch.rand(n, device="cuda") * 1e-2
    bias = torch.randn(n, device="cuda") if "bias" in extras else None
    y = poisoned(m, n, dtype)
    residual = None
    if "residual" in extras:
        residual = torch.randn(m, n, device="cuda").to(dtype)
    elif "in place" in extras:
        y[:m] = torch.randn(m, n, device="cuda").to(dtype)
        residual = y[:m].clone()
    expected = (exact.float() * weight_scale) * x_scale[:, None]
    expected = expected if bias is None else expected + bias
    expected = expected if residual is None else expected + residual.float()
    run(tactic, 4, x_q, weight, y, (x_scale, weight_scale), bias, y if "in place" in extras else residual)
    torch.testing.assert_close(y[:m], expected.to(dtype), rtol=0, atol=0)
    assert y[m:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("m", [50, 209])
@pytest.mark.parametrize(
    "tactic",
    [
        Small(2, 7, 4, 2),
        Small(1, 8, 8, 2, split=2),
        Large(4, 8, 4, 2, 3),
        Large(2, 13, 2, 2, 3),
        Wgmma(2, 26, 3),
        Wgmma(2, 26, 5, split=2),
        WgmmaSmall(8, 4, 2),
        WgmmaSmall(8, 4, 1, split=4),
    ],
    ids=str,
)
def test_geglu_epilogue(tactic, m, dtype):
    n, k = 512, 1024
    if not fits(tactic, m, n, k, 4):
        pytest.skip("the tactic does not fit this GPU")
    x_q, weight, exact = operands(m, n, k, 4)
    x_scale, weight_scale = torch.rand(m, device="cuda") * 1e-2, torch.rand(n, device="cuda") * 1e-2
    gate, up = ((exact.float() * weight_scale) * x_scale[:, None]).double().chunk(2, -1)
    expected = torch.nn.functional.gelu(gate, approximate="tanh") * up
    weight, weight_scale = (
        torch.from_numpy(interleave_gate_up(*v.cpu().numpy().reshape(2, n // 2, -1))).cuda() for v in (weight, weight_scale)
    )
    y = poisoned(m, n // 2, dtype)
    run(tactic, 4, x_q, weight, y, (x_scale, weight_scale.flatten()), epilogue="GEGLU")
    tolerance = 2e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(y[:m].double(), expected, rtol=tolerance, atol=1e-12)
    assert y[m:].isnan().all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "tactic",
    [Small(1, 7, 4, 2, split=4), Large(4, 8, 4, 2, 3), Wgmma(2, 26, 3), Wgmma(2, 26, 5, split=2), WgmmaSmall(8, 4, 2)],
    ids=str,
)
def test_gelu_epilogue(tactic, dtype, bias):
    m, n, k = 51, 256, 1024
    if not fits(tactic, m, n, k, 4):
        pytest.skip("the tactic does not fit this GPU")
    x_q, weight, exact = operands(m, n, k, 4)
    x_scale, weight_scale = torch.rand(m, device="cuda") * 1e-2, torch.rand(n, device="cuda") * 1e-2
    bias = torch.randn(n, device="cuda") if bias else None
    v = (exact.float() * weight_scale) * x_scale[:, None]
    expected = torch.nn.functional.gelu((v if bias is None else v + bias).double(), approximate="tanh")
    y = poisoned(m, n, dtype)
    run(tactic, 4, x_q, weight, y, (x_scale, weight_scale), bias, epilogue="GELU")
    tolerance = 2e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(y[:m].double(), expected, rtol=tolerance, atol=1e-12)
    assert y[m:].isnan().all()


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("tactic", TACTICS, ids=str)
def test_what_is_left_for_a_norm(tactic, gain):
    m, n, k = 51, 256, 1024
    if not fits(tactic, m, n, k, 4):
        pytest.skip("the tactic does not fit this GPU")
    x_q, weight, _ = operands(m, n, k, 4)
    scales = torch.rand(m, device="cuda") * 1e-2, torch.rand(n, device="cuda") * 1e-2
    y, left = poisoned(m, n, torch.float32), left_for_norm(m, n, gain)
    run(tactic, 4, x_q, weight, y, scales, residual=torch.randn(m, n, device="cuda"), for_norm=left)
    check_left(left, y[:m])


@pytest.mark.parametrize("bits", [4, 8])
def test_split_k_without_clusters(bits):
    """The path of SM 80, 86 and 89: integer atomics in a workspace, which is left zero for the next launch."""
    m, n, k, tactic = 50, 256, 2048, Small(2, 7, 4, 2, split=4)
    x_q, weight, exact = operands(m, n, k, bits)
    workspace = torch.zeros((8 * tactic.tokens8 + 1) * n, dtype=torch.int32, device="cuda")
    for _ in range(3):
        y = poisoned(m, n, torch.int32)
        run(tactic, bits, x_q, weight, y, options=("-DNO_CLUSTER",), workspace=workspace)
        torch.testing.assert_close(y[:m].double(), exact, rtol=0, atol=0)
        assert not workspace.any()


EXPERT = [(2560, 1024), (1024, 2048), (8192, 1024), (1024, 4096)]
PREFIX = [(2560, 2048), (2048, 2048), (32768, 2048), (2048, 16384)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(m, *shape) for m in (50, 51) for shape in EXPERT] + [(m, *shape) for m in (306, 562, 816, 818) for shape in PREFIX],
)
def test_best_tactic_is_exact_at_full_size(m, n, k, bits):
    x_q, weight, exact = operands(m, n, k, bits)
    y = poisoned(m, n, torch.int32)
    run(best(m, n, k, bits, launch.gpu()), bits, x_q, weight, y)
    assert torch.equal(y[:m].double(), exact)
    assert (y[m:] == 0x7FFFFFFF).all()


# The prologue


def hadamard_matrix(size: int) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix.cuda() / math.sqrt(size)


def definition(x, source, hadamard, gain, shift, input_scale, permutation, rotation):
    """x' of the RotateQuantize operator, behind its source, in float64."""
    x = x.double()
    if source == "LAYER_NORM":
        x = x - x.mean(-1, keepdim=True)
    if source in ("RMS_NORM", "LAYER_NORM"):
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    elif source == "GEGLU":
        gate, up = x.chunk(2, -1)
        x = torch.nn.functional.gelu(gate, approximate="tanh") * up
    x = x if gain is None else x * gain
    x = x if shift is None else x + shift
    x = x if input_scale is None else x * input_scale
    x = x if permutation is None else x[:, permutation.long()]
    if hadamard:
        x = (x.unflatten(-1, (-1, hadamard)) @ hadamard_matrix(hadamard)).flatten(-2)
    if rotation is not None:
        x = torch.einsum("mbi,bij->mbj", x.unflatten(-1, rotation.shape[:2]), rotation.double()).flatten(-2)
    return x


def check_quantized(x_q, ratio):
    """x_q is ratio rounded; off by one at most, and only within 1e-3 of a tie."""
    expected = ratio.round().clamp(-128, 127)
    wrong = x_q.double() != expected
    tie = ((ratio - ratio.floor()) - 0.5).abs() < 1e-3
    assert ((x_q.double() - expected).abs() <= 1).all() and (tie | ~wrong).all(), f"{int(wrong.sum())} differ"
    assert wrong.float().mean() < 1e-3


FEATURES = ["", "gain", "gain shift", "input_scale", "permutation", "gain shift input_scale permutation", "static"]


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("rotate", [0, 16, 32, 64, 128, "dense"])
@pytest.mark.parametrize("source", ["PLAIN", "RMS_NORM", "LAYER_NORM", "GEGLU"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rotate_quantize(dtype, source, rotate, features):
    generator = torch.Generator("cuda").manual_seed(1)
    randn = lambda *shape: torch.randn(shape, device="cuda", generator=generator)  # noqa: E731
    m, k = 51, 1152
    x = (randn(m, 2 * k if source == "GEGLU" else k) * 3).to(dtype)
    x[:, 7] *= 40  # an outlier channel
    stages = {
        "gain": 1 + 0.3 * randn(k) if "gain" in features else None,
        "shift": randn(k) if "shift" in features else None,
        "input_scale": randn(k).exp() if "input_scale" in features else None,
        "permutation": torch.randperm(k, device="cuda", generator=generator).int() if "permutation" in features else None,
        "rotation": torch.linalg.qr(randn(k // 32, 32, 32))[0].contiguous() if rotate == "dense" else None,
    }
    hadamard = 0 if rotate == "dense" else rotate
    x_prime = definition(x, source, hadamard, **stages)
    scale = x_prime.abs().amax(-1).clamp(min=1e-12) / 127
    static = (scale.mean() / 2).float() if "static" in features else None
    x_q, x_scale = (
        torch.full((m + GUARD, k), 85, dtype=torch.int8, device="cuda"),
        torch.full((m,), math.nan, device="cuda"),
    )
    launch.rotate_quantize(x, x_q, x_scale, source=source, hadamard=hadamard, activation_scale=static, **stages)
    torch.testing.assert_close(x_scale.double(), scale if static is None else static.double().expand(m), rtol=2e-6, atol=0)
    check_quantized(x_q[:m], x_prime / (scale[:, None] if static is None else static.double()))
    assert (x_q[m:] == 85).all()


@pytest.mark.parametrize("features", ["", "gate", "gain", "gate gain shift"])
@pytest.mark.parametrize(("m", "k", "parts", "rotate"), [(50, 1024, 8, 64), (51, 264, 2, 0), (1, 4096, 1, 128)])
def test_residual_quantize(m, k, parts, rotate, features):
    """The residual stream is the sum in this order, and its integers those of rotate_quantize, bit for bit."""
    generator = torch.Generator("cuda").manual_seed(m)
    randn = lambda *shape: torch.randn(shape, device="cuda", generator=generator)  # noqa: E731
    x, added = randn(m, k), randn(parts, m, k)
    factors = {name: randn(k) if name in features else None for name in ("gate", "gain", "shift")}
    norm = {name: factors[name] for name in ("gain", "shift")}
    y = poisoned(m, k, torch.float32)
    x_q, x_scale = (
        torch.full((m + GUARD, k), 85, dtype=torch.int8, device="cuda"),
        torch.full((m,), math.nan, device="cuda"),
    )
    launch.residual_quantize(x, added, y[:m], x_q, x_scale, hadamard=rotate, **factors)
    total = added[0].clone()
    for part in added[1:]:
        total += part
    if factors["gate"] is None:
        assert torch.equal(y[:m], x + total)
    else:
        torch.testing.assert_close(y[:m].double(), x + total.double() * factors["gate"], rtol=1e-6, atol=1e-6)
    of_y, scale_of_y = torch.empty_like(x_q[:m]), torch.empty_like(x_scale)
    launch.rotate_quantize(y[:m], of_y, scale_of_y, source="RMS_NORM", hadamard=rotate, **norm)
    assert torch.equal(x_q[:m], of_y) and torch.equal(x_scale, scale_of_y)
    assert y[m:].isnan().all() and (x_q[m:] == 85).all()

    in_place, slabs = x.clone(), torch.zeros(-(-k // 128), 64, 128, dtype=torch.int8, device="cuda")
    if k % 128 == 0:
        launch.residual_quantize(in_place, added, in_place, slabs, x_scale, hadamard=rotate, slab_tokens=64, **factors)
        assert torch.equal(in_place, y[:m]) and torch.equal(x_scale, scale_of_y)
        assert (slabs.cpu().numpy() == activation_slabs(of_y.cpu().numpy(), 64)).all()


@pytest.mark.parametrize("m", [131, 816])
@pytest.mark.parametrize("k", [1024, 3072, 16384])
def test_hadamard_quantize(k, m):
    generator, block = torch.Generator("cuda").manual_seed(4), 208
    x = torch.randn(m, k + 64, device="cuda", generator=generator).bfloat16()[
        :, :k
    ]  # rows further apart than they are long
    x[:, 7] *= 40  # an outlier channel
    x[5] = 0
    x_prime = definition(x, "PLAIN", 64, *[None] * 5)
    scale = x_prime.abs().amax(-1).clamp(min=1e-12) / 127
    x_q = torch.full((m + GUARD, k), 85, dtype=torch.int8, device="cuda")
    slabs = torch.zeros(k // 128, -(-m // block) * block, 128, dtype=torch.int8, device="cuda")
    x_scale = torch.full((m,), math.nan, device="cuda")
    launch.hadamard_quantize(x, x_q, x_scale)
    torch.testing.assert_close(x_scale.double(), scale, rtol=2e-6, atol=0)
    check_quantized(x_q[:m], x_prime / scale[:, None])
    assert (x_q[m:] == 85).all()
    launch.hadamard_quantize(x, slabs, x_scale, slab_tokens=slabs.shape[1])
    assert torch.equal(slabs.cpu(), torch.from_numpy(activation_slabs(x_q[:m].cpu().numpy(), block)))


@pytest.mark.parametrize("k", [1024, 2048, 4096, 16384])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_plain_quantization_is_exact(dtype, k):
    """With no reduction but the maximum, the same float32 arithmetic gives the same integers."""
    x = torch.randn(50, k, device="cuda", generator=torch.Generator("cuda").manual_seed(2)).to(dtype)
    x[3] = 0
    x_q, x_scale = torch.empty(50, k, dtype=torch.int8, device="cuda"), torch.empty(50, device="cuda")
    launch.rotate_quantize(x, x_q, x_scale)
    x = x.cpu().float()  # torch on the GPU multiplies by 1 / 127 instead
    scale = x.abs().amax(-1).clamp(min=1e-12) / 127
    assert torch.equal(x_scale.cpu(), scale)
    assert torch.equal(x_q.cpu(), (x / scale[:, None]).round().clamp(-128, 127).to(torch.int8))


@pytest.mark.parametrize("rotate", [0, 16, "dense"])
@pytest.mark.parametrize("source", ["PLAIN", "LAYER_NORM"])
@pytest.mark.parametrize(("k", "padded", "slab_tokens"), [(144, 192, 0), (144, 256, 56), (4304, 4352, 0), (4304, 4352, 56)])
def test_channels_beyond_the_last_are_zeros(k, padded, slab_tokens, source, rotate):
    """The same integers as without them, and poison beside x is not read."""
    m = 51
    x = torch.full((m, k + GUARD), math.nan, device="cuda")[:, :k]
    x[:] = torch.randn(m, k, device="cuda", generator=torch.Generator("cuda").manual_seed(k)) + 3
    shift = torch.randn(k, device="cuda") if source == "LAYER_NORM" else None
    rotation = torch.linalg.qr(torch.randn(k // 16, 16, 16, device="cuda"))[0].contiguous() if rotate == "dense" else None
    settings = dict(source=source, hadamard=0 if rotate == "dense" else rotate, rotation=rotation, shift=shift)
    rows, scales = torch.empty(m, k, dtype=torch.int8, device="cuda"), torch.empty(2, m, device="cuda")
    launch.rotate_quantize(x, rows, scales[0], **settings)
    wide = torch.full(
        (padded // 128, slab_tokens, 128) if slab_tokens else (m, padded), 85, dtype=torch.int8, device="cuda"
    )
    launch.rotate_quantize(x, wide, scales[1], padded=padded, slab_tokens=slab_tokens, **settings)
    expected = torch.nn.functional.pad(rows, (0, padded - k)).cpu()
    if slab_tokens:
        wide, expected = wide[:, :m], torch.from_numpy(activation_slabs(expected.numpy(), slab_tokens))[:, :m]
    assert torch.equal(wide.cpu(), expected) and torch.equal(scales[0], scales[1])


@pytest.mark.parametrize("rotate", [64, "dense"])
@pytest.mark.parametrize("source", ["PLAIN", "RMS_NORM", "LAYER_NORM"])
def test_rotation_for_products_of_floats(source, rotate):
    m, k = 51, 1152
    x, gain = (
        torch.randn(m, k, device="cuda", generator=torch.Generator("cuda").manual_seed(1)),
        torch.rand(k, device="cuda"),
    )
    rotation = torch.linalg.qr(torch.randn(k // 16, 16, 16, device="cuda"))[0].contiguous() if rotate == "dense" else None
    hadamard = 0 if rotate == "dense" else rotate
    y = torch.full((m + GUARD, k), math.nan, dtype=torch.bfloat16, device="cuda")
    launch.rotate_quantize(x, y[:m], None, source=source, hadamard=hadamard, gain=gain, rotation=rotation)
    exact = definition(x, source, hadamard, gain, None, None, None, rotation)
    torch.testing.assert_close(y[:m].double(), exact, rtol=2**-8, atol=1e-5)
    assert y[m:].isnan().all()


def test_slabs():
    """The same integers, in the order that the wgmma kernel reads; rows of padding are not written."""
    m, k, block = 51, 2048, 104
    x = torch.randn(m, k, device="cuda", generator=torch.Generator("cuda").manual_seed(3)).bfloat16()
    rows, scale = torch.empty(m, k, dtype=torch.int8, device="cuda"), torch.empty(m, device="cuda")
    slabs = torch.zeros(k // 128, block, 128, dtype=torch.int8, device="cuda")
    launch.rotate_quantize(x, rows, scale, hadamard=64, source="RMS_NORM")
    launch.rotate_quantize(x, slabs, scale, hadamard=64, source="RMS_NORM", slab_tokens=block)
    assert torch.equal(slabs.cpu(), torch.from_numpy(activation_slabs(rows.cpu().numpy(), block)))
