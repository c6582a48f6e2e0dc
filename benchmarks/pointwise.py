"""Times the float kernels between the GEMMs at the policy's sizes, in ordinary and overlapped launches.

    python -m benchmarks.pointwise

Launches are replayed from a CUDA graph. Operands stay in L2, as they do where the kernel ahead has just written them.
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gemm_integer import time_us
from tests.gpu.test_pointwise import random
from tests.support import launch

BF16 = torch.bfloat16
LAUNCHES = 32


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def cases() -> dict:
    """Name -> a launch that takes `overlap`."""
    calls = {}
    for name, m, k, center in [("SigLIP", 768, 1152, True), ("prefix", 816, 2048, False), ("suffix", 50, 1024, False)]:
        operands = random(m, k, seed=1), empty(m, k), random(k, seed=2), random(k, seed=3) if center else None
        calls[f"normalize {name} {m} x {k}"] = partial(launch.normalize, *operands, center=center)
    calls["patches 3 x 224"] = partial(launch.patches, random(3, 224, 224, 3, seed=1).to(torch.uint8), empty(768, 592), 14)
    tokens = random(48, 2048, seed=1, dtype=BF16), empty(48, 2048, dtype=torch.float32), 45.0
    calls["tokens 48 x 2048"] = partial(launch.tokens, *tokens)
    for m in (1, 50):
        weights = random(32, 1024, seed=2), random(1024, seed=3)
        y = empty(m, 1024, dtype=torch.float32)
        calls[f"linear_narrow {m} x 32 x 1024"] = partial(launch.linear_narrow, random(m, 32, seed=1), *weights, y)
    constants = random(1024, seed=2), random(1024, seed=3), random(1024, 32, seed=4), random(32, seed=5)
    flow = torch.zeros(50, 32, device="cuda")
    calls["flow_step 50 x 1024 x 32"] = partial(launch.flow_step, random(50, 1024, seed=1), *constants, flow)
    for m, width in [(50, 4096), (816, 16384)]:
        operands = random(m, 2 * width, seed=1, dtype=BF16), empty(m, width)
        calls[f"geglu {m} x {width}"] = partial(launch.geglu, *operands)
    return calls


def main() -> None:
    print(f"{torch.cuda.get_device_name()}, SM {launch.compute_capability()}; us, ordinary and overlapped")
    for name, call in cases().items():
        times = [time_us(lambda _, call=call, o=o: call(overlap=o), [None] * LAUNCHES) for o in (False, True)]
        print(f"{name:32} {times[0]:7.2f} {times[1]:7.2f}", flush=True)


if __name__ == "__main__":
    main()
