"""TensorRT's plugins on a GPU that TensorRT-RTX does not serve: this file plays the host.

It makes each plugin from its stored fields, asks it for types, shapes and workspace, and enqueues it while a CUDA graph
records, with bare addresses; the buffers have guards on both sides. Results are compared with the operators' definitions:
integers and dequantized accumulators bit for bit. Kernels are those that a plan for SM 86 holds, compiled for the GPU at
hand.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from duq.plugins import bitblas, trt
from duq.plugins.bitblas import Tile
from duq.plugins.gpu import gpu_of
from duq.plugins.layout import pack_bitblas
from duq.plugins.nodes import Kernels, RotateQuantize, Tensor, W4A8Linear
from duq.plugins.nvrtc import compile_cubin
from tests.gpu.test_bitblas_kernels import operands
from tests.gpu.test_kernels import check_quantized, definition, hadamard_matrix
from tests.support import launch

TORCH = {"float": torch.float32, "Half": torch.float16, "Bf16": torch.bfloat16, "int8": torch.int8, "int32": torch.int32}
NAMES = {dtype: name for name, dtype in TORCH.items()}
GUARD = 256  # bytes on each side of a buffer


class Guarded:
    """A device buffer between two guards, filled with a pattern that no kernel may rely on."""

    def __init__(self, shape, dtype: torch.dtype):
        self.size = math.prod(shape) * dtype.itemsize
        self.bytes = torch.full((self.size + 2 * GUARD,), 0xA5, dtype=torch.uint8, device="cuda")
        self.value = self.bytes[GUARD : GUARD + self.size].view(dtype).view(shape)

    @property
    def address(self) -> int:
        return self.bytes.data_ptr() + GUARD

    def check(self) -> None:
        assert (self.bytes[:GUARD] == 0xA5).all() and (self.bytes[GUARD + self.size :] == 0xA5).all(), "wrote beside it"


def host(op: str, node, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """What TensorRT does with a plugin of a stored engine."""
    stored = {name: value for name, value in trt.attributes(node).items() if not name.startswith("plugin_")}
    fields = [SimpleNamespace(name=name, data=v.encode() if isinstance(v, str) else v) for name, v in stored.items()]
    plugin = trt.from_fields(op, fields)
    assert plugin == node

    types, shapes = [NAMES[each.dtype] for each in inputs], [tuple(each.shape) for each in inputs]
    out_types, out_shapes = plugin.output_types(types), plugin.output_shapes(shapes)
    assert all(plugin.accepts(i, types + out_types) for i in range(len(types) + len(out_types)))
    outputs = [Guarded(shape, TORCH[name]) for shape, name in zip(out_shapes, out_types, strict=True)]
    workspace = Guarded((plugin.workspace_bytes(shapes),), torch.uint8)

    tensors = [Tensor(*each, value.data_ptr()) for *each, value in zip(shapes, types, inputs, strict=True)]
    results = [
        Tensor(tuple(shape), name, each.address) for shape, name, each in zip(out_shapes, out_types, outputs, strict=True)
    ]
    kernels = Kernels({name: cubin(name, plugin) for name in plugin.launches(tensors)})
    for name in plugin.launches(tensors):
        kernels[name]  # loading is not for a stream that records
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plugin.enqueue(tensors, results, workspace.address, torch.cuda.current_stream().cuda_stream, kernels)
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    for buffer in (*outputs, workspace):
        buffer.check()
    return [each.value for each in outputs]


def cubin(name, plugin):
    sm = launch.compute_capability()
    if name.source != "bitblas":
        return compile_cubin(name.source, sm, [name.expression])
    n, k = map(int, name.expression.split("<")[1].split(",")[:2])
    return bitblas.compile_kernel(bitblas.sources([(n, k, plugin.tile)], 86)[0], sm)


LINEARS = [(1, 512, 1024), (50, 2560, 1024), (131, 1024, 2048)]  # M, N, K


@pytest.mark.parametrize("float_type", ["float", "Half", "Bf16"])
@pytest.mark.parametrize("scale", ["per token", "per tensor"])
@pytest.mark.parametrize("stages", ["plain", "bias", "residual", "bias+residual"])
@pytest.mark.parametrize(("m", "n", "k"), LINEARS)
def test_linear_is_the_definition_bit_for_bit(m, n, k, stages, scale, float_type):
    x_q, weight, exact = operands(m, n, k)
    x_scale = torch.rand((m, 1) if scale == "per token" else (), device="cuda") * 1e-2
    weight_scale, bias = torch.rand(n, device="cuda") * 1e-2, torch.randn(n, device="cuda")
    packed = torch.from_numpy(pack_bitblas(weight.cpu().numpy())).view(torch.int8).cuda()
    residual = torch.randn(1, m, n, device="cuda").to(TORCH[float_type])
    extra = [{"bias": bias, "residual": residual}[stage] for stage in stages.split("+") if stage != "plain"]
    node = W4A8Linear(stages, bitblas.best(m, n, k, gpu_of(86)), float_type)
    scales = x_scale.view(1, m, 1) if x_scale.dim() else x_scale
    (y,) = host("W4A8Linear", node, [x_q.view(1, m, k), scales, packed, weight_scale, *extra])
    expected = (exact.float() * weight_scale) * x_scale
    expected = expected + bias if "bias" in stages else expected
    expected = (expected + residual[0].float() if "residual" in stages else expected).to(TORCH[float_type])
    assert y.shape == (1, m, n) and torch.equal(y[0], expected)


@pytest.mark.parametrize("stages", ["output_rotation", "output_rotation+bias"])
@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize(("m", "n", "k"), LINEARS)
def test_linear_with_output_rotation(m, n, k, block, stages):
    x_q, weight, exact = operands(m, n, k)
    x_scale, weight_scale = torch.rand(m, 1, device="cuda") * 1e-2, torch.rand(n, device="cuda") * 1e-2
    rotation, bias = torch.randn(n // block, block, block, device="cuda"), torch.randn(n, device="cuda")
    packed = torch.from_numpy(pack_bitblas(weight.cpu().numpy())).view(torch.int8).cuda()
    extra = [rotation, bias] if "bias" in stages else [rotation]
    node = W4A8Linear(stages, bitblas.best(m, n, k, gpu_of(86)), "float")
    (y,) = host("W4A8Linear", node, [x_q, x_scale, packed, weight_scale, *extra])
    scaled = ((exact.float() * weight_scale) * x_scale).double().view(m, -1, block)
    expected = torch.einsum("mbi,bij->mbj", scaled, rotation.double()).reshape(m, n)
    expected = expected + bias if "bias" in stages else expected
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4 * float(scaled.abs().max()))


STAGES = ["", "scale", "permute", "scale+permute"]


@pytest.mark.parametrize("float_type", ["float", "Half", "Bf16"])
@pytest.mark.parametrize("scale", ["per_token", "per_tensor"])
@pytest.mark.parametrize("rotate", ["", "hadamard", "rotation"])
@pytest.mark.parametrize("stages", STAGES)
def test_prologue_is_the_definition(stages, rotate, scale, float_type):
    m, k, block = 51, 2048, 64
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(m, k, device="cuda", generator=generator).to(TORCH[float_type])
    named = {
        "scale": torch.rand(k, device="cuda", generator=generator) + 0.5,
        "permute": torch.randperm(k, device="cuda", generator=generator).to(torch.int32),
        "hadamard": hadamard_matrix(block).float(),
        "rotation": torch.linalg.qr(torch.randn(k // block, block, block, device="cuda", generator=generator))[
            0
        ].contiguous(),
        "per_tensor": torch.tensor(0.02, device="cuda"),
    }
    overload = "+".join(stage for stage in (stages, rotate, scale) if stage)
    operands_of = [named[stage] for stage in overload.split("+") if stage in named]
    x_q, x_scale = host("RotateQuantize", RotateQuantize(overload), [x.view(1, m, k), *operands_of])
    x_q, given = x_q[0], {stage: named[stage] for stage in overload.split("+") if stage in named}
    hadamard = block if rotate == "hadamard" else 0
    stages = given.get("scale"), given.get("permute"), given.get("rotation")
    expected = definition(x, "PLAIN", hadamard, None, None, *stages)
    if scale == "per_tensor":
        assert x_scale.shape == () and torch.equal(x_scale, named["per_tensor"])
    else:
        assert x_scale.shape == (1, m, 1)
        torch.testing.assert_close(x_scale[0].double(), expected.abs().amax(-1, keepdim=True) / 127, rtol=2e-6, atol=0)
    if rotate:
        check_quantized(x_q, expected / x_scale.view(-1, 1).double())
    else:  # nothing but float32 operations of one rounding each
        ratio = x.float() * given.get("scale", torch.ones((), device="cuda"))
        ratio = ratio[:, given["permute"].long()] if "permute" in given else ratio
        assert torch.equal(x_q.float(), (ratio / x_scale.view(-1, 1)).round().clamp(-128, 127))


@pytest.mark.parametrize("float_type", ["float", "Half", "Bf16"])
@pytest.mark.parametrize("m", [1, 50])
@pytest.mark.parametrize("source", ["RMS_NORM", "GEGLU"])
def test_prologue_with_its_source(source, m, float_type):
    k, generator = 2048, torch.Generator("cuda").manual_seed(0)
    width = 2 * k if source == "GEGLU" else k
    x = torch.randn(m, width, device="cuda", generator=generator).to(TORCH[float_type])
    gain = [torch.rand(k, device="cuda", generator=generator)] if source == "RMS_NORM" else []
    node = RotateQuantize("hadamard+per_token", source)
    x_q, x_scale = host("RotateQuantize", node, [x.view(1, m, width), *gain, hadamard_matrix(64).float()])
    expected = definition(x, source, 64, *(gain or [None]), None, None, None, None)
    assert x_q.shape == (1, m, k) and x_scale.shape == (1, m, 1)
    torch.testing.assert_close(x_scale[0].double(), expected.abs().amax(-1, keepdim=True) / 127, rtol=1e-5, atol=0)
    check_quantized(x_q[0], expected / x_scale[0].double())


def test_a_missing_kernel_is_named():
    with pytest.raises(trt.KernelError, match="compile it again"):
        Kernels({})[bitblas_name()]


def bitblas_name():
    (name, _) = W4A8Linear("plain", Tile(1, 2, 32, 32, 2, True), "float").launches(
        [Tensor((1, 256), "int8"), Tensor((1, 1), "float"), Tensor((64, 128), "int8"), Tensor((64,), "float")]
    )
    return name
