"""Which launches of a step become chains."""

from __future__ import annotations

import pytest

from duq.compiler.targets.cuda.chains import with_chains
from duq.compiler.targets.cuda.launches import Launch, Program
from duq.plugins import kernels
from duq.plugins.gpu import GPUS
from duq.plugins.kernel import Instance
from duq.plugins.kernels import GemmFloat, Small, SplitAttention

NARROW = kernels.linear_narrow(50, 1024, "NONE", "float")
QKV = GemmFloat(2, 7, 4, 1).instance(50, 2560, "Bf16", True, "ROTARY")
ATTENTION = SplitAttention(8, 2, 64, 6).instance(50)
QUANTIZE = kernels.rotate_quantize(50, 1024, "float", "RMS_NORM", 64)
MANY_THREADS = kernels.rotate_quantize(50, 4096, "Bf16", "PLAIN", 64)
DOWN = Small(1, 7, 8, 2).instance(50, 1024, 4, "float")
LAYER = [QKV, ATTENTION, QUANTIZE, DOWN]


def chains(step: list[Instance], sm: int = 86) -> list[tuple[int, int]]:
    launches = [Launch("", instance, {}, [], []) for instance in step]
    program = with_chains(Program(1, 32, [], launches, [], [], {}), GPUS[sm])
    assert [each.links.offset for each in program.chains] == [64 * index for index in range(len(program.chains))]
    assert bool(program.zeroed) == bool(program.chains)
    return [(each.first, each.last) for each in program.chains]


def test_a_layer_is_a_chain():
    assert chains([NARROW, *LAYER, *LAYER, *LAYER, NARROW]) == [(1, 4), (5, 8), (9, 12)]


@pytest.mark.parametrize("sm", sorted(GPUS))
def test_only_where_kernels_do_not_overlap(sm):
    assert bool(chains([*LAYER, *LAYER], sm)) == (not GPUS[sm].has_pdl)


def test_what_no_other_layer_has_stays_alone():
    other = GemmFloat(1, 7, 4, 1).instance(50, 1024, "Bf16", False, "SILU")
    assert chains([other, *LAYER, other.on(GPUS[86]), *LAYER]) == [(0, 4), (5, 9)]
    assert chains([other, *LAYER, *LAYER]) == [(1, 4), (5, 8)]


def test_what_cannot_be_a_part_divides_a_layer():
    layer = [QKV, ATTENTION, MANY_THREADS, QUANTIZE, DOWN]
    assert chains([*layer, *layer]) == [(0, 1), (3, 6), (8, 9)]
    assert chains([QKV, NARROW, QKV, NARROW]) == []


def test_one_chain_alone_would_have_nobody_to_clear_its_counters():
    assert chains([QKV, ATTENTION, NARROW, QKV, NARROW, ATTENTION]) == []


def test_blocks_find_their_shared_memory():
    most = SplitAttention(8, 2, 160, 6).instance(50)  # 97 KB
    assert chains([QKV, most, QKV, most]) == [(0, 1), (2, 3)]
    beyond = SplitAttention(8, 2, 176, 5).instance(50)
    assert chains([QKV, beyond, QKV, beyond]) == []
    assert chains([QKV, beyond, QKV, beyond], 80) == [(0, 1), (2, 3)]
