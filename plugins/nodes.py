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

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from duq.plugins import driver, kernels
from duq.plugins.bitblas import SYMBOL, Tile
from duq.plugins.errors import KernelError
from duq.plugins.kernel import Instance
from duq.plugins.kernels.bitblas import BITBLAS
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

    def launches(self, inputs: Sequence[Tensor]) -> dict[KernelName, Instance]:
        named = dict(zip(self.operands, inputs, strict=False))
        (*tokens, _), in_type, _ = named["x"]
        rotation: str | int = "NONE"
        if "hadamard" in named:
            rotation = named["hadamard"].shape[0]
        elif "rotation" in named:
            rotation = "DENSE"
        how = kernels.rotate_quantize(math.prod(tokens), self._channels(named["x"]), in_type, self.source, rotation)
        return {KernelName(how.source, how.expression): how}

    def _channels(self, x: Tensor) -> int:
        return x.shape[-1] // 2 if self.source == "GEGLU" else x.shape[-1]

    def enqueue(
        self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], workspace: int, stream: int, loaded: Kernels
    ) -> None:
        """Launches on `stream`: nothing is allocated, waited for or copied through the host."""
        named, (x_q, x_scale) = dict(zip(self.operands, inputs, strict=False)), outputs
        x, channels = named["x"], self._channels(named["x"])
        ((name, how),) = self.launches(inputs).items()
        arguments = how.scalars(
            {
                **_addresses(named, "x", "gain", "input_scale", "permutation", "rotation", "activation_scale"),
                "x_q": x_q.address,
                "x_scale": workspace if self.per_tensor else x_scale.address,  # the kernel writes one a token
                "depth": channels,
                "padded_depth": channels,
                "row_stride": x.shape[-1],
                "block": _block(named.get("rotation")),
                "slab_tokens": 0,
                "epsilon": EPSILON,
            }
        )
        loaded[name].launch(how.shape, arguments, stream)
        if self.per_tensor:
            driver.copy(x_scale.address, named["activation_scale"].address, 4, stream)


@dataclass(frozen=True)
class W4A8Linear:
    """An integer GEMM by a kernel of BitBLAS's, and its epilogue."""

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
        """The accumulators, int32 [M, N]."""
        return 4 * math.prod(shapes[0][:-1]) * shapes[3][0]

    def launches(self, inputs: Sequence[Tensor]) -> dict[KernelName, Instance]:
        (*tokens, k), n = inputs[0].shape, inputs[3].shape[0]
        m = math.prod(tokens)
        epilogue = kernels.epilogue(m, n, self.out_type, "output_rotation" in self.operands)
        return {
            bitblas_name(n, k, self.tile): BITBLAS.instance(self.tile.shape(m, n)),
            KernelName(epilogue.source, epilogue.expression): epilogue,
        }

    def enqueue(
        self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], workspace: int, stream: int, loaded: Kernels
    ) -> None:
        """Launches on `stream`; the accumulators are in the workspace."""
        named, (y,) = dict(zip(self.operands, inputs, strict=False)), outputs
        x_q, x_scale, n = named["x_q"], named["x_scale"], named["weight_scale"].shape[0]
        (gemm_name, gemm), (epilogue_name, epilogue) = self.launches(inputs).items()
        accumulate = {**_addresses(named, "x_q", "weight"), "y": workspace, "tokens": math.prod(x_q.shape[:-1])}
        loaded[gemm_name].launch(gemm.shape, gemm.scalars(accumulate), stream)
        rotation = named.get("output_rotation")
        finish = {
            **_addresses(named, "x_scale", "weight_scale", "bias", "residual"),
            "acc": workspace,
            "rotation": rotation and rotation.address,
            "y": y.address,
            "rows": n,
            "scale_stride": int(math.prod(x_scale.shape) > 1),
            "block": _block(rotation),
        }
        loaded[epilogue_name].launch(epilogue.shape, epilogue.scalars(finish), stream)


Node = RotateQuantize | W4A8Linear
NODES: dict[str, type[RotateQuantize] | type[W4A8Linear]] = {"RotateQuantize": RotateQuantize, "W4A8Linear": W4A8Linear}


def bitblas_name(n: int, k: int, tile: Tile) -> KernelName:
    depth = f"{tile.warps_m}x{tile.warps_n} warps of {tile.warp_m}x{tile.warp_n}, {tile.stages} stages"
    return KernelName("bitblas", f"{SYMBOL}<{n}, {k}, {depth}{', panels' if tile.panels else ''}>")


def _addresses(operands: Mapping[str, Tensor], *names: str) -> dict[str, int]:
    """The addresses of those operands that there are."""
    return {name: operands[name].address for name in names if name in operands}


def _block(rotation: Tensor | None) -> int:
    """The block size of a dense rotation [blocks, block, block]; 0 without one."""
    return rotation.shape[-1] if rotation is not None else 0


def _operands_of(stages: str) -> list[str]:
    return [_STAGE_OPERANDS[stage] for stage in stages.split("+") if stage in _STAGE_OPERANDS]
