"""Machine code for the instances of the kernels that launches need."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from duq.plugins.kernel import Code as Instance
from duq.plugins.nvrtc import Cubin, compile_cubin


def compile_each(instances: Iterable[Instance], sm: int) -> Iterator[tuple[Instance, Cubin]]:
    """A cubin for each instance, compiled on all cores or taken from the cache (plugins/nvrtc.py)."""
    instances = list(dict.fromkeys(instances))

    def build(instance: Instance) -> Cubin:
        return compile_cubin(instance.source, sm, [instance.expression], dict(instance.headers))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from zip(instances, pool.map(build, instances))
