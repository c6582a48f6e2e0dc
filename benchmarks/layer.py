"""Times a layer of the denoising loop as a chain: its six or seven kernels, 18 layers with weights and caches of their own.

    python -m benchmarks.layer

With attention and the output projection in one launch, and as two.

In a chain a kernel's weights load under the kernel ahead, if there is room for both: what is fastest alone need not be
fastest here. So the tactics for small M are chosen by this, one GEMM after the other while the rest stay: the
entries of plugins/tactics_sm90.json for M = 50 and of _FLOAT_TIMED in plugins/tactics.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.gemm_integer import time_us
from duq.plugins import kernels
from duq.plugins.gpu import gpu_of
from duq.plugins.kernels import GemmFloat, WgmmaSmall
from duq.plugins.tactics import SMALL_M, best, best_attention, best_float, projected_attention
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
ATTENTION = best_attention(DIMS, TOKENS, 1, GPU, PAST, TOKENS)
PROJECTED = projected_attention(HEADS, WIDTH, PAST, TOKENS, GPU)
IN_PLACE_OF = {"attention": "attention + o", "quantizer": "quantizer of parts"}  # where attention and o are one launch


class Layer:
    """A layer's operands, its input and the buffers between its kernels shared with the other layers."""

    def __init__(self, random: Callable[..., torch.Tensor], shared: dict[str, torch.Tensor]):
        def weight(n: int, k: int) -> torch.Tensor:
            return launch.pack_float_weight((random(n, k) / k**0.5).bfloat16())

        def integers(n: int, k: int) -> torch.Tensor:
            return torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, device="cuda")

        self.shared, self.tables = shared, launch.rotary_tables(1024, DIMS)
        self.qkv = weight((HEADS + 2) * DIMS, WIDTH)
        o = (random(WIDTH, HEADS * DIMS) / (HEADS * DIMS) ** 0.5).bfloat16()
        self.o, self.o_of_heads = launch.pack_float_weight(o), launch.pack_head_weight(o, PROJECTED)
        self.gate_up, self.down = integers(2 * MLP, WIDTH), integers(WIDTH, MLP)
        self.cache = random(PAST, 2 * DIMS).bfloat16()

    def launches(self, tactics: dict, projected: bool = False) -> dict[str, Callable[[], None]]:
        """By name, in order; `projected`: with attention and o as one launch."""
        every, others = self._every(tactics), IN_PLACE_OF.values()
        if not projected:
            return {name: call for name, call in every.items() if name not in others}
        names = [IN_PLACE_OF.get(name, name) for name in every if name not in ("o", *others)]
        return {name: every[name] for name in names}

    def _every(self, tactics: dict) -> dict[str, Callable[[], None]]:
        s, k, v = self.shared, slice(0, DIMS), slice(DIMS, 2 * DIMS)
        left = launch.ForNorm(s["normed"], s["gain"], s["squares"])
        return {
            "qkv": lambda: launch.gemm_float(
                tactics["qkv"], s["normed"], self.qkv, s["q"], s["own"][:, k], s["own"][:, v], n=(HEADS + 2) * DIMS,
                squares=s["squares"], epilogue="ROTARY", tables=self.tables, past=s["past"], overlap=True,
            ),
            "attention": lambda: launch.attention(
                ATTENTION, s["q"], self.cache[:, k], self.cache[:, v], s["mixed"], s["own"][:, k], s["own"][:, v],
                past=s["past"], cache_ready=True, overlap=True,
            ),
            "o": lambda: launch.gemm_float(
                tactics["o"], s["mixed"], self.o, s["x"], n=WIDTH, residual=s["x"], overlap=True
            ),
            "quantizer": lambda: launch.rotate_quantize(
                s["x"], s["x_q"], s["x_scale"], source="RMS_NORM", hadamard=GROUP, slab_tokens=SMALL_M, overlap=True
            ),
            "gate-up": lambda: launch.gemm(
                tactics["gate-up"], 4, s["x_q"], s["x_scale"], self.gate_up, s["gate_up_scale"], None, None, s["h"],
                n=2 * MLP, k=WIDTH, epilogue="GEGLU", overlap=True,
            ),
            "attention + o": lambda: launch.projected_attention(
                PROJECTED, s["q"], self.cache[:, k], self.cache[:, v], self.o_of_heads, s["parts"], s["own"][:, k],
                s["own"][:, v], past=s["past"], cache_ready=True, overlap=True,
            ),
            "quantizer of parts": lambda: launch.residual_quantize(
                s["x"], s["parts"], s["x"], s["x_q"], s["x_scale"], hadamard=GROUP, slab_tokens=SMALL_M, overlap=True
            ),
            "quantizer of down": lambda: launch.rotate_quantize(
                s["h"], s["h_q"], s["h_scale"], hadamard=GROUP, slab_tokens=SMALL_M, overlap=True
            ),
            "down": lambda: launch.gemm(
                tactics["down"], 4, s["h_q"], s["h_scale"], self.down, s["down_scale"], None, s["x"], s["x"],
                n=WIDTH, k=MLP, for_norm=left, overlap=True,
            ),
        }  # fmt: skip


def buffers(random: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device="cuda")

    x = random(TOKENS, WIDTH)
    return {
        "x": x, "normed": x.bfloat16(), "gain": torch.ones(WIDTH, device="cuda"),
        "squares": x.unflatten(1, (-1, 16)).square().sum(-1),
        "q": empty(TOKENS, HEADS * DIMS, dtype=torch.bfloat16), "mixed": empty(TOKENS, HEADS * DIMS, dtype=torch.bfloat16),
        "parts": empty(HEADS, TOKENS, WIDTH),
        "own": empty(TOKENS, 2 * DIMS, dtype=torch.bfloat16), "h": empty(TOKENS, MLP, dtype=torch.bfloat16),
        "x_q": empty(SMALL_M * WIDTH, dtype=torch.int8), "h_q": empty(SMALL_M * MLP, dtype=torch.int8),
        "x_scale": empty(TOKENS), "h_scale": empty(TOKENS), "past": torch.tensor([PAST], dtype=torch.int32, device="cuda"),
        "gate_up_scale": torch.full((2 * MLP,), 1e-3, device="cuda"),
        "down_scale": torch.full((WIDTH,), 2e-4, device="cuda"),
    }  # fmt: skip


def compile_all() -> None:
    wanted = [
        tactic.instance(TOKENS, SIZES[name][0], *KINDS[name]) for name, tactics in CANDIDATES.items() for tactic in tactics
    ]
    wanted += [ATTENTION.instance(TOKENS), PROJECTED.instance(TOKENS, HEADS, WIDTH)]
    wanted.append(kernels.residual_quantize(TOKENS, WIDTH, HEADS, GROUP))
    for depth, kind, source in ((WIDTH, "float", "RMS_NORM"), (MLP, "Bf16", "PLAIN")):
        wanted.append(kernels.rotate_quantize(TOKENS, depth, kind, source, GROUP))
    launch.compile_all(wanted)


def main() -> None:
    if launch.compute_capability() != GPU.sm:
        raise SystemExit("these kernels and tactics are for SM 90")
    compile_all()
    generator = torch.Generator("cuda").manual_seed(0)
    random = lambda *shape: torch.randn(shape, device="cuda", generator=generator)  # noqa: E731
    shared = buffers(random)
    layers = [Layer(random, shared) for _ in range(LAYERS)]

    def layer_us(tactics: dict, without: str = "", projected: bool = False) -> float:
        def run(layer: Layer) -> None:
            for name, call in layer.launches(tactics, projected).items():
                if name != without:
                    call()

        return time_us(run, layers)

    chosen = {
        "qkv": best_float(TOKENS, (HEADS + 2) * DIMS, WIDTH, GPU), "o": best_float(TOKENS, WIDTH, HEADS * DIMS, GPU),
        "gate-up": best(TOKENS, 2 * MLP, WIDTH, 4, GPU), "down": best(TOKENS, WIDTH, MLP, 4, GPU),
    }  # fmt: skip
    print(f"{torch.cuda.get_device_name()}; us a layer, with the tactics of the table: {layer_us(chosen):.2f}")
    for name, tactics in CANDIDATES.items():
        for us, tactic in sorted(
            ((layer_us(chosen | {name: tactic}), tactic) for tactic in tactics), key=lambda row: row[0]
        ):
            print(f"  {name:8} {us:6.2f}  {tactic}", flush=True)
    for projected in (False, True):
        whole = layer_us(chosen, projected=projected)
        saved = {name: whole - layer_us(chosen, name, projected) for name in layers[0].launches(chosen, projected)}
        print(
            f"attention and o as {'one launch' if projected else 'two'}: {whole:.2f} us a layer; leaving one out saves: ",
            end="",
        )
        print(", ".join(f"{name} {us:.1f}" for name, us in saved.items()))


if __name__ == "__main__":
    main()
