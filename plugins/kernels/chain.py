"""Kernels that follow each other, as one launch: chain.cu."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from duq.plugins.kernel import Instance, Kernel, Shape
from duq.plugins.kernels.attention_split import ATTENTION_SPLIT
from duq.plugins.kernels.gemm_float import GEMM_FLOAT
from duq.plugins.kernels.gemm_small import GEMM_SMALL
from duq.plugins.kernels.reference import Launched, Pointer
from duq.plugins.kernels.rotate_quantize import ROTATE_QUANTIZE
from duq.plugins.nvrtc import SOURCES

CHAINABLE = {each.name: each for each in (ATTENTION_SPLIT, GEMM_FLOAT, GEMM_SMALL, ROTATE_QUANTIZE)}
"""The kernels that may be parts, by name: those of the action expert's layers on GPUs without programmatic launch."""
STATIC_BYTES = 1024  # of shared memory, at most, that the parts have beside their dynamic one
_OF_A_PART = {
    "__global__": "__device__ __forceinline__",
    "__launch_bounds__(...)": "",
    "blockIdx": "of_chain.block",
    "gridDim": "of_chain.blocks",
    "blockDim": "of_chain.threads",
}


def chain(parts: Sequence[Instance], residents: int = 1) -> Instance:
    """The launch of `parts` one after the other; its arguments are theirs, by `names_of`, and `links` and `stale_links`.

    residents: blocks that a multiprocessor has registers for.
    """
    threads, shared_bytes = (max(getattr(each.shape, name) for each in parts) for name in ("threads", "shared_bytes"))
    shape = Shape((sum(map(_blocks, parts)), 1, 1), threads, shared_bytes)
    template = {f"PART{number}": _spelled(part) for number, part in enumerate(parts)}
    parameters = [
        f"{part.type_of(name)} {argument}{'?' * parameter.optional}"
        for number, part in enumerate(parts)
        for argument, (name, parameter) in zip(names_of(number, part), part.kernel.parameters.items(), strict=True)
    ]
    kernel = Kernel(
        "chain.cu",
        "chain",
        ", ".join(f"class {name}" for name in template),
        ", ".join([*parameters, "int* links", "int* stale_links"]),
        reference,
    )
    sources = dict.fromkeys(part.source for part in parts)
    headers = {"parts.cuh": _text(parts, kernel, threads, residents, list(sources))}
    headers |= {source: (SOURCES / source).read_text() for source in sources}
    return kernel.instance(shape, headers, **template)


def names_of(number: int, part: Instance) -> list[str]:
    """What a chain calls the arguments of its part `number`, in their order."""
    return [f"part{number}_{name}" for name in part.kernel.parameters]


def _blocks(part: Instance) -> int:
    return math.prod(part.shape.grid)


def _spelled(part: Instance) -> str:
    return f"Part<{part.expression}, {', '.join(map(str, (*part.shape.grid, part.shape.threads)))}>"


def _text(parts: Sequence[Instance], kernel: Kernel, threads: int, residents: int, sources: Sequence[str]) -> str:
    """parts.cuh: the parts' kernels as functions, which find their place in the launch in `place`; and the chain of them."""
    lines = ["#undef __global__", "#undef __launch_bounds__"]
    lines += [f"#define {name} {meaning}" for name, meaning in _OF_A_PART.items()]
    lines += [f'#include "{source}"' for source in sources]
    lines += [f"#undef {name.partition('(')[0]}" for name in _OF_A_PART]
    parameters = ", ".join(f"{each.type} {name}" for name, each in kernel.parameters.items())
    lines += [
        "template <class... PARTS>",
        f"__attribute__((global)) void __attribute__((launch_bounds({threads}, {residents}))) chain({parameters}) {{",
        "  int block = blockIdx.x;",
        f"  if (block == 0 && threadIdx.x < {len(parts)}) stale_links[threadIdx.x] = 0;",
    ]
    for number, part in enumerate(parts):
        ahead = f"links + {number - 1}, {_blocks(parts[number - 1])}" if number else "nullptr, 0"
        lines += [
            f"  if (block < {_blocks(part)}) {{",
            f"    if (!enter({_spelled(part)}(), block, {ahead})) return;",
            f"    {part.expression}({', '.join(names_of(number, part))});",
            f"    leave(links + {number});",
            "    return;",
            "  }",
            f"  block -= {_blocks(part)};",
        ]
    return "\n".join([*lines, "}", ""])


class Part(NamedTuple):
    """A part as the expression of a chain spells it."""

    kernel: Kernel
    launched: Launched


def parts_of(template: Mapping[str, str]) -> list[Part]:
    """The parts of a chain, by its template arguments as C++ spells them."""
    parts = []
    for spelled in template.values():
        found = re.fullmatch(r"Part<(\w+)<(.*)>, (\d+), (\d+), (\d+), (\d+)>", spelled)
        assert found, spelled
        kernel, (x, y, z, threads) = CHAINABLE[found[1]], map(int, found.groups()[2:])
        arguments = dict(zip(kernel.template, found[2].split(", "), strict=True))
        parts.append(Part(kernel, Launched(kernel.name, arguments, (x, y, z), threads)))
    return parts


def reference(launch: Launched, links: Pointer, stale_links: Pointer, **arguments: Any) -> None:
    """One part after the other; each has its own counter, and those of the launch ahead are cleared."""
    raise NotImplementedError
