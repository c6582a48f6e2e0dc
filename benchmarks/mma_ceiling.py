"""The rate that a loop of nothing but mma.sync reaches on the GPU at hand: the ceiling of kernels for GPUs without wgmma.

    python -m benchmarks.mma_ceiling

Every warp multiplies 4 operands a by 8 operands b into 32 accumulators, over and over, all in registers. Operands are random, as a
GEMM's are, or zero: bits that toggle take power, and with it clock.
"""

from __future__ import annotations

import ctypes
import statistics

import torch

from duq.plugins import driver
from duq.plugins.kernel import Shape
from duq.plugins.nvrtc import compile_text
from tests.support.launch import compute_capability

WARPS, STEPS = 8, 2000
KINDS = {"int8": ("int", "s32.s8.s8.s32", "m16n8k32", "r", 32), "bf16": ("float", "f32.bf16.bf16.f32", "m16n8k16", "f", 16)}
SOURCE = """
__global__ void __launch_bounds__({threads}) ceiling(const unsigned* from, {type}* to, int steps) {{
  unsigned a[4][4], b[8][2];
  {type} d[4][8][4] = {{}};
  const unsigned* const own = from + threadIdx.x;
  for (int i = 0; i < 16; ++i) a[i / 4][i % 4] = own[i * {threads}];
  for (int i = 0; i < 16; ++i) b[i / 2][i % 2] = own[(16 + i) * {threads}];
  for (int step = 0; step < steps; ++step)
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        asm volatile("mma.sync.aligned.{shape}.row.col.{types} {{%0,%1,%2,%3}}, {{%4,%5,%6,%7}}, {{%8,%9}}, {{%0,%1,%2,%3}};"
            : "+{c}"(d[i][j][0]), "+{c}"(d[i][j][1]), "+{c}"(d[i][j][2]), "+{c}"(d[i][j][3])
            : "r"(a[i][0]), "r"(a[i][1]), "r"(a[i][2]), "r"(a[i][3]), "r"(b[j][0]), "r"(b[j][1]));
  {type} sum = 0;
  for (int i = 0; i < 128; ++i) sum += d[i / 32][i / 4 % 8][i % 4];
  to[blockIdx.x * {threads} + threadIdx.x] = sum;
}}
"""


def rate(kind: str, random: bool) -> float:
    """Operations a second."""
    c_type, types, shape, constraint, depth = KINDS[kind]
    threads = 32 * WARPS
    text = SOURCE.format(threads=threads, type=c_type, types=types, shape=shape, c=constraint)
    cubin = compile_text(f"ceiling_{kind}.cu", text, compute_capability(), ["ceiling"])
    kernel, blocks = driver.load(cubin)["ceiling"], driver.device_properties()[1]
    operands = torch.randint(-(2**31), 2**31, (32, threads), dtype=torch.int32, device="cuda")
    if kind == "bf16":  # finite ones
        operands = torch.randn(32, 2 * threads, device="cuda").bfloat16().view(torch.int32)
    operands *= random
    sums = torch.empty(blocks * threads, dtype=torch.int32, device="cuda")
    arguments = [ctypes.c_void_p(operands.data_ptr()), ctypes.c_void_p(sums.data_ptr()), ctypes.c_int(STEPS)]
    times = []
    for _ in range(30):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        kernel.launch(Shape((blocks, 1, 1), threads, 0), arguments, torch.cuda.current_stream().cuda_stream, False)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e-3)
    return 2.0 * 16 * 8 * depth * 32 * STEPS * WARPS * blocks / statistics.median(times[10:])


def main() -> None:
    print(torch.cuda.get_device_name())
    for kind in KINDS:
        print(f"{kind}: {rate(kind, True) / 1e12:.0f} T/s of random operands, {rate(kind, False) / 1e12:.0f} of zeros")


if __name__ == "__main__":
    main()
