"""The INT8 x INT4 kernels that BitBLAS generates: their choice, their source, their cache. tests/gpu runs them."""

import importlib.util
import json
import re

import numpy as np
import pytest

from duq.plugins import bitblas
from duq.plugins.bitblas import DEPTH, Tile, best, candidates, compile_kernel, estimate, fits, ranked, sources
from duq.plugins.bitblas_generate import repaired
from duq.plugins.errors import KernelError
from duq.plugins.gpu import GPUS, gpu_of
from duq.plugins.kernels import bitblas as tactics
from duq.plugins.kernels.bitblas import BITBLAS, Generated, offered
from duq.plugins.layout import pack_bitblas
from duq.tools.bitblas_table import rows
from tests.support.emulate_bitblas import Block, to_python

A40 = gpu_of(86)
SMALL = (64, 256, Tile(1, 2, 32, 32, 2, True))  # N, K, tile


def test_the_table_is_what_the_tool_writes():
    assert json.loads(bitblas.TABLE.read_text()) == rows()


def test_every_row_of_the_table_is_chosen_and_fits():
    for row in rows():
        problem = row["m"], row["n"], row["k"]
        assert best(*problem, A40) == Tile(*row["tile"]) and fits(Tile(*row["tile"]), *problem[1:], A40)
    nearest = best(817, 2560, 2048, A40)
    assert nearest in (best(816, 2560, 2048, A40), best(818, 2560, 2048, A40))


@pytest.mark.parametrize("gpu", [gpu for gpu in GPUS.values() if gpu.int8_rate], ids=lambda gpu: str(gpu.sm))
@pytest.mark.parametrize(("n", "k"), [(2560, 2048), (1024, 4096), (96, 256)])
def test_candidates_fit_their_resources(n, k, gpu):
    tiles = candidates(n, k, gpu)
    assert tiles and len(set(tiles)) == len(tiles)
    for tile in tiles:
        assert n % tile.block_n == 0 and k // DEPTH >= tile.stages + 2
        assert tile.shared_bytes <= gpu.block_shared_bytes and 64 <= tile.threads <= 512
        assert estimate(tile, 50, n, k, gpu) > 0
    times = [estimate(tile, 50, n, k, gpu) for tile in ranked(50, n, k, gpu)]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("problem", "says"),
    [
        ((50, 2560, 2048, 90), "not for 90"),
        ((50, 2560, 2048, 87), "not for 87"),
        ((50, 17, 2048, 86), "N is a multiple"),
        ((50, 2560, 100, 86), "N is a multiple"),
    ],
)
def test_what_has_no_kernel_is_refused(problem, says):
    with pytest.raises(KernelError, match=says):
        best(*problem[:3], gpu_of(problem[3]))


def test_without_bitblas_the_extra_is_named(tmp_path, monkeypatch):
    def missing(name):
        raise bitblas.PackageNotFoundError(name)

    monkeypatch.setattr(bitblas, "version", missing)
    with pytest.raises(KernelError, match=r"pip install 'duq-vla\[bitblas\]'"):
        sources([SMALL], 86, tmp_path)


def test_offers_tactics_where_there_is_source(monkeypatch):
    problem = 306, 2560, 2048
    kept = best(*problem, A40)
    monkeypatch.setattr(tactics, "is_available", lambda problem, sm: problem[2] == kept)
    assert offered(*problem, A40) == [Generated(2560, 2048, 86, kept)]
    assert offered(*problem, gpu_of(90)) == offered(*problem, gpu_of(87)) == []


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """The source of SMALL and the cache it is in."""
    if importlib.util.find_spec("bitblas") is None:
        pytest.skip("the bitblas extra is not installed")
    cache = tmp_path_factory.mktemp("sources")
    return sources([SMALL], 86, cache)[0], cache


def test_source_is_generated_without_a_gpu_and_compiles(generated, tmp_path):
    source, _ = generated
    assert "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32" in source and "#include <" not in source
    for sm in (80, 86, 89, 90):
        cubin = compile_kernel(source, sm, tmp_path)
        assert cubin.image.startswith(b"\x7fELF") and cubin.symbols == {bitblas.SYMBOL: bitblas.SYMBOL}


@pytest.mark.parametrize(
    "tile",
    [
        Tile(2, 2, 16, 32, 3, True),
        *(pytest.param(each, marks=pytest.mark.slow) for each in (SMALL[2], Tile(1, 4, 64, 16, 2, False))),
    ],
    ids=str,
)
def test_data_moves_as_the_layouts_say(generated, tile):
    """Every thread block of the generated kernel in numpy, on weights as they are packed: the exact product comes out."""
    _, cache = generated
    m, n, k = 70, 128, 384
    (source,) = sources([(n, k, tile)], 86, cache)
    random = np.random.default_rng(0)
    x_q = random.integers(-128, 128, (m, k)).astype(np.int8)
    weight = random.integers(-8, 8, (n, k)).astype(np.int8)
    x_q[0], weight[0] = -128, -8
    c, code, shape = np.full((m, n), 0x7FFFFFFF, np.int32), to_python(source), tile.shape(m, n)
    for bx, by, _ in np.ndindex(shape.grid):
        Block(shape.threads, shape.shared_bytes, x_q, pack_bitblas(weight), c).run(code, bx, by)
    np.testing.assert_array_equal(c, x_q.astype(np.int64) @ weight.astype(np.int64).T)


def test_the_description_is_what_is_generated(generated):
    source, _ = generated
    found = re.search(r"general_dequant_matmul_kernel\((.*?)\)", source)[1].replace("__restrict__ ", "").split(",")
    types = [re.sub(r"\s*\w+$", "", each.strip()).removesuffix(" ") for each in found]
    assert types == [each.type.removeprefix("const ") for each in BITBLAS.parameters.values()]


def test_source_is_kept_and_made_again_when_damaged(generated, monkeypatch):
    source, cache = generated
    with monkeypatch.context() as patch:
        patch.setattr(bitblas, "_generate", lambda *_: pytest.fail("generated again"))
        assert sources([SMALL], 86, cache) == [source]
    for entry in cache.iterdir():
        entry.write_bytes(entry.read_bytes()[:-1])
    assert sources([SMALL], 86, cache) == [source]


def test_every_copy_in_the_main_loop_waits_for_its_readers(generated):
    source, _ = generated
    lines = source[source.index("for (int ko") :].splitlines()
    loop = lines[: next(i for i, line in enumerate(lines) if line == "  }" and "cp_async_wait" in lines[i + 1])]
    copies = [i for i, line in enumerate(loop) if line.startswith("    #pragma unroll")]
    assert len(copies) == 2 and all(loop[i - 1] == "    __syncthreads();" for i in copies)


def test_source_of_another_form_is_refused():
    with pytest.raises(ValueError, match="another form"):
        repaired("__global__ void kernel() {}")
