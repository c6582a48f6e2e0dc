"""The launch IR: buffers in device memory, matrices in them, weights in the plan, and launches of kernels over these.

Everything here is data. `bind` makes launches, `plan_memory` and `plan_streams` read them, `emit` writes them out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from duq.plugins.kernel import Instance

BYTES = {"float": 4, "int": 4, "Bf16": 2, "signed char": 1, "unsigned char": 1}  # by the C++ type
ALIGNMENT = 256


@dataclass(eq=False)
class Buffer:
    """A piece of device memory. persistent: it lives through the whole call (inputs, caches, workspaces)."""

    name: str
    bytes: int
    persistent: bool = False


@dataclass(frozen=True)
class Pointer:
    """An address in a buffer, of elements of the C++ `type`."""

    buffer: Buffer
    type: str
    offset: int = 0  # bytes


@dataclass(frozen=True)
class Weight:
    """The address of a weight in the plan, of elements of the C++ `type`; `step_bytes` further in each denoising step."""

    name: str
    type: str
    step_bytes: int = 0


Argument = Pointer | Weight | float | int | None  # None: a null pointer


@dataclass(frozen=True)
class Matrix:
    """Activations [rows, columns], a row a token, rows `stride` elements apart."""

    buffer: Buffer
    rows: int
    columns: int
    type: str
    stride: int = 0
    offset: int = 0  # elements

    def __post_init__(self) -> None:
        object.__setattr__(self, "stride", self.stride or self.columns)

    @property
    def is_dense(self) -> bool:
        return self.stride == self.columns

    @property
    def pointer(self) -> Pointer:
        return Pointer(self.buffer, self.type, self.offset * BYTES[self.type])

    def split(self, columns: Sequence[int]) -> list[Matrix]:
        starts = [sum(columns[:index]) for index in range(len(columns))]
        return [
            Matrix(self.buffer, self.rows, width, self.type, self.stride, self.offset + start)
            for width, start in zip(columns, starts, strict=True)
        ]

    def slice_rows(self, start: int, stop: int) -> Matrix:
        return Matrix(self.buffer, stop - start, self.columns, self.type, self.stride, self.offset + start * self.stride)


Arguments = dict[str, Matrix | Argument]  # of a launch, by name, before matrices become their addresses


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel, or one call of a library, on a stream.

    name: in the checkpoint's words. arguments: by the kernel's names, in its order. branch: on the second stream of the
    prefix. work: operations of its multiplications; moved: bytes that it reads and writes at least, weights included.
    """

    name: str
    instance: Instance
    arguments: Mapping[str, Argument]
    reads: Sequence[Buffer]
    writes: Sequence[Buffer]
    branch: bool = False
    work: float = 0.0
    moved: int = 0

    def __str__(self) -> str:
        shape = self.instance.shape
        where = f"{shape.grid} x {shape.threads}" if shape is not None else self.instance.source
        arguments = ", ".join(f"{name}={_shown(value)}" for name, value in self.arguments.items())
        return f"{'branch ' if self.branch else ''}{self.name}: {self.instance.expression} [{where}] ({arguments})"


@dataclass(frozen=True, eq=False)
class Chain:
    """Launches `first` to `last` of a step, each as it stands, made as the one launch of `instance` (plugins/kernels/chain.py).

    links: its counters, and stale_links those of the chain ahead of it, which it clears.
    """

    first: int
    last: int
    instance: Instance
    links: Pointer
    stale_links: Pointer


@dataclass
class Program:
    """All launches of a call with `cameras` images and a prompt of at most `prompt` tokens.

    step: of each denoising step. inputs: what the host fills. zeroed: workspaces, zero before the first launch and left so by
    each. outputs: what the prefix computes, and the launch after which it is there. chains: of each step, in order.
    """

    cameras: int
    prompt: int
    prefix: list[Launch]
    step: list[Launch]
    inputs: list[Buffer]
    zeroed: list[Buffer]
    outputs: dict[str, tuple[Matrix, int]]
    chains: Sequence[Chain] = ()

    @property
    def launches(self) -> list[Launch]:
        return [*self.prefix, *self.step]

    @property
    def kernels(self) -> list[Instance]:
        """What is compiled for it, of each launch and chain."""
        instances = [*(each.instance for each in self.launches), *(each.instance for each in self.chains)]
        return [each for each in instances if not each.kernel.is_library]


@dataclass(frozen=True)
class Streams:
    """By launch: the launches of the prefix on other streams that it waits for, and whether it may start early."""

    waits: Mapping[Launch, list[int]] = field(default_factory=dict)
    overlaps: frozenset[Launch] = frozenset()


@dataclass(frozen=True)
class Memory:
    """The place of every buffer in one arena."""

    offsets: Mapping[Buffer, int]
    arena_bytes: int


def bytes_of(matrices: Iterable[Matrix]) -> int:
    return sum(each.rows * each.columns * BYTES[each.type] for each in matrices)


def _shown(value: Argument) -> str:
    if isinstance(value, Pointer):
        return f"{value.buffer.name}+{value.offset}" if value.offset else value.buffer.name
    return value.name if isinstance(value, Weight) else str(value)
