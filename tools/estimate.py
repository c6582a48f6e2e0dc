"""What a call of a policy should take on a GPU that is not at hand, for duq-profile --sm and --gpu.

A model, not a measurement: operations and bytes of every kernel against the GPU's rates. Integer products are estimated
by the tile that would run (plugins/bitblas.py); the other kernels by the larger of bytes over bandwidth and operations over
rate, plus the time a launch takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from duq.plugins import bitblas
from duq.plugins.gpu import Gpu, gpu_of
from duq.runtime.config import GemmaConfig, ModelConfig
from duq.runtime.plan import Plan

LAUNCH = 2e-6  # seconds of a kernel in a CUDA graph, beyond its work
REACHED = 0.75  # of the tensor cores' rate, by float products and attention
FLOAT = 2  # bytes of an activation


class Kernel(NamedTuple):
    part: str
    kind: str
    operations: float
    bytes: float
    seconds: float


def estimate(plan: Path, gpu: Gpu, cameras: int, prompt_tokens: int) -> Table:
    """For every part of a policy call: launches, operations, bytes and estimated time.

    Of the plan only sizes and what is quantized matter. Raises KernelError for a GPU whose rates are not public.
    """
    manifest = Plan(plan, verify=False).manifest
    config = ModelConfig.from_json(manifest["model"])
    return table(list(kernels(config, manifest, gpu, cameras, prompt_tokens)), gpu)


def kernels(config: ModelConfig, manifest: dict, device: Gpu, cameras: int, prompt_tokens: int) -> Iterator[Kernel]:
    """Every launch of a call."""
    gpu = Model(device)
    quantized = {name for name, linear in manifest["quantization"]["linears"].items() if linear["activation_bits"] == 8}
    vision, patches = config.vision, config.vision.tokens
    prefix = cameras * patches + prompt_tokens
    for _ in range(vision.depth):
        for n, k in ((3 * vision.width, vision.width), (vision.width, vision.width), (vision.mlp_width, vision.width),
                     (vision.width, vision.mlp_width)):  # fmt: skip
            yield gpu.float_linear("SigLIP", cameras * patches, n, k)
        yield gpu.attention("SigLIP", cameras * vision.heads, patches, patches, vision.width // vision.heads)
        yield from (gpu.elementwise("SigLIP", cameras * patches * vision.width) for _ in range(2))
    for layer in range(config.llm.depth):
        last = layer == config.llm.depth - 1  # of which only keys and values are computed
        yield from gpu.layer("LLM", "llm", config.llm, layer, prefix, prefix, quantized, only_cache=last)
    for _ in range(manifest["num_steps"]):
        for layer in range(config.expert.depth):
            keys = prefix + config.action_horizon + (0 if config.pi05 else 1)
            yield from gpu.layer("expert", "expert", config.expert, layer, config.action_horizon, keys, quantized)


class Model:
    """The kernels of one GPU and their times."""

    def __init__(self, device: Gpu):
        device.known("int8_rate")  # refuse before any work
        self.device, self.bf16 = device, 2 * device.known("bf16_rate") * device.multiprocessors * device.clock

    def layer(self, part: str, model: str, config: GemmaConfig, layer: int, m: int, keys: int, quantized: set[str],
              only_cache: bool = False) -> Iterator[Kernel]:  # fmt: skip
        """A layer of Gemma for m tokens that see `keys`: the products that plugins or TensorRT run, and what is between."""
        heads, cache = config.heads * config.head_dim, 2 * config.kv_heads * config.head_dim
        linears = [("self_attn.k_proj", cache if only_cache else heads + cache, config.width)]
        if not only_cache:
            linears += [("self_attn.o_proj", config.width, heads), ("mlp.gate_proj", 2 * config.mlp_width, config.width),
                        ("mlp.down_proj", config.width, config.mlp_width)]  # fmt: skip
        for name, n, k in linears:
            if f"{model}.layers.{layer}.{name}" in quantized:
                read = 2 * k if name == "mlp.down_proj" else k  # gate and up
                yield self.moved(part, "prologues", m * (FLOAT * read + k), rotations(m, k))
                yield self.integer_linear(part, m, n, k)
                residual = FLOAT if name in ("self_attn.o_proj", "mlp.down_proj") else 0
                yield self.moved(part, "epilogues", m * n * (4 + FLOAT + residual), 2 * m * n)
            else:
                yield self.float_linear(part, m, n, k)
                yield self.elementwise(part, m * config.width)  # the norm before it or the sum behind it
        if not only_cache:
            yield self.attention(part, config.heads, m, keys, config.head_dim)
        yield self.elementwise(part, m * (heads + cache))  # the rotary embedding

    def integer_linear(self, part: str, m: int, n: int, k: int) -> Kernel:
        tile = bitblas.best(m, n, k, self.device if self.device.sm in bitblas.SMS else gpu_of(86))
        moved = n * k / 2 + m * k + 4 * m * n
        return Kernel(part, "integer products", 2 * m * n * k, moved, bitblas.estimate(tile, m, n, k, self.device))

    def float_linear(self, part: str, m: int, n: int, k: int) -> Kernel:
        moved = FLOAT * (n * k + m * k + m * n)
        return self.product(part, "float products", 2 * m * n * k, moved)

    def attention(self, part: str, heads: int, queries: int, keys: int, dims: int) -> Kernel:
        return self.product(
            part, "attention", 4 * heads * queries * keys * dims, FLOAT * 2 * (heads * queries + keys) * dims
        )

    def elementwise(self, part: str, elements: int) -> Kernel:
        return self.moved(part, "norms, rotary embeddings, sums", 3 * FLOAT * elements, elements)

    def product(self, part: str, kind: str, operations: float, moved: float) -> Kernel:
        seconds = max(operations / (REACHED * self.bf16), moved / self.device.memory_bandwidth)
        return Kernel(part, kind, operations, moved, seconds + LAUNCH)

    def moved(self, part: str, kind: str, moved: float, operations: float) -> Kernel:
        return Kernel(part, kind, operations, moved, moved / self.device.memory_bandwidth + LAUNCH)


def rotations(m: int, k: int, block: int = 64) -> float:
    """Additions of a block Hadamard."""
    return m * k * (block.bit_length() - 1)


def table(work: list[Kernel], gpu: Gpu) -> Table:
    title = f"An estimate for {gpu.name} (SM {gpu.sm}), not a measurement"
    result = Table("part", "what", title=title, title_justify="left")
    for column in ("launches", "operations", "bytes", "ms"):
        result.add_column(column, justify="right")
    for part in dict.fromkeys(each.part for each in work):
        own = [each for each in work if each.part == part]
        for kind in dict.fromkeys(each.kind for each in own):
            _add_row(result, part, kind, [each for each in own if each.kind == kind])
        _add_row(result, part, "together", own, end_section=True)
    _add_row(result, "the call", "", work)
    return result


def _add_row(result: Table, part: str, kind: str, chosen: list[Kernel], **options) -> None:
    operations, moved = sum(each.operations for each in chosen), sum(each.bytes for each in chosen)
    seconds = sum(each.seconds for each in chosen)
    numbers = f"{len(chosen)}", f"{operations / 1e9:,.1f} G", f"{moved / 1e6:,.0f} MB", f"{1e3 * seconds:.2f}"
    result.add_row(part, kind, *numbers, **options)
