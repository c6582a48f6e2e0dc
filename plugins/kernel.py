"""A CUDA kernel, described once: for those that launch it, time it, emulate it and check it.

Each file of plugins/kernels describes the kernels of one source in plugins/cuda: a `Kernel` with the C++ signature, how an
`Instance` for given sizes is launched, and what it computes, in numpy. Whoever launches one names its arguments:

    normalize(tokens=50, depth=1024, ...).bind(x=x, gain=None, y=y, depth=1024, ...)
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

from duq.plugins.errors import KernelError
from duq.plugins.gpu import Gpu

T = TypeVar("T")
_SCALARS: Mapping[str, type] = {"int": ctypes.c_int, "float": ctypes.c_float}


@dataclass(frozen=True)
class Shape:
    """How a kernel is launched: thread blocks, threads a block, dynamic shared memory, blocks a cluster.

    a_multiprocessor: of persistent blocks, which take their work in turn: so many run at once on a multiprocessor, and more
    are not launched (`Instance.on`). 0: each block has work of its own.
    """

    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int = 0
    cluster: tuple[int, int, int] = (1, 1, 1)
    a_multiprocessor: int = 0

    def on(self, gpu: Gpu) -> Shape:
        """The same on a GPU: without clusters where it has none, and no more persistent blocks than it runs at once."""
        (x, y, z), most = self.grid, self.a_multiprocessor * gpu.multiprocessors
        return replace(
            self,
            grid=(min(x, most), y, z) if most else self.grid,
            cluster=self.cluster if gpu.has_clusters else (1, 1, 1),
        )


class Code(NamedTuple):
    """What is compiled for an instance, as a key: instances that differ in nothing but their launch share it."""

    source: str
    expression: str
    headers: tuple[tuple[str, str], ...] = ()  # name and text


@dataclass(frozen=True)
class Parameter:
    """One parameter: `type` as in C++ ("const In*", "int"), where In may be a template parameter."""

    name: str
    type: str
    optional: bool = False  # a pointer that may be null

    @property
    def is_pointer(self) -> bool:
        return self.type.endswith("*")

    @property
    def element(self) -> str:
        """What a pointer points to, without const."""
        return self.type.removeprefix("const ").removesuffix("*").strip()


class Kernel:
    """One __global__ function of plugins/cuda/<source>, or a function of a library, whose name `source` then is.

    template: its template parameters, as in C++, "class In, int VECTORS"; "" for a function that is none.
    parameters: as in C++, with a "?" after the name of a pointer that may be null. tests/plugins/test_kernels.py compares
    both with the source.
    reference: what it computes, in numpy; takes a `Launched` (plugins/kernels/reference.py) and the arguments by name.
    waits: whether it waits itself for the kernel ahead (programmatic dependent launch); without, it must not overlap it.
    """

    def __init__(
        self, source: str, name: str, template: str, parameters: str, reference: Callable[..., None], waits: bool = True
    ):
        self.source, self.name, self.reference, self.waits = source, name, reference, waits
        self.template = tuple(each.split()[-1] for each in template.split(",") if each.strip())
        self.template_declaration = " ".join(template.split())
        self.parameters = {each.name: each for each in map(_parameter, parameters.split(","))}

    def __repr__(self) -> str:
        return f"{self.source}:{self.name}"

    @property
    def is_library(self) -> bool:
        """Whether it is a function of a library, which is called; a kernel is launched."""
        return not self.source.endswith(".cu")

    def instance(self, shape: Shape, headers: Mapping[str, str] | None = None, **template: str | int | bool) -> Instance:
        """The instance for template arguments by name, launched in `shape`."""
        if set(template) != set(self.template):
            raise KernelError(f"{self}: template parameters are {', '.join(self.template)}, not {', '.join(template)}")
        return Instance(self, shape, {name: template[name] for name in self.template}, dict(headers or {}))


@dataclass(frozen=True)
class Instance:
    """A kernel with its template arguments, and the shape of one launch; `headers` are generated for it (name -> text).

    shape: an empty grid for a function of a library, which is called and not launched.
    """

    kernel: Kernel
    shape: Shape
    template: Mapping[str, str | int | bool] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def source(self) -> str:
        return self.kernel.source

    @property
    def expression(self) -> str:
        """As C++ names it, `normalize<Bf16, float, true, 1>`."""
        if not self.template:
            return self.kernel.name
        return f"{self.kernel.name}<{', '.join(map(_spelled, self.template.values()))}>"

    @property
    def code(self) -> Code:
        return Code(self.source, self.expression, tuple(self.headers.items()))

    def on(self, gpu: Gpu) -> Instance:
        """The same instance as `gpu` launches it."""
        return replace(self, shape=self.shape.on(gpu))

    def type_of(self, name: str) -> str:
        """The C++ type of a parameter with the template arguments in it: "const Bf16*"."""
        declared = self.kernel.parameters[name].type
        return re.sub(r"\w+", lambda word: str(self.template.get(word[0], word[0])), declared)

    def element_of(self, name: str) -> str:
        """What the pointer `name` points to: "Bf16"."""
        return Parameter(name, self.type_of(name)).element

    def bind(self, **values: T) -> dict[str, T]:
        """The arguments in the kernel's order. Each pointer that may be null can be left out.

        Raises KernelError for a name that is unknown or missing, and for a value whose `.type` (the C++ type of what it
        points to, where it has one) is not the parameter's.
        """
        parameters = self.kernel.parameters
        if unknown := [name for name in values if name not in parameters]:
            raise KernelError(f"{self.expression} has no parameter {', '.join(unknown)}")
        bound: dict[str, Any] = {}
        for name, parameter in parameters.items():
            value = values.get(name)
            if value is None and not parameter.optional:
                raise KernelError(f"{self.expression} needs {name}")
            self._check_type(parameter, value)
            bound[name] = value
        return bound

    def _check_type(self, parameter: Parameter, value: object) -> None:
        declared, pointed_to = self.type_of(parameter.name), getattr(value, "type", None)
        if pointed_to is None:
            wrong = parameter.type == "int" and isinstance(value, float)
        else:
            wrong = not parameter.is_pointer or self.element_of(parameter.name) not in (pointed_to, "void")
        if wrong:
            found = f"{value!r}" if pointed_to is None else f"a pointer to {pointed_to}"
            raise KernelError(f"{self.expression} takes {parameter.name} as {declared}, not {found}")

    def scalars(self, values: Mapping[str, int | float | None]) -> list[Any]:
        """Addresses (None: null) and numbers, by name, as ctypes in the kernel's order: what a launch takes."""
        bound = self.bind(**values)
        return [as_scalar(self.kernel.parameters[name].type, value) for name, value in bound.items()]


def as_scalar(kind: str, value: int | float | None) -> Any:
    """An argument of the C++ type `kind` as ctypes."""
    return ctypes.c_void_p(int(value or 0)) if kind.endswith("*") else _SCALARS[kind](value)


def _parameter(text: str) -> Parameter:
    kind, _, name = text.strip().rpartition(" ")
    return Parameter(name.removesuffix("?"), kind.strip(), name.endswith("?"))


def _spelled(value: str | int | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
