"""Times the candidate tactics of the action expert's float linears beside torch, and the attention linears in a chain.

    python -m benchmarks.gemm_float [--json FILE]

Weights rotate through more memory than L2 holds and launches are replayed from a CUDA graph. Every tactic's accumulators
are checked. "overlap" is with programmatic dependent launch, which is how the policy runs them.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gemm_integer import copies_of, time_us
from duq.plugins.kernel import Instance
from duq.plugins.kernels import GemmFloat
from duq.plugins.tactics import float_candidates
from tests.gpu.test_gemm_float import DIMS, HEADS, operands
from tests.support import launch

LAYERS = 18


@dataclass(frozen=True)
class Linear:
    name: str
    m: int
    n: int
    k: int
    y_type: torch.dtype = torch.bfloat16
    norm: bool = False
    epilogue: str = "NONE"
    residual: bool = False

    def instances(self, tactic: GemmFloat) -> list[Instance]:
        """The one that is timed, and the one whose error is looked at."""
        timed = tactic.instance(self.m, self.n, launch.TYPES[self.y_type], self.norm, self.epilogue)
        return [timed, tactic.instance(self.m, self.n, "float", self.norm, "NONE")]


QKV = {"norm": True, "epilogue": "ROTARY"}
LINEARS = [
    Linear("qkv", 50, 2560, 1024, **QKV),
    Linear("o", 50, 1024, 2048, y_type=torch.float32, residual=True),
    Linear("time MLP", 50, 1024, 1024, epilogue="SILU"),
    Linear("time MLP", 1, 1024, 1024, epilogue="SILU"),
    Linear("gate-up", 50, 8192, 1024, norm=True, epilogue="GEGLU"),
    Linear("down", 50, 1024, 4096, y_type=torch.float32, residual=True),
]


class Operands:
    """Of one linear; `weights` are packed copies of one weight."""

    def __init__(self, linear: Linear, copies: int | None = None):
        self.linear, m, n = linear, linear.m, linear.n
        self.plain = operands(m, n, linear.k)
        packed = launch.pack_float_weight(self.plain.weight)
        self.weights = copies_of(packed) if copies is None else [packed.clone() for _ in range(copies)]
        width = {"ROTARY": HEADS * DIMS, "GEGLU": n // 2}.get(linear.epilogue, n)
        self.y = torch.zeros(m, width, dtype=linear.y_type, device="cuda")
        self.kv = torch.zeros(m, 2 * DIMS, dtype=torch.bfloat16, device="cuda")
        self.tables = launch.rotary_tables(1024, DIMS)

    def run(self, tactic: GemmFloat, weight: torch.Tensor, x: torch.Tensor | None = None, **settings) -> None:
        linear = self.linear
        if linear.epilogue == "ROTARY":
            settings |= {"k": self.kv[:, :DIMS], "v": self.kv[:, DIMS:], "tables": self.tables, "first_position": 816}
        if linear.residual:
            settings["residual"] = self.y
        settings |= {"n": linear.n, "epilogue": linear.epilogue, "squares": self.plain.squares if linear.norm else None}
        launch.gemm_float(tactic, self.plain.x if x is None else x, weight, self.y, **settings)

    def error(self, tactic: GemmFloat) -> float:
        """Of the accumulators, which come out as they are without an epilogue, relative to exact ones."""
        linear, x = self.linear, self.plain.x.double()
        squares = self.plain.squares if linear.norm else None
        x = x if squares is None else x * torch.rsqrt(squares.double().sum(-1, keepdim=True) / linear.k + 1e-6)
        exact = x @ self.plain.weight.double().T
        y = torch.empty(linear.m, linear.n, dtype=torch.float32, device="cuda")
        launch.gemm_float(tactic, self.plain.x, self.weights[0], y, n=linear.n, squares=squares)
        return float((y - exact).norm() / exact.norm())


def torch_us(linear: Linear) -> tuple[float, float]:
    """torch's bf16 GEMM, and with RMSNorm of a float32 x ahead of it."""
    x = torch.randn(linear.m, linear.k, device="cuda")
    weights = copies_of(torch.randn(linear.n, linear.k, device="cuda").bfloat16())
    functional = torch.nn.functional
    rounded = x.bfloat16()
    gemm = time_us(lambda w: functional.linear(rounded, w), weights)
    both = time_us(lambda w: functional.linear(functional.rms_norm(x, (linear.k,)).bfloat16(), w), weights)
    return gemm, both


def bench(linear: Linear) -> dict:
    o = Operands(linear)
    timed = []
    for tactic in float_candidates(linear.m, linear.n, linear.k, launch.gpu()):
        error = o.error(tactic)
        assert error < 3e-3, f"{tactic} is wrong for {linear}: {error}"
        us = time_us(lambda w, t=tactic: o.run(t, w), o.weights)
        overlapped = time_us(lambda w, t=tactic: o.run(t, w, overlap=True), o.weights)
        timed.append((us, overlapped, tactic))
    timed.sort(key=lambda entry: entry[1])
    gemm, both = torch_us(linear)
    us, overlapped, tactic = timed[0]
    print(
        f"{linear.name:14s} {f'{linear.m}x{linear.n}x{linear.k}':>12s} {us:6.2f} {overlapped:7.2f} "
        f"{2e-3 * linear.n * linear.k / overlapped:6.0f} {gemm:8.2f} {both:9.2f}  {tactic}",
        flush=True,
    )
    every = [(*(round(us, 2) for us in times), repr(tactic)) for *times, tactic in timed]
    return {"linear": repr(linear), "torch_us": gemm, "torch_with_norm_us": both, "all": every, "best": tactic}


def bench_chain(qkv: Linear, o: Linear, tactics: tuple[GemmFloat, GemmFloat]) -> None:
    """One denoising step's attention linears, each on the output of the one ahead: us a layer."""
    first, second = Operands(qkv, copies=LAYERS), Operands(o, copies=LAYERS)
    second.y.copy_(first.plain.stream)
    left = launch.ForNorm(first.plain.x, None, first.plain.squares)
    layers = list(zip(first.weights, second.weights, strict=True))

    def run(weights: tuple, overlap: bool) -> None:
        first.run(tactics[0], weights[0], overlap=overlap)
        second.run(tactics[1], weights[1], x=first.y, for_norm=left, overlap=overlap)

    functional = torch.nn.functional
    plain = [(first.plain.weight.clone(), second.plain.weight.clone()) for _ in range(LAYERS)]

    def run_torch(weights: tuple) -> None:
        q = functional.linear(functional.rms_norm(second.y, (qkv.k,)).bfloat16(), weights[0])
        second.y.add_(functional.linear(q[:, : o.k], weights[1]))

    plain_us, overlapped = (time_us(lambda w, f=f: run(w, f), layers) for f in (False, True))
    torch_layer = time_us(run_torch, plain)
    print(
        f"{LAYERS} layers of qkv, o: {plain_us:.2f} us a layer, {overlapped:.2f} overlapped; "
        f"torch without rotary {torch_layer:.2f}"
    )


def compile_all() -> None:
    launch.compile_all(
        instance
        for linear in LINEARS
        for tactic in float_candidates(linear.m, linear.n, linear.k, launch.gpu())
        for instance in linear.instances(tactic)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="all timings")
    options = parser.parse_args()
    compile_all()
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda)
    print(f"{'linear':14s} {'M x N x K':>12s}     us overlap   GB/s torch us with norm  tactic")
    results = [bench(linear) for linear in LINEARS]
    if options.json:
        options.json.write_text(json.dumps(results, indent=1, default=repr))
    best = {linear.name: result["best"] for linear, result in zip(LINEARS, results, strict=True)}
    bench_chain(LINEARS[0], LINEARS[1], (best["qkv"], best["o"]))


if __name__ == "__main__":
    main()
