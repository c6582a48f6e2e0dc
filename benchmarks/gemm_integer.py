"""Times every candidate tactic of the policy's GEMMs, checks each, and prints the best beside torch's GEMMs.

    python -m benchmarks.gemm_integer [--only expert|prefix|vision] [--bits 4 8] [--json FILE] [--table FILE]

Weights are rotated through more memory than L2 holds and launches are replayed from a CUDA graph. Every tactic's bf16
output is compared bit for bit with the definition; the best one's int32 output with the exact accumulators.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
from functools import partial
from pathlib import Path

import torch

from duq.plugins.tactics import Tactic, candidates
from tests.support import launch

EXPERT = {"qkv": (2560, 1024), "o": (1024, 2048), "gate-up": (8192, 1024), "down": (1024, 4096)}
PREFIX = {"qkv": (2560, 2048), "o": (2048, 2048), "gate-up": (32768, 2048), "down": (2048, 16384)}
VISION = {"qkv": (3456, 1152), "out": (1152, 1152), "fc1": (4352, 1152), "fc2": (1152, 4352)}  # 4304 channels padded
ROTATED_BYTES = 256 << 20  # five times the L2 of an H100


def problems(only: str | None) -> list[tuple[str, int, int, int]]:
    """Of the expert and the prefix; the vision's are in float by default, and tried where asked for."""
    if only == "vision":
        return [(f"vision {name}", m, *shape) for m in (256, 512, 768) for name, shape in VISION.items()]
    chosen = []
    if only != "prefix":
        chosen += [(f"expert {name}", 50, *shape) for name, shape in EXPERT.items()]
    if only != "expert":
        chosen += [(f"prefix {name}", m, *shape) for name, shape in PREFIX.items() for m in (306, 562, 816)]
    return chosen


def copies_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    count = max(2, ROTATED_BYTES // tensor.nbytes)
    return list(tensor.expand(count, *tensor.shape).contiguous())


def time_us(call, weights: list) -> float:
    """Median time of one call, each on the next copy of the weights."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(weights[0])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for weight in weights:
                call(weight)
        times = []
        for _ in range(9):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            times.append(1000 * start.elapsed_time(stop) / len(weights))
    return statistics.median(times[2:])


class Operands:
    """Random integers of one GEMM and its exact results."""

    def __init__(self, m: int, n: int, k: int, bits: int):
        generator = torch.Generator("cuda").manual_seed(0)
        low = -(2 ** (bits - 1))
        self.n, self.k, self.bits = n, k, bits
        self.x_q = torch.randint(-128, 128, (m, k), dtype=torch.int8, device="cuda", generator=generator)
        self.weight = torch.randint(low, -low, (n, k), dtype=torch.int8, device="cuda", generator=generator)
        self.x_q[0], self.weight[0] = -128, low
        self.x_scale = torch.rand(m, device="cuda", generator=generator) * 1e-2
        self.weight_scale = torch.rand(n, device="cuda", generator=generator) * 1e-2
        self.acc = self.x_q.double() @ self.weight.double().T  # below 2^53, hence exact
        self.y = ((self.acc.float() * self.weight_scale) * self.x_scale[:, None]).bfloat16()

    def launch(self, tactic: Tactic, x, packed, y, overlap: bool = False) -> None:
        scales = self.x_scale, packed, self.weight_scale
        launch.gemm(tactic, self.bits, x, *scales, None, None, y, n=self.n, k=self.k, overlap=overlap)


def time_tactics(m: int, n: int, k: int, bits: int) -> tuple[list[tuple[float, Tactic]], float, bool]:
    """Times and tactics, the fastest first; the fastest's time with overlapped launches; whether it is exact."""
    operands = Operands(m, n, k, bits)
    packed, timed = {}, []
    for tactic in candidates(m, n, k, bits, launch.gpu()):
        if tactic.layout not in packed:
            packed[tactic.layout] = copies_of(launch.pack_weight(operands.weight, tactic, bits))
        x = launch.arrange_activations(operands.x_q, tactic)
        y = torch.full((m, n), math.nan, dtype=torch.bfloat16, device="cuda")
        us = time_us(lambda w, tactic=tactic, x=x, y=y: operands.launch(tactic, x, w, y), packed[tactic.layout])
        assert torch.equal(y, operands.y), f"{tactic} is wrong at {m} x {n} x {k}"
        timed.append((us, tactic))
    timed.sort(key=lambda entry: entry[0])
    tactic = timed[0][1]
    x = launch.arrange_activations(operands.x_q, tactic)
    overlapped = time_us(lambda w: operands.launch(tactic, x, w, y, overlap=True), packed[tactic.layout])
    acc = torch.full((m, n), 0x7FFFFFFF, dtype=torch.int32, device="cuda")
    operands.launch(tactic, x, packed[tactic.layout][0], acc)
    return timed, overlapped, torch.equal(acc.double(), operands.acc)


def bench(name: str, m: int, n: int, k: int, bits: int) -> dict:
    timed, overlapped, exact = time_tactics(m, n, k, bits)
    x = torch.randn(m, k, device="cuda").bfloat16()
    bf16 = time_us(lambda w: torch.nn.functional.linear(x, w), copies_of(torch.randn(n, k, device="cuda").bfloat16()))
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8, device="cuda")
    int8 = copies_of(torch.randint(-128, 128, (n, k), dtype=torch.int8, device="cuda"))
    int_mm = time_us(lambda w: torch._int_mm(x, w.T), int8)
    us, tactic = timed[0]
    return {"name": name, "m": m, "n": n, "k": k, "bits": bits, "best": tactic, "us": us} | {
        "overlapped_us": overlapped,
        "exact": exact,
        "bf16_us": bf16,
        "int_mm_us": int_mm,
        "tops": 2e-6 * m * n * k / us,
        "gb_s": 1e-3 * (n * k * bits / 8 + m * k + 2 * m * n) / us,
        "all": [(round(time, 2), repr(other)) for time, other in timed],
    }


def bench_mlp(m: int, width: int, hidden: int, gate_up: Tactic, down: Tactic) -> dict:
    """A W4A8 MLP: norm + quantize, gate-up + GeGLU, quantize, down + residual; and torch's in bf16."""
    first_bytes, second_bytes = width * hidden, width * hidden // 2
    sets = max(2, ROTATED_BYTES // (first_bytes + second_bytes))
    weights = list(torch.randint(0, 256, (sets, first_bytes + second_bytes), dtype=torch.uint8, device="cuda"))
    scales = torch.rand(2 * hidden, device="cuda") * 1e-3
    x = torch.randn(m, width, device="cuda").bfloat16()
    h = torch.empty(m, hidden, dtype=torch.bfloat16, device="cuda")
    x_scale = torch.empty(m, device="cuda")

    def prologue(floats: torch.Tensor, consumer: Tactic, **stages):
        """The launch that quantizes `floats` for the GEMM `consumer`, and its INT8 output."""
        block = consumer.slab_tokens or 1
        padded = -(-m // block) * block
        x_q = torch.empty(padded * floats.shape[1], dtype=torch.int8, device="cuda")
        stages |= {"hadamard": 64, "slab_tokens": padded if consumer.slab_tokens else 0}
        return partial(launch.rotate_quantize, floats, x_q, x_scale, **stages), x_q

    quantize_x, x_q = prologue(x, gate_up, source="RMS_NORM")
    quantize_h, h_q = prologue(h, down)

    def run_gate_up(weight, overlap=False):
        sizes = {"n": 2 * hidden, "k": width}
        launch.gemm(gate_up, 4, x_q, x_scale, weight, scales, None, None, h, **sizes, epilogue="GEGLU", overlap=overlap)

    def run_mlp(weight, overlap=False):
        quantize_x(overlap=overlap)
        run_gate_up(weight, overlap)
        quantize_h(overlap=overlap)
        sizes = {"n": width, "k": hidden}
        launch.gemm(down, 4, h_q, x_scale, weight[first_bytes:], scales, None, x, x, **sizes, overlap=overlap)

    def torch_mlp(weight):
        gate, up = (torch.nn.functional.rms_norm(x, (width,)) @ weight[: 2 * hidden].T).chunk(2, -1)
        return x + (torch.nn.functional.gelu(gate, approximate="tanh") * up) @ weight[2 * hidden :]

    bf16 = torch.randn(3 * hidden, width, device="cuda").bfloat16() / 32
    return {
        "MLP": time_us(run_mlp, weights),
        "overlapped": time_us(partial(run_mlp, overlap=True), weights),
        "of it norm + quantize": time_us(lambda _: quantize_x(), weights),
        "gate-up + GeGLU": time_us(run_gate_up, weights),
        "quantize": time_us(lambda _: quantize_h(), weights),
        "torch bf16": time_us(torch_mlp, copies_of(bf16)),
    }


def table_row(result: dict) -> dict:
    """A row of the table that plugins.tactics.best reads."""
    chosen = {key: result[key] for key in ("m", "n", "k", "bits")}
    parameters = list(dataclasses.asdict(result["best"]).values())
    return chosen | {"kernel": type(result["best"]).__name__, "parameters": parameters, "us": round(result["us"], 2)}


def compile_all(chosen: list, bits: list[int]) -> None:
    launch.compile_all(
        tactic.instance(m, n, width, "Bf16")
        for _, m, n, k in chosen
        for width in bits
        for tactic in candidates(m, n, k, width, launch.gpu())
    )


HEADER = f"{'GEMM':15s} {'M x N x K':>17s} bits      us overlap   TOPS   GB/s exact  bf16 us  _int_mm vs bf16  tactic"


def row(r: dict) -> str:
    shape = f"{r['m']}x{r['n']}x{r['k']}"
    return (
        f"{r['name']:15s} {shape:>17s} {r['bits']:4d} {r['us']:7.2f} {r['overlapped_us']:7.2f} {r['tops']:6.0f} "
        f"{r['gb_s']:6.0f} {'yes' if r['exact'] else 'NO':>5s} {r['bf16_us']:8.2f} {r['int_mm_us']:8.2f} "
        f"{r['bf16_us'] / r['us']:6.2f}x  {r['best']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["expert", "prefix", "vision"])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8], choices=[4, 8])
    parser.add_argument("--json", type=Path, help="all timings")
    parser.add_argument("--table", type=Path, help="the best of each, as plugins/tactics_sm90.json")
    options = parser.parse_args()
    chosen = problems(options.only)
    compile_all(chosen, options.bits)
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda)
    print(HEADER)
    results = []
    for problem in chosen:
        for bits in options.bits:
            results.append(bench(*problem, bits))
            print(row(results[-1]), flush=True)
    tactics = {(r["name"], r["m"], r["bits"]): r["best"] for r in results}
    for part, m, width, hidden in (("expert", 50, 1024, 4096), ("prefix", 816, 2048, 16384)):
        if (f"{part} down", m, 4) in tactics:
            gate_up, down = (tactics[f"{part} {name}", m, 4] for name in ("gate-up", "down"))
            times = bench_mlp(m, width, hidden, gate_up, down)
            print(f"{part} at M = {m}, us:", ", ".join(f"{name} {us:.1f}" for name, us in times.items()))
    if options.table:
        options.table.write_text("[\n" + ",\n".join(json.dumps(table_row(r)) for r in results) + "\n]\n")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1, default=repr))


if __name__ == "__main__":
    main()
