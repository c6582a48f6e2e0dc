"""Kernels that follow each other, as one launch: chain.cu."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from duq.plugins.errors import KernelError
from duq.plugins.gpu import Gpu
from duq.plugins.kernel import Instance, Kernel, Shape
from duq.plugins.kernels.attention_split import ATTENTION_SPLIT
from duq.plugins.kernels.gemm_float import GEMM_FLOAT
from duq.plugins.kernels.gemm_small import GEMM_SMALL
from duq.plugins.kernels.reference import Launched
from duq.plugins.kernels.rotate_quantize import ROTATE_QUANTIZE
from duq.plugins.nvrtc import SOURCES

CHAINABLE = (ATTENTION_SPLIT, GEMM_FLOAT, GEMM_SMALL, ROTATE_QUANTIZE)  # the kernels of the action expert's layers
CHAIN_THREADS = 256  # of a part's block, at most
STATIC_BYTES = 1024  # of shared memory, at most, that the parts have beside their dynamic one
RESERVED_BYTES = 1024  # of a multiprocessor's shared memory, that a thread block takes beside its own
MOST_PARTS = 16  # their arguments fit into the 4 KB of a launch

# What the parts' sources mean by these: they become functions, whose place in the launch is `of_chain`.
_OF_A_PART = {
    "__global__": "__device__ __forceinline__",
    "__launch_bounds__(...)": "",
    "blockIdx": "of_chain.block",
    "gridDim": "of_chain.blocks",
    "blockDim": "of_chain.threads",
}


def fits(part: Instance, gpu: Gpu) -> bool:
    """Whether it can be a part of a chain on a GPU."""
    shape = part.shape
    return (
        part.kernel in CHAINABLE
        and shape.threads <= CHAIN_THREADS
        and shape.shared_bytes + STATIC_BYTES <= gpu.block_shared_bytes
    )


def residents(parts: Sequence[Instance], gpu: Gpu) -> int:
    """Blocks that a multiprocessor is to have registers for: two where it has shared memory for them, so that those of the
    next part are there before they are needed."""
    shared_bytes = max(part.shape.shared_bytes for part in parts) + STATIC_BYTES + RESERVED_BYTES
    return 2 if 2 * shared_bytes <= gpu.shared_bytes else 1


def chain(parts: Sequence[Instance], residents: int) -> Instance:
    """The launch of `parts` one after the other. Its arguments are theirs, in their order, as `names_of` calls them, and then
    `links` and `stale_links`, int32 [parts] each.

    residents: blocks that a multiprocessor has registers for. Raises KernelError for a kernel that cannot be a part.
    """
    if len(parts) > MOST_PARTS or not all(part.kernel in CHAINABLE for part in parts):
        raise KernelError(f"no chain of {', '.join(part.kernel.name for part in parts)}")
    parameters = [
        f"{part.type_of(name)} {argument}{'?' * parameter.optional}"
        for number, part in enumerate(parts)
        for argument, (name, parameter) in zip(names_of(number, part), part.kernel.parameters.items(), strict=True)
    ]
    kernel = Kernel("chain.cu", "chain", "", ", ".join([*parameters, "int* links", "int* stale_links"]), reference)
    sources = dict.fromkeys(part.source for part in parts)
    headers = {source: (SOURCES / source).read_text() for source in sources}
    headers["parts.cuh"] = _text(parts, kernel, residents, list(sources))
    blocks, shared_bytes = sum(map(_blocks, parts)), max(part.shape.shared_bytes for part in parts)
    return kernel.instance(Shape((blocks, 1, 1), _threads(parts), shared_bytes), headers)


def names_of(number: int, part: Instance) -> list[str]:
    """What a chain calls the arguments of its part `number`, in their order."""
    return [f"part{number}_{name}" for name in part.kernel.parameters]


def _blocks(part: Instance) -> int:
    return math.prod(part.shape.grid)


def _threads(parts: Sequence[Instance]) -> int:
    return max(part.shape.threads for part in parts)


def _text(parts: Sequence[Instance], kernel: Kernel, residents: int, sources: Sequence[str]) -> str:
    """parts.cuh: the sources of the parts, and the kernel, whose blocks call them."""
    lines = ["#undef __global__", "#undef __launch_bounds__"]
    lines += [f"#define {name} {meaning}" for name, meaning in _OF_A_PART.items()]
    lines += [f'#include "{source}"' for source in sources]
    lines += [f"#undef {name.partition('(')[0]}" for name in _OF_A_PART]
    parameters = ", ".join(f"{each.type} {name}" for name, each in kernel.parameters.items())
    lines += [
        f"__attribute__((global)) void __attribute__((launch_bounds({_threads(parts)}, {residents}))) chain({parameters}) {{",
        "  int block = blockIdx.x;",
        f"  if (block == 0 && threadIdx.x < {len(parts)}) stale_links[threadIdx.x] = 0;",
    ]
    for number, part in enumerate(parts):
        ahead = f"links + {number - 1}, {_blocks(parts[number - 1])}" if number else "nullptr, 0"
        shape = ", ".join(map(str, (*part.shape.grid, part.shape.threads)))
        lines += [
            f"  if (block < {_blocks(part)}) {{",
            f"    if (!enter<{shape}>(block, {ahead})) return;",
            f"    {part.expression}({', '.join(names_of(number, part))});",
            f"    leave(links + {number});",
            "    return;",
            "  }",
            f"  block -= {_blocks(part)};",
        ]
    return "\n".join([*lines, "}", ""])


def reference(launch: Launched, **arguments: Any) -> None:
    """What its parts compute one after the other; a schedule has each of them as a launch too, and that is what is emulated."""
    raise KernelError(f"{launch.kernel}: its parts have references")
