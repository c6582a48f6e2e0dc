"""What TensorRT's plugins do, without TensorRT: shapes, types, workspace and launches of the duq operators.

plugins/trt.py wraps these classes for TensorRT; tests run them with no TensorRT at all. Each is made from its fields, the
attributes of its ONNX node, which are also what an engine stores. What an operator means is in plugins/ops.py.

    RotateQuantize   stages, source             x, (gain,) and the stages' operands  -> x_q int8, x_scale float32
    W4A8Linear       stages, tile, out_type     x_q, x_scale, weight, weight_scale, the stages' operands -> y

Operands are as in plugins/ops.py, except that the weight is int8 [N, K / 2] from plugins.layout.pack_bitblas, the
permutation int32, and y of the network's float type: the operator's float32 result, rounded once. A further stage of
W4A8Linear, `residual`, adds a tensor like y before that. What computes x is part of RotateQuantize where it can be, in
float32:

    PLAIN       x as it is
    RMS_NORM    x / rms(x) * gain, with gain float32 [K]
    GEGLU       gelu_tanh(gate) * up of x = [gate, up], [.., 2 K]
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from duq.plugins import driver, pointwise
from duq.plugins.bitblas import SYMBOL, Tile
from duq.plugins.errors import KernelError
from duq.plugins.nvrtc import Cubin

FLOATS = ("float", "Half", "Bf16")
SOURCES = ("PLAIN", "RMS_NORM", "GEGLU")
EPSILON = 1e-6  # of RMS_NORM
_STAGE_OPERANDS = {
    "scale": "input_scale",
    "permute": "permutation",
    "hadamard": "hadamard",
    "rotation": "rotation",
    "per_tensor": "activation_scale",
    "output_rotation": "output_rotation",
    "bias": "bias",
    "residual": "residual",
}
_OPERAND_TYPES = {"permutation": "int32", "weight": "int8", "x_q": "int8"}  # of what is not float32


class Tensor(NamedTuple):
    """A tensor of a call: "float", "Half", "Bf16", "int32" or "int8"; and where it is on the device."""

    shape: tuple[int, ...]
    type: str
    address: int = 0

    @property
    def pointer(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.address)


class KernelName(NamedTuple):
    """A kernel as an engine asks for it: its source and its C++ expression, or what BitBLAS made it for."""

    source: str
    expression: str


class Kernels:
    """The kernels of a plan, by name, loaded into the current context when first asked for."""

    def __init__(self, cubins: Mapping[KernelName, Cubin]):
        """cubins: with one kernel each"""
        self._cubins = cubins
        self._loaded: dict[KernelName, driver.Kernel] = {}

    def __getitem__(self, name: KernelName) -> driver.Kernel:
        if name not in self._loaded:
            if name not in self._cubins:
                raise KernelError(f"the plan holds no kernel {name.expression} ({name.source}); compile it again")
            (self._loaded[name],) = driver.load(self._cubins[name]).values()
        return self._loaded[name]


@dataclass(frozen=True)
class RotateQuantize:
    """The prologue of a group of linears."""

    stages: str  # the operator's overload
    source: str = "PLAIN"

    outputs: ClassVar[int] = 2
    fields: ClassVar[tuple[str, ...]] = ("stages", "source")

    @property
    def operands(self) -> list[str]:
        return ["x", *(["gain"] if self.source == "RMS_NORM" else []), *_operands_of(self.stages)]

    @property
    def per_tensor(self) -> bool:
        return "activation_scale" in self.operands

    def output_types(self, types: Sequence[str]) -> list[str]:
        return ["int8", "float"]

    def output_shapes(self, shapes: Sequence[Sequence], halve: Callable = lambda size: size // 2) -> list[list]:
        """Of dimensions of any kind: numbers, or TensorRT's expressions, which know another way to `halve`."""
        (*tokens, width) = shapes[0]
        channels = halve(width) if self.source == "GEGLU" else width
        return [[*tokens, channels], [] if self.per_tensor else [*tokens, 1]]

    def accepts(self, index: int, types: Sequence[str]) -> bool:
        """Whether operand or output `index` may have the type it has, given those before it."""
        names = [*self.operands, "x_q", "x_scale"]
        return types[index] in FLOATS if index == 0 else types[index] == _OPERAND_TYPES.get(names[index], "float")

    def workspace_bytes(self, shapes: Sequence[Sequence[int]]) -> int:
        return 4 * math.prod(shapes[0][:-1]) if self.per_tensor else 0

    def launches(self, inputs: Sequence[Tensor]) -> dict[KernelName, driver.Shape]:
        named = dict(zip(self.operands, inputs))
        (*tokens, _), in_type, _ = named["x"]
        rotation = "NONE"
        if "hadamard" in named:
            rotation = named["hadamard"].shape[0]
        elif "rotation" in named:
            rotation = "DENSE"
        launch = pointwise.rotate_quantize(math.prod(tokens), self._channels(named["x"]), in_type, self.source, rotation)
        return {KernelName(launch.source, launch.expression): launch.shape}

    def _channels(self, x: Tensor) -> int:
        return x.shape[-1] // 2 if self.source == "GEGLU" else x.shape[-1]

    def enqueue(
        self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], workspace: int, stream: int, kernels: Kernels
    ) -> None:
        """Launches on `stream`: nothing is allocated, waited for or copied through the host."""
        named, null = dict(zip(self.operands, inputs)), Tensor((), "float")
        x, (x_q, x_scale) = named["x"], outputs
        matrix = named.get("rotation", null)
        operands = [named.get(name, null) for name in ("gain", "shift", "input_scale", "permutation")]
        operands += [matrix, named.get("activation_scale", null), x_q]
        scales = ctypes.c_void_p(workspace) if self.per_tensor else x_scale.pointer  # the kernel writes one a token
        block = matrix.shape[-1] if matrix.shape else 0
        channels = self._channels(x)
        sizes = [ctypes.c_int(value) for value in (channels, channels, x.shape[-1], block, 0)]
        ((name, shape),) = self.launches(inputs).items()
        arguments = [*(operand.pointer for operand in operands), scales, *sizes, ctypes.c_float(EPSILON)]
        kernels[name].launch(shape, [x.pointer, *arguments], stream)
        if self.per_tensor:
            driver.copy(x_scale.address, named["activation_scale"].address, 4, stream)


@dataclass(frozen=True)
class W4A8Linear:
    """An integer product by a kernel of BitBLAS's, and its epilogue."""

    stages: str
    tile: Tile
    out_type: str  # "float", "Half" or "Bf16"

    outputs: ClassVar[int] = 1
    fields: ClassVar[tuple[str, ...]] = ("stages", "tile", "out_type")

    @property
    def operands(self) -> list[str]:
        return ["x_q", "x_scale", "weight", "weight_scale", *_operands_of(self.stages)]

    def output_types(self, types: Sequence[str]) -> list[str]:
        return [self.out_type]

    def output_shapes(self, shapes: Sequence[Sequence], halve: Callable | None = None) -> list[list]:
        return [[*shapes[0][:-1], shapes[3][0]]]

    def accepts(self, index: int, types: Sequence[str]) -> bool:
        name = [*self.operands, "y"][index]
        return types[index] == (self.out_type if name in ("y", "residual") else _OPERAND_TYPES.get(name, "float"))

    def workspace_bytes(self, shapes: Sequence[Sequence[int]]) -> int:
        """The sums, int32 [M, N]."""
        return 4 * math.prod(shapes[0][:-1]) * shapes[3][0]

    def launches(self, inputs: Sequence[Tensor]) -> dict[KernelName, driver.Shape]:
        (*tokens, k), n = inputs[0].shape, inputs[3].shape[0]
        m = math.prod(tokens)
        epilogue = pointwise.dequantize(m, n, self.out_type, "output_rotation" in self.operands)
        return {
            bitblas_name(n, k, self.tile): self.tile.shape(m, n),
            KernelName(epilogue.source, epilogue.expression): epilogue.shape,
        }

    def enqueue(
        self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], workspace: int, stream: int, kernels: Kernels
    ) -> None:
        named, null = dict(zip(self.operands, inputs)), Tensor((), "float")
        x_q, x_scale, sums = named["x_q"], named["x_scale"], ctypes.c_void_p(workspace)
        m, n = math.prod(x_q.shape[:-1]), named["weight_scale"].shape[0]
        rotation = named.get("output_rotation", null)
        block = rotation.shape[-1] if rotation.shape else 0
        (product, product_shape), (epilogue, epilogue_shape) = self.launches(inputs).items()
        operands = [x_q.pointer, named["weight"].pointer, sums, ctypes.c_int(m)]
        kernels[product].launch(product_shape, operands, stream)
        behind = named.get("bias", null), null, named.get("residual", null)
        operands = [x_scale, named["weight_scale"], rotation, *behind, outputs[0]]
        sizes = [ctypes.c_int(value) for value in (n, int(math.prod(x_scale.shape) > 1), block)]
        kernels[epilogue].launch(epilogue_shape, [sums, *(operand.pointer for operand in operands), *sizes], stream)


Node = RotateQuantize | W4A8Linear
NODES: dict[str, type] = {"RotateQuantize": RotateQuantize, "W4A8Linear": W4A8Linear}


def bitblas_name(n: int, k: int, tile: Tile) -> KernelName:
    depth = f"{tile.warps_m}x{tile.warps_n} warps of {tile.warp_m}x{tile.warp_n}, {tile.stages} stages"
    return KernelName("bitblas", f"{SYMBOL}<{n}, {k}, {depth}{', panels' if tile.panels else ''}>")


def _operands_of(stages: str) -> list[str]:
    return [_STAGE_OPERANDS[stage] for stage in stages.split("+") if stage in _STAGE_OPERANDS]
