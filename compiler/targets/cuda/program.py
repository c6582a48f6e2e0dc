"""What lowering produces: launches over matrices in device memory, and their form as data in the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from duq.plugins.driver import Shape
from duq.plugins.kernels import KERNELS

BYTES = {"float": 4, "int": 4, "Bf16": 2, "signed char": 1, "unsigned char": 1}  # by the name of the C++ type
ALIGNMENT = 256


@dataclass(eq=False)
class Buffer:
    """A piece of device memory, placed once all launches are known (arena.py).

    persistent: lives through the whole call (inputs, caches). branch: written on the second stream, beside the first.
    """

    name: str
    bytes: int
    persistent: bool = False
    branch: bool = False
    offset: int | None = None


@dataclass(frozen=True)
class Pointer:
    """An address in a buffer; None stands for a null pointer."""

    buffer: Buffer
    offset: int = 0


@dataclass(frozen=True)
class Weight:
    """The address of a weight in the plan; `step_bytes` further for each denoising step (a table of the time)."""

    name: str
    step_bytes: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Float:
    """A float argument; ints are passed as they are."""

    value: float


Argument = Pointer | Weight | Float | int | None


@dataclass(frozen=True)
class Matrix:
    """Activations [rows, columns], a row a token, rows `stride` elements apart."""

    buffer: Buffer
    rows: int
    columns: int
    type: str
    stride: int = 0
    offset: int = 0  # elements

    def __post_init__(self):
        object.__setattr__(self, "stride", self.stride or self.columns)

    @property
    def pointer(self) -> Pointer:
        return Pointer(self.buffer, self.offset * BYTES[self.type])

    def split(self, columns: Sequence[int]) -> list[Matrix]:
        starts = [sum(columns[:index]) for index in range(len(columns))]
        return [
            Matrix(self.buffer, self.rows, width, self.type, self.stride, self.offset + start)
            for width, start in zip(columns, starts)
        ]

    def slice_rows(self, start: int, stop: int) -> Matrix:
        return Matrix(self.buffer, stop - start, self.columns, self.type, self.stride, self.offset + start * self.stride)


@dataclass
class ForNorm:
    """Three last arguments of a launch that writes the residual stream, null unless a norm asks for what they are.

    y: what it writes. Then, once asked for: y * gain in bf16, and of every 16 channels the sum of y^2.
    """

    y: Matrix
    gain: Argument = None
    x: Matrix | None = None
    squares: Matrix | None = None


NO_NORM = (None, None, None)  # those arguments, until a norm asks


@dataclass
class Launch:
    """One kernel, or one call of a library, on the stream.

    name: what it computes, in the checkpoint's words. work: operations of its products. moved: bytes that it has to
    read and write at least, weights included.
    """

    name: str
    source: str
    expression: str
    arguments: list[Argument]
    shape: Shape | None = None
    headers: dict[str, str] = field(default_factory=dict)
    reads: list[Buffer] = field(default_factory=list)
    writes: list[Buffer] = field(default_factory=list)
    branch: bool = False
    wait_for: list[int] = field(
        default_factory=list
    )  # launches of the prefix on other streams; a step's: the first's alone
    overlap: bool = False  # may start before the launch ahead has ended (programmatic dependent launch), unless it waits
    for_norm: ForNorm | None = None
    work: float = 0
    moved: int = 0

    @property
    def waits_itself(self) -> bool:
        """Whether its kernel knows of programmatic dependent launch, as all of ours do."""
        return KERNELS[self.expression.partition("<")[0] or "matmul"].waits


LIBRARY = "cublaslt"  # Launch.source of a matrix product by cuBLASLt; its arguments are named by MATMUL

MATMUL = ("weight", "x", "bias", "addend", "y", "algorithm", "n", "m", "k", "x_stride", "y_stride", "batch",
          "addend_batch_stride", "y_type", "gelu")  # fmt: skip
"""y[m, n] = gelu?(x[m, k] weight[n, k]^T + bias[n]) + addend[m, n]; `batch` products one after the other in x and y.
Operands bf16; y, bias and addend of y_type (bf16 or float), each dense but for the strides given. Sums in float32.
`algorithm` is the place of the one to use in the library's own order of preference."""


def to_json(launch: Launch, kernel: int | None) -> dict:
    """The launch as data. Arguments: ["a", offset in the arena], ["w", weight, bytes a step, offset], ["f", value],
    an int, or null."""
    data = {"name": launch.name, "args": [_argument(each) for each in launch.arguments]}
    if kernel is None:
        data["call"] = launch.source
    else:
        shape = launch.shape
        data |= {"kernel": kernel, "grid": list(shape.grid), "threads": shape.threads, "shared": shape.shared_bytes}
        if shape.cluster != (1, 1, 1):
            data["cluster"] = list(shape.cluster)
    if launch.branch:
        data["branch"] = True
    if launch.wait_for:
        data["wait_for"] = launch.wait_for
    if launch.overlap:
        data["overlap"] = True
    return data | {"work": launch.work, "moved": launch.moved}


def _argument(value: Argument) -> list | int | None:
    if isinstance(value, Pointer):
        return ["a", value.buffer.offset + value.offset]
    if isinstance(value, Weight):
        return ["w", value.name, value.step_bytes, value.offset]
    return ["f", value.value] if isinstance(value, Float) else value
