"""The kernels that BitBLAS generates for SM 86, compiled for the GPU at hand, against exact accumulators.

python -m pytest -s tests/gpu/test_bitblas_kernels.py        also prints a table: shape, tile, time, rate, exact
"""

from __future__ import annotations

import json
from dataclasses import astuple

import pytest
import torch

from duq.plugins import bitblas, driver
from duq.plugins.bitblas import Tile
from duq.plugins.gpu import gpu_of
from duq.plugins.kernels.bitblas import BITBLAS
from duq.plugins.layout import pack_bitblas
from tests.support import launch

ROWS = json.loads(bitblas.TABLE.read_text())
GUARD = 8  # rows of c past the last token, which must stay as they are


def kernel(n: int, k: int, tile: Tile) -> driver.Kernel:
    (source,) = bitblas.sources([(n, k, tile)], 86)
    return driver.load(bitblas.compile_kernel(source, launch.compute_capability()))[bitblas.SYMBOL]


def operands(m: int, n: int, k: int):
    """Values over the whole range, the extremes included, and the exact accumulators."""
    generator = torch.Generator("cuda").manual_seed(m * n + k)
    x_q = torch.randint(-128, 128, (m, k), dtype=torch.int8, device="cuda", generator=generator)
    weight = torch.randint(-8, 8, (n, k), dtype=torch.int8, device="cuda", generator=generator)
    x_q[0], weight[0], weight[1] = -128, -8, 7  # the largest accumulators
    exact = x_q.double() @ weight.double().T  # below 2^53, hence exact
    return x_q, weight, exact


def run(function: driver.Kernel, tile: Tile, x_q, packed, c, m: int) -> None:
    instance = BITBLAS.instance(tile.shape(m, c.shape[1]))
    arguments = {"x_q": x_q.data_ptr(), "weight": packed.data_ptr(), "y": c.data_ptr(), "tokens": m}
    function.launch(instance.shape, instance.scalars(arguments), torch.cuda.current_stream().cuda_stream)


def multiply(function: driver.Kernel, tile: Tile, x_q, weight) -> torch.Tensor:
    m, n = len(x_q), len(weight)
    packed = torch.from_numpy(pack_bitblas(weight.cpu().numpy())).cuda()
    c = torch.full((m + GUARD, n), 0x7FFFFFFF, dtype=torch.int32, device="cuda")
    run(function, tile, x_q, packed, c, m)
    torch.cuda.synchronize()
    assert (c[m:] == 0x7FFFFFFF).all(), "wrote past the last token"
    return c[:m]


def microseconds(function: driver.Kernel, tile: Tile, m: int, n: int, k: int) -> float:
    """Of one launch among many in a CUDA graph; the weights come from memory, not from the cache."""
    copies = max(2, (100 << 20) // (n * k // 2))
    x_q = torch.zeros(m, k, dtype=torch.int8, device="cuda")
    packed = [torch.zeros(n, k // 2, dtype=torch.uint8, device="cuda") for _ in range(copies)]
    c = torch.zeros(m, n, dtype=torch.int32, device="cuda")
    graph, start, end = torch.cuda.CUDAGraph(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.graph(graph):
        for each in packed:
            run(function, tile, x_q, each, c, m)
    graph.replay()
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3 / copies


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "{linear} {m}".format(**row))
def test_every_problem_of_the_table_is_exact(row):
    m, n, k, tile = row["m"], row["n"], row["k"], Tile(*row["tile"])
    function = kernel(n, k, tile)
    x_q, weight, exact = operands(m, n, k)
    correct = torch.equal(multiply(function, tile, x_q, weight).double(), exact)
    us = microseconds(function, tile, m, n, k)
    rate = 2e-6 * m * n * k / us
    print(f"\n{row['linear']:14} {m:5} x {n:5} x {k:5}  {astuple(tile)!s:28} {us:7.1f} us {rate:6.1f} TOPS exact={correct}")
    assert correct


@pytest.mark.parametrize("m", [1, 15, 16, 17, 63, 64, 65, 131])
def test_any_number_of_tokens_is_exact(m):
    n, k, tile = 1024, 2048, bitblas.best(50, 1024, 2048, gpu_of(86))
    x_q, weight, exact = operands(m, n, k)
    assert torch.equal(multiply(kernel(n, k, tile), tile, x_q, weight).double(), exact)
