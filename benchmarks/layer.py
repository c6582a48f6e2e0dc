"""Times a layer of the denoising loop as a chain: its seven kernels, 18 layers with weights and caches of their own.

    python -m benchmarks.layer                  # of SM 90's program
    python -m benchmarks.layer --program 86     # of another's: kernels one after the other, and a layer as one launch

In a chain a kernel's weights load under the kernel ahead, if there is room for both: what is fastest alone need not be
fastest here. So the tactics for small M are chosen by this, one GEMM after the other while the rest stay: the
entries of plugins/tactics_sm90.json for M = 50 and of _FLOAT_TIMED in plugins/tactics.py.
Without programmatic launch, the seven kernels are one launch (plugins/cuda/chain.cu), whose results are compared bit for bit.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from benchmarks.gemm_integer import time_us
from duq.plugins import kernels
from duq.plugins.gpu import Gpu, gpu_of
from duq.plugins.kernels import GemmFloat, WgmmaAttention, WgmmaSmall, chain
from duq.plugins.tactics import SMALL_M, best, best_attention, best_float
from tests.support import launch

LAYERS, TOKENS, PAST = 18, 50, 817
WIDTH, HEADS, MLP, DIMS = 1024, 8, 4096, 256
GROUP = 64  # of the Hadamard
TOKENS8 = -(-TOKENS // 8)
CANDIDATES = {
    "gate-up": [WgmmaSmall(8, stages, groups) for stages, groups in ((4, 1), (6, 1), (8, 1), (6, 2), (8, 2))],
    "down": [WgmmaSmall(8, *tile) for tile in ((8, 1, 4), (6, 1, 4), (8, 2, 4), (4, 1, 8), (4, 2, 4))],
    "qkv": [
        GemmFloat(*tile) for tile in ((4, TOKENS8, 4, 1, 4), (2, TOKENS8, 8, 1), (2, TOKENS8, 8, 2), (4, TOKENS8, 8, 1, 2))
    ],
    "o": [GemmFloat(*tile) for tile in ((1, TOKENS8, 8, 1, 2), (1, TOKENS8, 8, 2, 2), (2, TOKENS8, 8, 1, 4))],
}
SIZES = {"qkv": ((HEADS + 2) * DIMS, WIDTH), "o": (WIDTH, HEADS * DIMS), "gate-up": (2 * MLP, WIDTH), "down": (WIDTH, MLP)}
KINDS = {  # what the tactic's instance is made with, behind M and N
    "qkv": ("Bf16", True, "ROTARY"),
    "o": ("float", False, "NONE"),
    "gate-up": (4, "Bf16", "GEGLU"),
    "down": (4, "float"),
}
GPU = gpu_of(90)
LEFT = "x", "normed", "squares"  # by a layer for the next


class Layer:
    """A layer's operands, its input and the buffers between its kernels shared with the other layers."""

    def __init__(self, random: Callable[..., torch.Tensor], shared: dict[str, torch.Tensor]):
        def weight(n: int, k: int) -> torch.Tensor:
            return launch.pack_float_weight((random(n, k) / k**0.5).bfloat16())

        def integers(n: int, k: int) -> torch.Tensor:
            return torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, device="cuda")

        self.shared, self.tables = shared, launch.rotary_tables(1024, DIMS)
        self.qkv, self.o = weight((HEADS + 2) * DIMS, WIDTH), weight(WIDTH, HEADS * DIMS)
        self.gate_up, self.down = integers(2 * MLP, WIDTH), integers(WIDTH, MLP)
        self.cache = random(len(shared["positions"]), 2 * DIMS).bfloat16()

    def launches(self, tactics: dict) -> dict[str, Callable[[], None]]:
        s, k, v = self.shared, slice(0, DIMS), slice(DIMS, 2 * DIMS)
        overlap, slab_tokens = launch.gpu().has_pdl, tactics["gate-up"].slab_tokens
        left = launch.ForNorm(s["normed"], s["gain"], s["squares"])
        return {
            "qkv": lambda: launch.gemm_float(
                tactics["qkv"], s["normed"], self.qkv, s["q"], s["own"][:, k], s["own"][:, v], n=(HEADS + 2) * DIMS,
                squares=s["squares"], epilogue="ROTARY", tables=self.tables, past=s["past"], overlap=overlap,
            ),
            "attention": lambda: launch.attention(
                tactics["attention"], s["q"], self.cache[:, k], self.cache[:, v], s["mixed"], s["own"][:, k], s["own"][:, v],
                past=s["past"], cache_ready=True, overlap=overlap,
            ),
            "o": lambda: launch.gemm_float(
                tactics["o"], s["mixed"], self.o, s["x"], n=WIDTH, residual=s["x"], overlap=overlap
            ),
            "quantizer": lambda: launch.rotate_quantize(
                s["x"], s["x_q"], s["x_scale"], source="RMS_NORM", hadamard=GROUP, slab_tokens=slab_tokens, overlap=overlap
            ),
            "gate-up": lambda: launch.gemm(
                tactics["gate-up"], 4, s["x_q"], s["x_scale"], self.gate_up, s["gate_up_scale"], None, None, s["h"],
                n=2 * MLP, k=WIDTH, epilogue="GEGLU", overlap=overlap,
            ),
            "quantizer of down": lambda: launch.rotate_quantize(
                s["h"], s["h_q"], s["h_scale"], hadamard=GROUP, slab_tokens=slab_tokens, overlap=overlap
            ),
            "down": lambda: launch.gemm(
                tactics["down"], 4, s["h_q"], s["h_scale"], self.down, s["down_scale"], None, s["x"], s["x"],
                n=WIDTH, k=MLP, for_norm=left, overlap=overlap,
            ),
        }  # fmt: skip

    def recorded(self, tactics: dict) -> list[launch.Recorded]:
        with launch.recorded() as made:
            for call in self.launches(tactics).values():
                call()
        return made


def chosen_for(gpu: Gpu, past: int = PAST) -> dict:
    """The tactics of a GPU's program, by kernel."""
    return {
        "attention": best_attention(DIMS, TOKENS, 1, gpu, past, TOKENS),
        "qkv": best_float(TOKENS, (HEADS + 2) * DIMS, WIDTH, gpu), "o": best_float(TOKENS, WIDTH, HEADS * DIMS, gpu),
        "gate-up": best(TOKENS, 2 * MLP, WIDTH, 4, gpu), "down": best(TOKENS, WIDTH, MLP, 4, gpu),
    }  # fmt: skip


def chains(layers: list[Layer], tactics: dict, residents: int | None = None) -> list[launch.Recorded]:
    """A launch for each layer, to be made in turn, again and again."""
    links = torch.zeros(len(layers), chain.MOST_PARTS, dtype=torch.int32, device="cuda")
    parts = [layer.recorded(tactics) for layer in layers]
    fitting = residents or chain.residents([each.instance for each in parts[0]], launch.gpu())
    return [launch.chained(each, links[index], links[index - 1], fitting) for index, each in enumerate(parts)]


def result(shared: dict[str, torch.Tensor], run: Callable[[], None]) -> list[torch.Tensor]:
    """What the last layer leaves when they run from the state that the buffers have, which is there again afterwards."""
    before = {name: shared[name].clone() for name in LEFT}
    run()
    found = [shared[name].clone() for name in (*LEFT, "own", "h_q")]
    for name, value in before.items():
        shared[name].copy_(value)
    return found


def buffers(random: Callable[..., torch.Tensor], past: int = PAST) -> dict[str, torch.Tensor]:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device="cuda")

    x = random(TOKENS, WIDTH)
    return {
        "x": x, "normed": x.bfloat16(), "gain": torch.ones(WIDTH, device="cuda"),
        "squares": x.unflatten(1, (-1, 16)).square().sum(-1),
        "q": empty(TOKENS, HEADS * DIMS, dtype=torch.bfloat16), "mixed": empty(TOKENS, HEADS * DIMS, dtype=torch.bfloat16),
        "own": empty(TOKENS, 2 * DIMS, dtype=torch.bfloat16), "h": empty(TOKENS, MLP, dtype=torch.bfloat16),
        "x_q": empty(SMALL_M * WIDTH, dtype=torch.int8), "h_q": empty(SMALL_M * MLP, dtype=torch.int8),
        "x_scale": empty(TOKENS), "h_scale": empty(TOKENS), "past": torch.tensor([past], dtype=torch.int32, device="cuda"),
        "positions": torch.arange(past),
        "gate_up_scale": torch.full((2 * MLP,), 1e-3, device="cuda"),
        "down_scale": torch.full((WIDTH,), 2e-4, device="cuda"),
    }  # fmt: skip


def compile_all(attention: WgmmaAttention) -> None:
    wanted = [
        tactic.instance(TOKENS, SIZES[name][0], *KINDS[name]) for name, tactics in CANDIDATES.items() for tactic in tactics
    ]
    wanted.append(attention.instance(TOKENS))
    for depth, kind, source in ((WIDTH, "float", "RMS_NORM"), (MLP, "Bf16", "PLAIN")):
        wanted.append(kernels.rotate_quantize(TOKENS, depth, kind, source, GROUP))
    launch.compile_all(wanted)


def layers_of(past: int = PAST, count: int = LAYERS) -> tuple[list[Layer], dict[str, torch.Tensor]]:
    """Layers with random weights and caches of `past` tokens, and the buffers that they share."""
    generator = torch.Generator("cuda").manual_seed(0)
    random = lambda *shape: torch.randn(shape, device="cuda", generator=generator)  # noqa: E731
    shared = buffers(random, past)
    return [Layer(random, shared) for _ in range(count)], shared


def time_program(sm: int) -> None:
    """Of a GPU without programmatic launch, on this one: a layer's kernels one after the other, and as one launch."""
    with launch.program(sm) as image:
        tactics = chosen_for(image.gpu)
        layers, shared = layers_of()

        def one_by_one(layer: Layer) -> None:
            for call in layer.launches(tactics).values():
                call()

        chained = chains(layers, tactics)
        expected = result(shared, lambda: [one_by_one(layer) for layer in layers])
        found = result(shared, lambda: [launch.run(*each) for each in chained])
        same = all(map(torch.equal, expected, found))
        print(f"{torch.cuda.get_device_name()}, the program of SM {sm}: {time_us(one_by_one, layers):.2f} us a layer")
        us = time_us(lambda each: launch.run(*each), chained)
        print(f"as one launch: {us:.2f} us, {'the same bits' if same else 'OTHER BITS'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--program", type=int, metavar="SM", default=GPU.sm)
    if (sm := parser.parse_args().program) != GPU.sm:
        time_program(sm)
        return
    if launch.compute_capability() != GPU.sm:
        raise SystemExit("these kernels and tactics are for SM 90")
    chosen = chosen_for(GPU)
    compile_all(chosen["attention"])
    layers, _ = layers_of()

    def layer_us(tactics: dict, without: str = "") -> float:
        def run(layer: Layer) -> None:
            for name, call in layer.launches(tactics).items():
                if name != without:
                    call()

        return time_us(run, layers)

    print(f"{torch.cuda.get_device_name()}; us a layer, with the tactics of the table: {layer_us(chosen):.2f}")
    for name, tactics in CANDIDATES.items():
        for us, tactic in sorted(
            ((layer_us(chosen | {name: tactic}), tactic) for tactic in tactics), key=lambda row: row[0]
        ):
            print(f"  {name:8} {us:6.2f}  {tactic}", flush=True)
    whole = layer_us(chosen)
    saved = {name: whole - layer_us(chosen, name) for name in layers[0].launches(chosen)}
    print("leaving one out saves: " + ", ".join(f"{name} {us:.1f}" for name, us in saved.items()))


if __name__ == "__main__":
    main()
