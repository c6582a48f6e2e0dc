"""One model of how long a launch takes on a GPU, from what the schedule and the GPU's data (plugins/gpu.py) say.

    cycles = edge + counts x constants + max(issue x instructions of a warp, reached x operations / rate)

edge: from launch to end of a kernel with nothing to do but its dependent steps. counts: turns (waves of thread blocks), blocks
that a multiprocessor starts, links of the chain over K, what warps and blocks leave for each other. Operations are those of the
busiest multiprocessor, tiles in full, over its peak rate. Bytes are read at the bandwidth of L2, and of memory where L2 does not
hold them; a launch takes as long as they do at least. Nothing but `Gpu` depends on the GPU.

The constants, cycles of a kernel family or ratios, are in latency.json: `python -m benchmarks.fit_latency` finds them. A kernel
that was never measured is not estimated: `time_of` refuses it by name.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from duq.plugins.errors import KernelError
from duq.plugins.gpu import Gpu
from duq.plugins.kernels import KERNELS
from duq.plugins.kernels.library import MATMUL

CONSTANTS = Path(__file__).parent / "latency.json"
MEASURED_ON = "H200"
MEMORY_REACHED = 0.875  # of the data sheet's bandwidth, by a copy on an H200
L2_BYTES = 33  # a multiprocessor receives in a cycle: 7.75 TB/s on an H200
L2_HELD = 0.5  # of L2, that activations may fill and still be there for the next launch
MMA_BF16 = 16 * 8 * 16  # multiply-adds of one instruction, mma.sync
MMA_SYNC_BF16 = 0.68  # of bf16_rate, which is wgmma's, where a GPU has it: 647 of 951 TFLOPS on an H200
REGISTERS = 65536  # of a multiprocessor, on every GPU of plugins/gpu.py
OTHER_REGISTERS = 64  # of a thread, beside accumulators
ADDRESSES = 24  # registers of a thread, beside accumulators and operands
TENSOR_CORES = 4  # of a multiprocessor
UNMEASURED = (
    "float_patches",
    "geglu",
    "epilogue",
    "dequantize_weight",
    "residual_quantize",
)  # in no program that was: taken for an average one

Sizes = Mapping[str, Any]


@dataclass(frozen=True)
class Launch:
    """What the model reads of a launch of a schedule (compiler/targets/cuda/emit.py); sizes: its int arguments."""

    kernel: str  # a C++ expression, or the library
    work: float
    moved: float
    grid: tuple[int, ...]
    threads: int
    shared: int
    sizes: Sizes
    branch: bool = False
    overlap: bool = False
    clusters: bool = False  # blocks that share K or keys are one
    template: Mapping[str, str] | None = None  # the arguments by name, of a kernel whose parameters may have changed since

    @classmethod
    def of(cls, launch: Mapping[str, Any], kernel: str) -> Launch:
        """Of a launch in a schedule, whose kernel has this expression."""
        sizes = {name: value for name, value in launch["args"].items() if type(value) is int}
        shape = tuple(launch.get("grid", ())), launch.get("threads", 0), launch.get("shared", 0)
        flags = launch.get("branch", False), launch.get("overlap", False), "cluster" in launch
        return cls(kernel, launch["work"], launch["moved"], *shape, sizes, *flags)

    @property
    def name(self) -> str:
        """Of the kernel, without template arguments."""
        return self.kernel.partition("<")[0]

    @property
    def blocks(self) -> int:
        return math.prod(self.grid)


@dataclass(frozen=True)
class Terms:
    """What a launch asks of a GPU.

    counts: of the family's constants, by name. instructions: that one warp issues for tensor cores. operations: cycles of the
    busiest multiprocessor at its peak rate. activations, weights: bytes; weights come from memory.
    """

    family: str
    counts: Mapping[str, float] = field(default_factory=dict)
    instructions: float = 0.0
    operations: float = 0.0
    activations: float = 0.0
    weights: float = 0.0


class Constants(NamedTuple):
    """families: cycles and ratios by family. overlap: seconds that a launch saves which may start early. beside: the share of
    what runs on other streams that the prefix takes longer by. event: seconds of an event, which measured launches had.
    kernel_error, sum_error: the largest relative ones on the GPU that was measured."""

    families: Mapping[str, Mapping[str, float]]
    overlap: float
    beside: float
    event: float
    kernel_error: float = 0.0
    sum_error: float = 0.0


@functools.cache
def constants() -> Constants:
    """Those of latency.json."""
    data = json.loads(CONSTANTS.read_text())
    errors = data["kernel_error"], data["sum_error"]
    return Constants(data["families"], 1e-6 * data["overlap_us"], data["beside"], 1e-6 * data["event_us"], *errors)


def kernel_of(schedule: Mapping[str, Any], launch: Mapping[str, Any]) -> str:
    """The expression of its kernel, or the library."""
    return schedule["kernels"][launch["kernel"]]["expression"] if "kernel" in launch else launch["call"]


class Time(NamedTuple):
    """Seconds of a launch alone on the GPU; memory: that its bytes take, which nothing beside it can hide."""

    seconds: float
    memory: float


def time_of(launch: Launch, gpu: Gpu, fitted: Constants | None = None) -> Time:
    """KernelError names a kernel that was not measured, and a rate that is not public."""
    return time_of_terms(terms(launch, gpu), gpu, (fitted or constants()).families)


def time_of_terms(asked: Terms, gpu: Gpu, families: Mapping[str, Mapping[str, float]]) -> Time:
    if asked.family not in families:
        raise KernelError(f"{asked.family}: no launch of this kernel was measured; python -m benchmarks.fit_latency --help")
    c = families[asked.family]
    busy = max(c.get("issue", 0) * asked.instructions, c.get("reached", 0) * asked.operations)
    cycles = busy + sum(count * c[name] for name, count in asked.counts.items())
    from_l2 = c.get("bytes", 0) * asked.activations / (L2_BYTES * gpu.multiprocessors)
    held = asked.activations <= L2_HELD * gpu.known("l2_bytes")
    memory = (asked.weights + (0 if held else asked.activations)) / (MEMORY_REACHED * gpu.memory_bandwidth)
    return Time(c["edge"] / gpu.clock + max((cycles + from_l2) / gpu.clock, memory), memory)


Timed = tuple[Launch, Time]


class Sum(NamedTuple):
    """Seconds of a call. in_turn: all on one stream. prefix, steps: of the graph, where the state token and the first
    denoising step run beside the prefix."""

    prefix_in_turn: float
    step_in_turn: float
    prefix: float
    steps: float

    @property
    def call(self) -> float:
        return self.prefix + self.steps


def sum_of(prefix: Sequence[Timed], step: Sequence[Timed], num_steps: int, fitted: Constants) -> Sum:
    """Of all launches of both halves. What runs beside the prefix costs it a share, and at least the bytes."""
    one, whole = seconds_in_turn(step, fitted), seconds_in_turn(prefix, fitted)
    beside = [*(each for each in prefix if each[0].branch), *step]
    hidden = seconds_in_turn([each for each in prefix if each[0].branch], fitted)
    costs = max(fitted.beside * (hidden + one), sum(time.memory for _, time in beside))
    return Sum(whole, one, whole - hidden + costs, (num_steps - 1) * one)


def seconds_in_turn(timed: Iterable[Timed], fitted: Constants) -> float:
    """Of launches that follow each other on one stream."""
    return sum(time.seconds - fitted.overlap * launch.overlap for launch, time in timed)


def terms(launch: Launch, gpu: Gpu) -> Terms:
    """Raises KernelError for a kernel that the model does not know."""
    if launch.name not in _TERMS:
        raise KernelError(f"{launch.name}: duq-estimate has no model of this kernel (tools/latency.py)")
    return _TERMS[launch.name](launch, template_of(launch.kernel) if launch.template is None else launch.template, gpu)


def template_of(expression: str) -> dict[str, str]:
    """The template arguments by name of a kernel's C++ expression. KernelError where it has others in this duq."""
    name, _, rest = expression.partition("<")
    values = rest.removesuffix(">").split(", ") if rest else []
    names = KERNELS[name].template if name in KERNELS else ()
    if len(names) != len(values):
        raise KernelError(f"{expression}: this duq's kernel {name} has other parameters; compile the plan again")
    return dict(zip(names, values, strict=True))


class Load(NamedTuple):
    """together: blocks on the busiest multiprocessor at once; turns: how often."""

    together: int
    turns: int

    @classmethod
    def of(cls, launch: Launch, gpu: Gpu, registers: int) -> Load:
        by_shared = gpu.shared_bytes // (launch.shared + 1024)
        resident = max(1, min(by_shared, gpu.threads // launch.threads, REGISTERS // (registers * launch.threads)))
        together = min(resident, -(-launch.blocks // gpu.multiprocessors))
        return cls(together, -(-launch.blocks // (gpu.multiprocessors * together)))


def _rows(launch: Launch, template: Mapping[str, str], gpu: Gpu) -> Terms:
    """A kernel that reads rows of activations and writes others; those that were never measured are as the others are."""
    family = "rows" if launch.name in UNMEASURED else launch.name
    return Terms(family, {"block": launch.blocks / gpu.multiprocessors}, activations=launch.moved)


def _alone(launch: Launch, template: Mapping[str, str], gpu: Gpu) -> Terms:
    turns = Load.of(launch, gpu, OTHER_REGISTERS).turns
    counts = {"token": turns * int(template["TOKENS"])} if "TOKENS" in template else {"turn": turns - 1.0}
    return Terms(launch.name, counts, weights=launch.moved)


def _matmul(launch: Launch, template: Mapping[str, str], gpu: Gpu) -> Terms:
    """The library chooses tiles that fill the GPU: no waves."""
    s = launch.sizes
    rate = gpu.multiprocessors * gpu.known("bf16_rate")
    weights = 2.0 * s["n"] * s["k"]
    return Terms("cublaslt", {"chain": -(-s["k"] // 64)}, operations=launch.work / 2 / rate, activations=launch.moved - weights,
                 weights=weights)  # fmt: skip


def _exchange(launch: Launch, split: int) -> dict[str, float]:
    """Blocks that share K meet in a cluster or in memory."""
    return {"cluster": float(split > 1 and launch.clusters), "memory": float(split > 1 and not launch.clusters)}


def _gemm(launch: Launch, bits: int) -> dict[str, float]:
    weights = launch.sizes["rows"] * launch.sizes["depth"] * bits / 8
    return {"activations": launch.moved - weights, "weights": weights}


def _gemm_wgmma(launch: Launch, template: Mapping[str, str], gpu: Gpu) -> Terms:
    tokens8, groups, split = (int(template[name]) for name in ("TOKENS8", "GROUPS", "SPLIT"))
    s, tokens, rows = launch.sizes, 8 * tokens8, 64 * groups
    turns = -(-(-(-s["tokens"] // tokens) * (s["rows"] // rows) * split) // gpu.multiprocessors)
    links = turns * s["depth"] / 128 / split
    operations = links * tokens * rows * 128 / (2 * gpu.known("int8_rate"))
    counts = {"turn": turns, "chain": links, "cluster": float(split > 1)}
    return Terms("gemm_wgmma", counts, operations=operations, **_gemm(launch, int(template["BITS"])))


def _gemm_wgmma_small(launch: Launch, template: Mapping[str, str], gpu: Gpu) -> Terms:
    groups, split = int(template["GROUPS"]), int(template["SPLIT"])
    turns = -(-launch.blocks // gpu.multiprocessors)
    links = turns * launch.sizes["depth"] / 128 / split / groups
    counts = {"chain": links, "cluster": float(split > 1)}
    return Terms("gemm_wgmma_small", counts, **_gemm(launch, int(template["BITS"])))


def _gemm_large(launch: Launch, template: Mapping[str, str], gpu: Gpu) -> Terms:
    """Blocks start one by one as others end, so what counts is the busiest of a multiprocessor's tensor cores."""
    bits, rows16, tokens8 = (int(template[name]) for name in ("BITS", "ROWS16", "TOKENS8"))
    tile, links = rows16 * tokens8, launch.sizes["depth"] / 128
    registers = 4 * tile + 4 * tokens8 + (bits + 8) * rows16 + ADDRESSES
    turns = Load.of(launch, gpu, registers).turns
    blocks = -(-launch.blocks // gpu.multiprocessors)
    warps = TENSOR_CORES * -(-blocks * launch.threads // 32 // TENSOR_CORES)
    return Terms(
        "gemm_large",
        {"staged": tile},
        instructions=turns * links * 4 * (tile + rows16 + tokens8),
        operations=links * warps * tile * 16 * 8 * 128 / gpu.known("int8_rate"),
        **_gemm(launch, bits),
    )


def _few_tokens(launch: Launch, template: Mapping[str, str], gpu: Gpu) -> Terms:
    """gemm_small and gemm_float: the warps of a block, and blocks, share K."""
    is_float = launch.name == "gemm_float"
    bits, rows16, tokens8, stages = (int(template[name]) for name in ("BITS", "ROWS16", "TOKENS8", "STAGES"))
    warps, split, tile = launch.threads // 32, launch.grid[1], rows16 * tokens8
    registers = 4 * tile + stages * (bits * rows16 + (0 if is_float else 4 * tokens8)) + ADDRESSES
    load = Load.of(launch, gpu, registers)
    links = load.turns * launch.sizes["depth"] / 64 / warps / split
    mma = 4 if is_float else 2  # for K = 64
    rate = _mma_sync_bf16(gpu) if is_float else gpu.known("int8_rate")
    operations = links * load.together * warps * tile * 16 * 8 * 64 / rate
    tokens = min(launch.sizes["tokens"], 8 * tokens8) / 8
    counts = {"chain": links, "tokens": links * tokens, "staged": load.turns * warps * rows16 * tokens}
    if is_float:
        counts["rotary"] = float(template["EPILOGUE"] == "ROTARY")
    counts |= _exchange(launch, split)
    return Terms(launch.name, counts, links * tile * mma, operations, **_gemm(launch, bits))


def _attention(launch: Launch, template: Mapping[str, str], gpu: Gpu) -> Terms:
    """Blocks of 16 ROW_WARPS queries walk their share of the keys."""
    dims, heads, keys_of_warp = int(template["DIMS"]), int(template["HEADS"]), int(template["KEYS"])
    row_warps, key_warps, split = (int(template[name]) for name in ("ROW_WARPS", "KEY_WARPS", "SPLIT"))
    padded = -(-dims // 16) * 16
    load = Load.of(launch, gpu, padded // 2 + OTHER_REGISTERS)
    walked = load.turns * -(-_keys(launch, heads, dims) // (split * key_warps * keys_of_warp))
    instructions = walked * keys_of_warp / 8 * padded / 16 * 2
    operations = walked * load.together * 16 * row_warps * key_warps * keys_of_warp * padded * 2 / _mma_sync_bf16(gpu)
    counts = {"turn": float(load.turns), "cluster": float(split > 1)}
    return Terms("attention", counts, instructions, operations, activations=launch.moved)


def _attention_shared(launch: Launch, template: Mapping[str, str], gpu: Gpu) -> Terms:
    """attention_split and attention_tile: the 8 warps of a block share both products, so its keys and values arrive once. Its
    registers leave no room for a second block. Of blocks that share keys, the last merges what all have left."""
    heads, split = int(template["HEADS"]), int(template.get("SPLIT", 1))
    rows = 16 * int(template.get("ROWS16", 4))
    turns = -(-launch.blocks // gpu.multiprocessors)
    keys = -(-_keys(launch, heads, 256) // (16 * split)) * 16  # of a block
    products = turns * rows * keys * 256 * 2
    row = 2 * 256 / L2_BYTES  # cycles for a row of 256 bf16
    counts = {"copied": turns * (2 * keys + rows) * row, "merged": turns * (split > 1) * split * rows * row}
    operations = products / _mma_sync_bf16(gpu)
    return Terms("attention_shared", counts, products / MMA_BF16 / 8, operations, activations=launch.moved)


def _attention_wgmma(launch: Launch, template: Mapping[str, str], gpu: Gpu) -> Terms:
    row_groups, key_groups, keys, split = (int(template[n]) for n in ("ROW_GROUPS", "KEY_GROUPS", "KEYS", "SPLIT"))
    turns = -(-launch.blocks // gpu.multiprocessors)
    outputs = int(template.get("OUTPUTS", 0))  # of a block, of the projection behind it: as much work as outputs / 2 keys
    seen = _keys(launch, int(template["HEADS"]), 256) - split * outputs // 2
    walked = turns * -(-seen // (split * key_groups * keys))
    operations = 64 * row_groups * 256 * (walked * key_groups * keys * 2 + turns * outputs) / gpu.known("bf16_rate")
    weights = 2.0 * launch.blocks * outputs * 256
    counts = {"cluster": (split > 1) * (2.0 if outputs else 1.0)}
    return Terms("attention_wgmma", counts, operations=operations, activations=launch.moved - weights, weights=weights)


def _keys(launch: Launch, heads: int, dims: int) -> int:
    """That a query sees: the schedule counts those of the cache in the operations alone."""
    _, kv_heads, images = launch.grid
    return round(launch.work / (4 * launch.sizes["tokens"] * images * heads * kv_heads * dims))


def _mma_sync_bf16(gpu: Gpu) -> float:
    return gpu.known("bf16_rate") * (MMA_SYNC_BF16 if gpu.has_wgmma else 1)


_TERMS = {
    **dict.fromkeys(("patches", "tokens", "normalize", "rotate_quantize", "hadamard_quantize", "rotary"), _rows),
    **dict.fromkeys(UNMEASURED, _rows),
    **dict.fromkeys(("linear_narrow", "flow_step"), _alone),
    **dict.fromkeys(("gemm_small", "gemm_float"), _few_tokens),
    **dict.fromkeys(("attention_split", "attention_tile"), _attention_shared),
    "attention": _attention,
    "gemm_wgmma": _gemm_wgmma,
    "gemm_wgmma_small": _gemm_wgmma_small,
    "gemm_large": _gemm_large,
    "attention_wgmma": _attention_wgmma,
    MATMUL.source: _matmul,
}
