"""Which kernel multiplies, with which tile, for which (M, N, K, bits, GPU); and which computes an attention.

All integer GEMM kernels take the same arguments and compute the same integers; a tactic is one of them with its template
parameters (plugins/kernels). `candidates` lists what is worth timing for a problem, `best` chooses: from the table of what
was timed where it has the problem or a similar one, else the first candidate. The same holds for float GEMMs
(`float_candidates`, `best_float`); attentions have `best_attention` alone.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from duq.plugins.errors import KernelError
from duq.plugins.gpu import Gpu
from duq.plugins.kernels.attention import Attention
from duq.plugins.kernels.attention_split import SplitAttention
from duq.plugins.kernels.attention_tile import TileAttention
from duq.plugins.kernels.attention_wgmma import ProjectedAttention, WgmmaAttention
from duq.plugins.kernels.gemm_float import FLOAT_CHUNK, GemmFloat
from duq.plugins.kernels.gemm_large import Large
from duq.plugins.kernels.gemm_small import Small
from duq.plugins.kernels.gemm_wgmma import Wgmma
from duq.plugins.kernels.gemm_wgmma_small import WgmmaSmall

SMALL_M = 64  # up to here a GEMM is bound by its weights and by latency
RESERVED_BYTES = 1024  # of a multiprocessor's shared memory, that a thread block takes beside its own
EPILOGUE_CHANNELS = 256  # of K, that take about as long as the epilogue of a tile
TABLE = Path(__file__).parent / "tactics_sm90.json"

Tactic = Small | Large | Wgmma | WgmmaSmall

_SMALL_TILES = [(2, 8, 2), (2, 8, 1), (1, 8, 2), (1, 8, 4), (1, 4, 4), (2, 4, 2), (2, 4, 4), (4, 4, 2), (4, 8, 1)]
_SMALL: list[Tactic] = [
    Small(rows16, tokens8, warps, stages, split)
    for rows16, warps, stages in _SMALL_TILES
    for tokens8 in (7, 8)
    for split in (1, 2, 4, 8)
]
NARROW_TOKENS8 = 4  # of half a tile, for GPUs without clusters
_SMALL_WGMMA: list[Tactic] = [
    WgmmaSmall(8, stages, groups, split) for stages in (4, 6, 8) for groups in (1, 2) for split in (1, 2, 4, 8)
]
_ANY_SIZE: list[Tactic] = [Small(1, 8, warps, 2) for warps in (4, 2, 1)]  # N in multiples of 16, K of 64
_WGMMA_TILES = [(26, 5), (26, 4), (24, 5), (20, 6), (20, 4), (18, 6), (16, 7), (14, 7), (12, 8)]
_WGMMA: list[Tactic] = [
    *(Wgmma(2, tokens8, stages) for tokens8, stages in _WGMMA_TILES),
    *(Wgmma(1, tokens8, stages) for tokens8, stages in [(26, 6), (24, 7), (20, 8), (20, 7), (16, 10)]),
    *(Wgmma(groups, tokens8, 5, split) for groups in (1, 2) for tokens8 in (20, 24, 26) for split in (2, 4)),
]
# For GPUs without wgmma. Few warps a block and several blocks a multiprocessor, so that one's epilogue does not leave the tensor
# cores idle; wide tiles for many rows, narrower ones for few (times of the SM 86 program on an H200: docs/notebook.md).
_LARGE_TILES = [
    (4, 6, 2, 1),
    (4, 8, 2, 1),
    (4, 8, 2, 2),
    (2, 8, 4, 2),
    (2, 8, 2, 2),
    (2, 6, 2, 2),
    (2, 10, 2, 2),
    (2, 13, 2, 2),
]
_LARGE: list[Tactic] = [Large(*tile, stages) for tile in _LARGE_TILES for stages in (3, 2)]


def fits(tactic: Tactic, m: int, n: int, k: int, bits: int, gpu: Gpu) -> bool:
    """Whether the tactic computes this problem on this GPU at all."""
    if tactic.needs_wgmma and not gpu.has_wgmma:
        return False
    return tactic.divides(n, k) and tactic.shape(m, n, bits).shared_bytes <= gpu.block_shared_bytes


def candidates(m: int, n: int, k: int, bits: int, gpu: Gpu, slab_tokens: int | None = None) -> list[Tactic]:
    """The tactics worth timing for y[m, n] = x[m, k] w[n, k]^T on a GPU, perhaps only those that read such slabs.

    For small M (up to SMALL_M), those that suit the GPU's size. Where none does, all: those with the most blocks first for a
    small policy, those with the fewest first for a small GPU. For large M, those first whose busiest multiprocessor has the
    least to do. Sizes that the usual tiles do not divide have tiles of their own: slow for large M, but there.
    """

    def usable(tactics: list[Tactic]) -> list[Tactic]:
        return [t for t in tactics if fits(t, m, n, k, bits, gpu) and slab_tokens in (None, t.slab_tokens)]

    fitting = usable(_SMALL + _SMALL_WGMMA if m <= SMALL_M else _WGMMA + _LARGE) or usable(_ANY_SIZE)
    padded = {tactic: -(-m // tactic.tile_tokens) * tactic.tile_tokens for tactic in fitting}
    least = min(padded.values(), default=0)
    fitting = [tactic for tactic in fitting if padded[tactic] <= 1.15 * least]
    spread_well = [tactic for tactic in fitting if _spread_well(tactic, m, n, bits, gpu)]
    if not gpu.has_clusters:  # blocks that share K meet in memory, which is for where there are too few
        spread_well.sort(key=lambda tactic: tactic.split)
        narrow = usable([_in_narrow_tiles(t, m, n, bits, gpu) for t in spread_well if isinstance(t, Small)])
        spread_well = list(dict.fromkeys(narrow + spread_well))
    if m > SMALL_M:
        return sorted(spread_well or fitting, key=lambda tactic: _least_work_first(tactic, m, n, k, bits, gpu))
    return spread_well or sorted(fitting, key=lambda tactic: _off(_blocks(tactic, m, n, bits), gpu))


def _blocks(tactic: Tactic, m: int, n: int, bits: int) -> int:
    return math.prod(tactic.shape(m, n, bits).grid)


def _off(blocks: int, gpu: Gpu) -> float:
    """How far a number of blocks is from about as many as the GPU has multiprocessors, which small M wants; 0: it is that."""
    fewest, most = min(64, gpu.multiprocessors / 2), 2.2 * gpu.multiprocessors
    return max(fewest - blocks, blocks - most, 0)


def _spread_well(tactic: Tactic, m: int, n: int, bits: int, gpu: Gpu) -> bool:
    """Splitting K is for problems with few tiles; and a small M wants about as many blocks as multiprocessors."""
    blocks = _blocks(tactic, m, n, bits)
    if isinstance(tactic, Small):
        return _off(blocks, gpu) == 0
    return tactic.split == 1 or blocks <= 1.25 * gpu.multiprocessors


def _in_narrow_tiles(tactic: Small, m: int, n: int, bits: int, gpu: Gpu) -> Small:
    """The tactic in twice as many blocks of half the tokens, if the GPU has a multiprocessor for each.

    Only where a block reads more activations than weights: these are then read twice.
    """
    narrow = replace(tactic, tokens8=NARROW_TOKENS8)
    less = tactic.tile_rows * bits < 8 * min(m, tactic.tile_tokens)
    return narrow if less and _blocks(tactic, m, n, bits) < _blocks(narrow, m, n, bits) <= gpu.multiprocessors else tactic


def _least_work_first(tactic: Tactic, m: int, n: int, k: int, bits: int, gpu: Gpu) -> tuple[float, int]:
    """Multiply-adds of the busiest multiprocessor, its tiles in full, and of equals the most warps at a time, up to 8.

    mma.sync multiplies half as fast as wgmma; and fewer than four warps leave some of the tensor cores idle. The tactic with the
    least is the fastest in three of four problems of large M in TABLE, and for the SM 86 program's on an H200.
    """
    shape = tactic.shape(m, n, bits)
    tiles = -(-m // tactic.tile_tokens) * (n // tactic.tile_rows)
    turns = -(-tiles * tactic.split // gpu.multiprocessors)
    each = tactic.tile_tokens * tactic.tile_rows * (k / tactic.split + EPILOGUE_CHANNELS)
    warps = min(turns, gpu.shared_bytes // (shape.shared_bytes + RESERVED_BYTES)) * shape.threads // 32
    idle = 1.0 if tactic.needs_wgmma else 2 * max(1.0, 4 / warps)
    return turns * each * idle, -min(warps, 8)


def best(m: int, n: int, k: int, bits: int, gpu: Gpu, slab_tokens: int | None = None) -> Tactic:
    """The tactic to use where nothing is timed: that of the nearest M in the table, else the first candidate.

    The table is an H100's, so only GPUs with wgmma follow it: how many blocks others want is another number.

    slab_tokens: of the slabs that the activations lie in, 0 for rows, where another GEMM has settled it.
    Raises KernelError when no tactic fits.
    """
    fitting = candidates(m, n, k, bits, gpu, slab_tokens)
    if not fitting:
        shared = f" for activations in slabs of {slab_tokens} tokens" if slab_tokens else ""
        raise KernelError(f"no GEMM kernel for M, N, K = {m}, {n}, {k} at {bits} bits on SM {gpu.sm}{shared}")
    table = _timed().get((n, k, bits), []) if gpu.has_wgmma else []
    timed = [(abs(m - at), tactic) for at, tactic in table if tactic in fitting]
    return min(timed, key=lambda entry: entry[0])[1] if timed else fitting[0]


@functools.cache
def _timed() -> dict[tuple[int, int, int], list[tuple[int, Tactic]]]:
    """(N, K, bits) -> [(M, the fastest tactic)], as benchmarks/gemm_integer.py --table wrote it on an H100."""
    table: dict[tuple[int, int, int], list[tuple[int, Tactic]]] = {}
    for row in json.loads(TABLE.read_text()):
        tactic = {kind.__name__: kind for kind in (Small, Large, Wgmma, WgmmaSmall)}[row["kernel"]](*row["parameters"])
        table.setdefault((row["n"], row["k"], row["bits"]), []).append((row["m"], tactic))
    return table


_FLOAT_TILES = [(4, 4, 1), (2, 4, 1), (2, 8, 1), (2, 8, 2), (1, 8, 1), (1, 8, 2), (1, 4, 1)]  # rows16, warps, stages
_FLOAT_TILES_ALONE = [(2, 4, 3), (2, 8, 1), (1, 8, 1), (1, 4, 3), (4, 4, 1), (2, 4, 1), (1, 4, 1)]  # without clusters
_FLOAT_SPLITS = (1, 2, 3, 4, 8)


def float_candidates(m: int, n: int, k: int, gpu: Gpu) -> list[GemmFloat]:
    """The tactics worth timing for a float GEMM of a weight [n, k] and m <= SMALL_M tokens, the likeliest first.

    Every block reads all tokens, so as many rows a block as can be while there are blocks for the multiprocessors. Splitting
    K makes them more: cheaply over a cluster; in memory, without clusters, it is for where no tile has enough blocks.
    """
    fitting = [
        tactic
        for rows16, warps, stages in (_FLOAT_TILES if gpu.has_clusters else _FLOAT_TILES_ALONE)
        for split in _FLOAT_SPLITS
        if (tactic := GemmFloat(rows16, -(-m // 8), warps, stages, split)).divides(n, k)
        and tactic.shape(m, n).shared_bytes <= gpu.block_shared_bytes
    ]
    busy = [t for t in fitting if t.split * t.warps * FLOAT_CHUNK <= k]
    spread = [t for t in busy if _off(n // (16 * t.rows16) * t.split, gpu) == 0]
    if gpu.has_clusters:
        return spread or fitting
    found = busy or [t for t in fitting if t.split == 1]
    return sorted(found, key=lambda t: (_off(n // (16 * t.rows16) * t.split, gpu), t.split))


# (N, K) -> rows16, warps, stages, split: the fastest on an H100 for 50 tokens, overlapped with the kernels around it
# (benchmarks/gemm_float.py).
_FLOAT_TIMED = {
    (2560, 1024): (2, 8, 2, 1),
    (1024, 2048): (1, 8, 2, 2),
    (1024, 1024): (1, 8, 1, 2),
    (8192, 1024): (4, 4, 1, 2),
    (1024, 4096): (2, 4, 1, 8),
}


def best_float(m: int, n: int, k: int, gpu: Gpu) -> GemmFloat:
    """The tactic for a float GEMM of a weight [n, k] and m <= SMALL_M tokens. Raises KernelError when none fits.

    What was timed; else the most rows a block, and of its splits the smallest with a block for every multiprocessor. Without
    clusters the first candidate.
    """
    candidates = float_candidates(m, n, k, gpu) if m <= SMALL_M else []
    if not candidates:
        raise KernelError(f"no float GEMM kernel for M, N, K = {m}, {n}, {k} on SM {gpu.sm}")
    if not gpu.has_clusters:
        return candidates[0]
    timed = [t for t in candidates if (t.rows16, t.warps, t.stages, t.split) == _FLOAT_TIMED.get((n, k))]
    if timed:
        return timed[0]
    blocks = {t: n // (16 * t.rows16) * t.split for t in candidates if t.rows16 == candidates[0].rows16}
    return next((t for t in blocks if blocks[t] > gpu.multiprocessors), max(blocks, key=lambda tactic: blocks[tactic]))


# What was timed for the policy's attentions, the best first (docs/performance.md).
# (row warps, key warps, keys, stages, split) and (row groups, key groups, ..., split, helpers).
MANY_QUERIES: list[TileAttention | WgmmaAttention] = [
    WgmmaAttention(8, 1, 2, 48, 2),
    WgmmaAttention(8, 2, 1, 64, 2, 2),
    WgmmaAttention(8, 1, 1, 64, 3, 1, 1),
    WgmmaAttention(8, 1, 1, 64, 3, 2, 1),
    WgmmaAttention(8, 1, 2, 32, 3),
    TileAttention(8),
]
FEWER_ROWS = Attention(256, 8, 2, 2, 16, 2)  # 32 a block, for prefixes of so few tokens that every block is at work at once
SUFFIX = WgmmaAttention(8, 1, 1, 112, 1, 8, alone=True)  # and with fewer keys, see for_suffix
FEW_QUERIES: list[Attention | WgmmaAttention] = [
    SUFFIX,
    WgmmaAttention(8, 1, 1, 80, 1, 8, alone=True),
    WgmmaAttention(8, 1, 1, 48, 1, 8, alone=True),
    WgmmaAttention(8, 1, 1, 64, 1, 16),
    WgmmaAttention(8, 1, 1, 64, 3, 8, 1),
    WgmmaAttention(8, 1, 1, 64, 2, 8),
    Attention(256, 8, 2, 2, 16, 3, 8),
]
# Few queries on GPUs without clusters: blocks that share the keys meet in memory.
SPLIT_KEYS: list[SplitAttention] = [
    *(SplitAttention(8, 2, keys, split) for keys, split in [(160, 6), (96, 10), (64, 16), (128, 2), (64, 3), (144, 5)]),
    *(SplitAttention(8, 1, keys, split) for keys, split in [(64, 16), (128, 4)]),
    SplitAttention(8, 2, 256, 4),  # for 163 KB of shared memory
]
MOST_SPLIT = 16  # the last block reads what all have left, while the others are idle
VISION: list[Attention | WgmmaAttention] = [
    Attention(72, 1, 8, 1, 64, 2),
    Attention(72, 1, 4, 2, 64, 2),
    Attention(72, 1, 2, 2, 64, 2),
    Attention(72, 1, 4, 1, 64, 3),
    Attention(72, 1, 4, 1, 32, 4),
    Attention(72, 1, 4, 2, 32, 3),
    Attention(72, 1, 4, 1, 64, 3, 2),
]


AttentionTactic = Attention | SplitAttention | TileAttention | WgmmaAttention


def best_attention(dims: int, tokens: int, images: int, gpu: Gpu, cached: int = 0, own: int = 0) -> AttentionTactic:
    """The kernel for `tokens` queries an image: Gemma's heads of 256, or SigLIP's of 72. Any number of keys; few queries
    have one for at most `cached` keys and `own` ones, which then is the fastest.

    Raises KernelError for heads that no kernel is made for.
    """
    order: Sequence[AttentionTactic]
    if dims == 256 and tokens <= SMALL_M and not gpu.has_clusters:
        order = [split_keys(tokens, cached + own, gpu)]
    elif dims == 256 and tokens <= SMALL_M:
        order = [for_suffix(cached, own), *FEW_QUERIES]
    elif dims == 256 and not gpu.has_wgmma and tokens * 8 <= 32 * gpu.multiprocessors:
        order = [FEWER_ROWS, *MANY_QUERIES]
    elif dims == 256:
        order = MANY_QUERIES[3:] if tokens <= 400 else MANY_QUERIES
    elif dims == 72:
        order = VISION[3 - min(images, 3) :]
    else:
        raise KernelError(f"no attention kernel for heads of {dims}; there are some for 72 and 256")
    return next(kernel for kernel in order if kernel.fits(gpu))


def for_suffix(cached: int, own: int) -> WgmmaAttention:
    """8 blocks share the keys, each with as few tiles as registers permit, which are no larger than its share.

    Small tiles leave room for a second block, and a cluster's blocks would come in twos on half of the multiprocessors.
    """
    share, most = -(-cached // 8) + -(-own // 8), SUFFIX.keys
    tiles = -(-share // most) or 1
    return replace(SUFFIX, keys=max(-(-share // (16 * tiles)) * 16, 32))


def projected_attention(heads: int, width: int, cached: int, own: int, gpu: Gpu) -> ProjectedAttention | None:
    """For the suffix's attention and its output projection in one launch, keys as in `for_suffix`. None where that does not fit,
    or where its clusters, one a head, would not all run at once."""
    tactic = ProjectedAttention(for_suffix(cached, own).keys)
    at_once = gpu.multiprocessors // (2 * tactic.split)  # a GPC has room for two of 8 blocks, mostly
    return tactic if tactic.fits(gpu, width) and heads <= at_once else None


def split_keys(tokens: int, keys: int, gpu: Gpu) -> SplitAttention:
    """For GPUs without clusters: about as many blocks as multiprocessors, which take their keys in one piece where shared
    memory holds it. At least two share the keys: more warps for them.

    A block has 16 rows, of which the last to come has half as much to merge, where at least three share the keys and take
    them in one piece; else it has 32.
    """
    units = max(1, -(-keys // 16))

    def tactic(rows16: int, pieces: int) -> SplitAttention:
        tile = SplitAttention(8, rows16, 16, 2)
        split = max(2, min(gpu.multiprocessors // tile.row_tiles(tokens), MOST_SPLIT, units // 2))
        return replace(tile, keys=16 * -(-units // (split * pieces)), split=split)

    few = tactic(1, 1)
    rows16 = 1 if tokens <= 2 or (few.split >= 3 and few.fits(gpu)) else 2
    return next(found for pieces in range(1, units + 1) if (found := tactic(rows16, pieces)).fits(gpu))
