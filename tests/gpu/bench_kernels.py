"""Times every candidate tactic of the policy's GEMMs, checks each, and prints the best beside torch's GEMMs.

    python tests/gpu/bench_kernels.py [--only expert|prefix] [--bits 4 8] [--json results.json] [--table table.json]

Weights are rotated through more memory than L2 holds and launches are replayed from a CUDA graph. Every tactic's bf16
output is compared bit for bit with the definition; the best one's int32 output with the exact sums.
"""
from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from plugins.kernels import compile_cubin
from plugins.tactics import candidates
from tests.gpu import launch

EXPERT = {"qkv": (2560, 1024), "o": (1024, 2048), "gate-up": (8192, 1024), "down": (1024, 4096)}
PREFIX = {"qkv": (2560, 2048), "o": (2048, 2048), "gate-up": (32768, 2048), "down": (2048, 16384)}
ROTATED_BYTES = 256 << 20  # five times the L2 of an H100


def problems(only: str | None) -> list[tuple[str, int, int, int]]:
    chosen = []
    if only != "prefix":
        chosen += [(f"expert {name}", m, *shape) for name, shape in EXPERT.items() for m in (50,)]
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


def bench(name: str, m: int, n: int, k: int, bits: int) -> dict:
    generator = torch.Generator("cuda").manual_seed(0)
    low = -(2 ** (bits - 1))
    x_q = torch.randint(-128, 128, (m, k), dtype=torch.int8, device="cuda", generator=generator)
    weight = torch.randint(low, -low, (n, k), dtype=torch.int8, device="cuda", generator=generator)
    x_q[0], weight[0] = -128, low
    x_scale = torch.rand(m, device="cuda", generator=generator) * 1e-2
    weight_scale = torch.rand(n, device="cuda", generator=generator) * 1e-2
    exact = x_q.double() @ weight.double().T
    expected = ((exact.float() * weight_scale) * x_scale[:, None]).bfloat16()

    packed = {}
    timed = []
    for tactic in candidates(m, n, k, bits, launch.compute_capability()):
        if tactic.layout not in packed:
            packed[tactic.layout] = copies_of(launch.pack_weight(weight, tactic, bits))
        x = launch.arrange_activations(x_q, tactic)
        y = torch.full((m, n), float("nan"), dtype=torch.bfloat16, device="cuda")

        def call(w, overlap=False):
            launch.gemm(tactic, bits, x, x_scale, w, weight_scale, None, None, y, n=n, k=k, overlap=overlap)

        us = time_us(call, packed[tactic.layout])
        assert torch.equal(y, expected), f"{tactic} is wrong at {m} x {n} x {k}"
        timed.append((us, tactic, x))
    timed.sort(key=lambda entry: entry[0])
    us, tactic, x = timed[0]
    sums = torch.full((m, n), 0x7FFFFFFF, dtype=torch.int32, device="cuda")
    launch.gemm(tactic, bits, x, x_scale, packed[tactic.layout][0], weight_scale, None, None, sums, n=n, k=k)
    overlapped = time_us(
        lambda w: launch.gemm(
            tactic, bits, x, x_scale, w, weight_scale, None, None, y, n=n, k=k, overlap=True
        ),
        packed[tactic.layout],
    )
    packed.clear()

    x_bf16 = torch.randn(m, k, device="cuda", generator=generator).bfloat16()
    w_bf16 = copies_of(torch.randn(n, k, device="cuda", generator=generator).bfloat16())
    bf16 = time_us(lambda w: torch.nn.functional.linear(x_bf16, w), w_bf16)
    del w_bf16
    int8 = time_us(lambda w: torch._int_mm(x_q, w.T), copies_of(weight))
    return {
        "name": name, "m": m, "n": n, "k": k, "bits": bits, "best": tactic, "tactic": repr(tactic), "us": us, "overlapped_us": overlapped,
        "exact": bool(torch.equal(sums.double(), exact)), "bf16_us": bf16, "int_mm_us": int8,
        "tops": 2e-6 * m * n * k / us, "gb_s": 1e-3 * (n * k * bits / 8 + m * k + 2 * m * n) / us,
        "all": [(round(time, 2), repr(other)) for time, other, _ in timed],
    }  # fmt: skip


def bench_mlp(m: int, width: int, hidden: int, gate_up, down) -> dict:
    """A whole MLP: norm + quantise, gate-up + GeGLU, quantise, down + residual; with and without overlapped launches."""
    bits, weights = 4, []
    for _ in range(max(2, ROTATED_BYTES // (3 * width * hidden * bits // 8))):
        first, second = torch.randint(0, 256, (2, 3 * width * hidden * bits // 8), dtype=torch.uint8, device="cuda")
        weights.append((first[: width * hidden * bits // 4], second[: width * hidden * bits // 8]))
    x = torch.randn(m, width, device="cuda").bfloat16()
    h = torch.empty(m, hidden, dtype=torch.bfloat16, device="cuda")
    scales = {n: torch.rand(n, device="cuda") * 1e-3 for n in (2 * hidden, width)}
    x_scale = torch.empty(m, device="cuda")

    def quantised(k, tactic):
        padded = -(-m // (tactic.slab_tokens or 1)) * (tactic.slab_tokens or 1)
        return torch.empty(padded * k, dtype=torch.int8, device="cuda"), padded if tactic.slab_tokens else 0

    (x_q, x_slab), (h_q, h_slab) = quantised(width, gate_up), quantised(hidden, down)
    norm = functools.partial(launch.rotate_quantize, x, x_q, x_scale, source="RMS_NORM", hadamard=64, slab_tokens=x_slab)
    middle = functools.partial(launch.rotate_quantize, h, h_q, x_scale, hadamard=64, slab_tokens=h_slab)

    def first(weight, overlap=False):
        launch.gemm(gate_up, bits, x_q, x_scale, weight[0], scales[2 * hidden], None, None, h, n=2 * hidden, k=width, geglu=True, overlap=overlap)

    def call(weight, overlap):
        norm(overlap=overlap)
        first(weight, overlap)
        middle(overlap=overlap)
        launch.gemm(down, bits, h_q, x_scale, weight[1], scales[width], None, x, x, n=width, k=hidden, overlap=overlap)

    result = {"m": m, "width": width, "hidden": hidden}
    for name, overlap in (("us", False), ("overlapped_us", True)):
        x.normal_()
        result[name] = time_us(lambda weight: call(weight, overlap), weights)
    result["norm_us"] = time_us(lambda _: norm(), weights)
    result["gate_up_geglu_us"] = time_us(first, weights)
    result["quantise_us"] = time_us(lambda _: middle(), weights)
    del weights

    dense = copies_of(torch.randn(3 * hidden, width, device="cuda").bfloat16() / 32)

    def reference(weight):
        gate, up = (torch.nn.functional.rms_norm(x, (width,)) @ weight[: 2 * hidden].T).chunk(2, -1)
        return x + (torch.nn.functional.gelu(gate, approximate="tanh") * up) @ weight[2 * hidden :]

    x.normal_()
    result["torch_bf16_us"] = time_us(reference, dense)
    return result


def table_row(result: dict) -> dict:
    """A row of the table that plugins.tactics.best reads."""
    chosen = {key: result[key] for key in ("m", "n", "k", "bits")}
    parameters = list(dataclasses.asdict(result["best"]).values())
    return chosen | {"kernel": type(result["best"]).__name__, "parameters": parameters, "us": round(result["us"], 2)}


def compile_all(chosen: list, bits: list[int]) -> None:
    """Fills the cache of cubins on all cores."""
    sm = launch.compute_capability()
    wanted = {
        (tactic.source, tactic.expression(width, out), tuple(tactic.headers().items()))
        for _, m, n, k in chosen
        for width in bits
        for tactic in candidates(m, n, k, width, sm)
        for out in ("Bf16",)
    }
    with ProcessPoolExecutor() as pool:
        for job in [pool.submit(compile_cubin, s, sm, [e], dict(h)) for s, e, h in wanted]:
            job.result()
    print(f"{len(wanted)} kernels compiled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["expert", "prefix"])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8], choices=[4, 8])
    parser.add_argument("--json", type=Path, help="all timings")
    parser.add_argument("--table", type=Path, help="the best of each, as plugins/tactics_sm90.json")
    options = parser.parse_args()
    chosen = problems(options.only)
    compile_all(chosen, options.bits)
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda)
    print(f"{'GEMM':15s} {'M x N x K':>17s} bits {'us':>7s} {'overlap':>7s} {'TOPS':>6s} {'GB/s':>6s} exact {'bf16 us':>8s} {'_int_mm':>8s} {'vs bf16':>7s}  tactic")
    results = []
    for name, m, n, k in chosen:
        for bits in options.bits:
            r = bench(name, m, n, k, bits)
            results.append(r)
            print(
                f"{name:15s} {f'{m}x{n}x{k}':>17s} {bits:4d} {r['us']:7.2f} {r['overlapped_us']:7.2f} {r['tops']:6.0f} "
                f"{r['gb_s']:6.0f} {'yes' if r['exact'] else 'NO':>5s} {r['bf16_us']:8.2f} {r['int_mm_us']:8.2f} "
                f"{r['bf16_us'] / r['us']:6.2f}x  {r['tactic']}",
                flush=True,
            )
    for name, m, width, hidden in (("expert", 50, 1024, 4096), ("prefix", 816, 2048, 16384)):
        of = {r["name"]: r["best"] for r in results if r["m"] == m and r["bits"] == 4 and r["name"].startswith(name)}
        if f"{name} down" in of:
            r = bench_mlp(m, width, hidden, of[f"{name} gate-up"], of[f"{name} down"])
            print(f"{name} MLP, W4A8:", ", ".join(f"{key} {value:.1f}" for key, value in r.items() if key.endswith("us")))
    if options.table:
        options.table.write_text("[\n" + ",\n".join(json.dumps(table_row(r)) for r in results) + "\n]\n")
    for r in results:
        del r["best"]
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
