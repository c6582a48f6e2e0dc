"""Machine code, and PTX, for the instances of the kernels that launches need."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from duq.plugins.gpu import Gpu
from duq.plugins.kernel import Code
from duq.plugins.nvrtc import Cubin, compile_cubin, compile_ptx


def compile_each(wanted: Iterable[Code], gpu: Gpu, ptx: bool = False) -> Iterator[tuple[Code, Cubin]]:
    """A cubin, or PTX, for each instance: compiled on all cores or taken from the cache (plugins/nvrtc.py)."""
    codes = list(dict.fromkeys(wanted))
    compile_one = compile_ptx if ptx else compile_cubin

    def build(code: Code) -> Cubin:
        return compile_one(code.source, gpu, [code.expression], dict(code.headers))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from zip(codes, pool.map(build, codes), strict=True)
