"""Each kernel that the branch changes before and after each commit, in one process on one GPU; and whether its bits stay.

    PYTHONPATH=$PWD python3 PATH/time_commits.py [--compile-only] [--only singles|prefix|loop]

Kernels come from sources/0 (before the branch) .. sources/N (its last commit), beside this file. Graphs with rotating weights.
"""

import argparse
import functools
import os
import re
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from benchmarks import layer as loop
from benchmarks.gemm_integer import ROTATED_BYTES, time_us
from duq.plugins import driver, kernels
from duq.plugins.gpu import gpu_of
from duq.plugins.nvrtc import compile_text
from duq.plugins.tactics import best, best_float
from tests.support import launch

HERE = Path(__file__).resolve().parent / "sources"
GPU = gpu_of(90)
COMMITS = [(HERE / str(i) / "COMMIT").read_text().strip() for i in range(len(list(HERE.iterdir())))]
WIDTH, HIDDEN, LAYERS = 2048, 16384, 17
SIZES = {"qkv": (2560, WIDTH), "o": (WIDTH, WIDTH), "gate-up": (2 * HIDDEN, WIDTH), "down": (WIDTH, HIDDEN)}
KINDS = {"qkv": ("Bf16", "NONE"), "o": ("float", "NONE"), "gate-up": ("Bf16", "GEGLU"), "down": ("float", "NONE")}
# The commits behind which a kernel alone is timed: those that change it.
ALONE = {"qkv": (0, 1, 2, 5), "gate-up": (0, 1, 2, 5), "o": (0, 3, 5), "down": (0, 3, 5), "rms": (0, 4)}
IN_CHAIN = range(len(COMMITS))
TOKENS = (816, 562, 306)
CHAINS = (816, 306)


def tactic_of(name, m):
    return best(m, *SIZES[name], 4, GPU)


def gemm_instance(name, m):
    out, epilogue = KINDS[name]
    return tactic_of(name, m).instance(m, SIZES[name][0], 4, out, epilogue)


def closure(number, name, seen):
    """The texts that a source of a commit is made of."""
    path = HERE / str(number) / name
    if name in seen or not path.exists():  # generated headers
        return seen
    seen[name] = path.read_text()
    for other in re.findall(r'#include "(.*?)"', seen[name]):
        closure(number, other, seen)
    return seen


@functools.cache
def origin(number, source):
    """The earliest commit whose text of the source and of its headers is that of this one."""
    text = closure(number, source, {})
    return next(i for i in range(number + 1) if closure(i, source, {}) == text)


def compiled(number, code):
    texts = closure(number, code.source, {})
    text = texts.pop(code.source)
    return compile_text(code.source, text, GPU, [code.expression], texts | dict(code.headers))


def job(arguments):
    compiled(*arguments)


LOADED = {}


def use(number):
    """From here on launches are of this commit's kernels."""

    def kernel(code, options=()):
        key = origin(number, code.source), code
        if key not in LOADED:
            LOADED[key] = driver.load(compiled(*key))[code.expression]
        return LOADED[key]

    launch.kernel = kernel


def wanted(only):
    """What is compiled: commits and codes."""
    jobs = {}

    def add(numbers, instance):
        for number in numbers:
            jobs[origin(number, instance.code.source), instance.code] = None

    rms = kernels.rotate_quantize(816, WIDTH, "float", "RMS_NORM", 64)
    if only in (None, "singles"):
        for name in SIZES:
            for m in TOKENS:
                add(ALONE[name], gemm_instance(name, m))
        add(ALONE["rms"], rms)
        add(ALONE["rms"], kernels.rotate_quantize(50, 1024, "float", "RMS_NORM", 64))
    if only in (None, "prefix"):
        for m in CHAINS:
            for name in ("o", "gate-up", "down"):
                add(IN_CHAIN, gemm_instance(name, m))
            add(IN_CHAIN, kernels.hadamard_quantize(m, HIDDEN))
        add(IN_CHAIN, rms)
    if only in (None, "loop"):
        for name, tactic in loop_tactics().items():
            add(IN_CHAIN, tactic.instance(loop.TOKENS, loop.SIZES[name][0], *loop.KINDS[name]))
        add(IN_CHAIN, loop.ATTENTION.instance(loop.TOKENS))
        for depth, kind, source in ((loop.WIDTH, "float", "RMS_NORM"), (loop.MLP, "Bf16", "PLAIN")):
            add(IN_CHAIN, kernels.rotate_quantize(loop.TOKENS, depth, kind, source, 64))
    return list(jobs)


def loop_tactics():
    m, s = loop.TOKENS, loop.SIZES
    return {name: best_float(m, *s[name], GPU) for name in ("qkv", "o")} | {
        name: best(m, *s[name], 4, GPU) for name in ("gate-up", "down")
    }


def random(*shape):
    return torch.randn(shape, device="cuda")


def packed(count, n, k):
    return [torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, device="cuda") for _ in range(count)]


def slabs(tactic, m, k):
    padded = -(-m // tactic.tile_tokens) * tactic.tile_tokens
    return padded, torch.randint(-127, 128, (padded * k,), dtype=torch.int8, device="cuda")


def singles():
    print("alone, us (behind each commit); no overlap", flush=True)
    for name, (n, k) in SIZES.items():
        for m in TOKENS:
            tactic, (out, epilogue) = tactic_of(name, m), KINDS[name]
            _, x = slabs(tactic, m, k)
            scale, columns = torch.rand(m, device="cuda") * 1e-3, torch.rand(n, device="cuda") * 1e-3
            weights = packed(max(2, ROTATED_BYTES // (n * k // 2)), n, k)
            start = random(m, n // 2 if epilogue == "GEGLU" else n)
            y = start.clone() if out == "float" else start.bfloat16()

            def call(w):
                residual = y if out == "float" else None
                launch.gemm(tactic, 4, x, scale, w, columns, None, residual, y, n=n, k=k, epilogue=epilogue)

            def result():
                y.copy_(start)
                call(weights[0])
                torch.cuda.synchronize()
                return y.clone()

            row, first = [], None
            for number in ALONE[name]:
                use(number)
                found = result()
                first = found if first is None else first
                same = "" if torch.equal(found, first) else " BITS DIFFER"
                row.append(f"{number}: {time_us(call, weights):6.2f}{same}")
            print(f"  {name:8} {m:4} {tactic}: " + "  ".join(row), flush=True)
    for m, k in ((816, WIDTH), (306, WIDTH), (50, 1024)):
        xs = [random(m, k) * 3 for _ in range(20)]
        x_q, x_scale = torch.zeros(-(-m // 8) * 8 * k, dtype=torch.int8, device="cuda"), torch.zeros(m, device="cuda")

        def call(x):
            settings = {"source": "RMS_NORM", "hadamard": 64, "slab_tokens": -(-m // 8) * 8}
            launch.rotate_quantize(x, x_q, x_scale, **settings)

        row, first = [], None
        for number in ALONE["rms"]:
            use(number)
            call(xs[0])
            torch.cuda.synchronize()
            found = x_q.clone()
            first = found if first is None else first
            off = (found.int() - first.int()).abs()
            share = (off > 0).float().mean().item()
            row.append(f"{number}: {time_us(call, xs):6.2f} ({share:.1e} of the integers differ, by {off.max().item()})")
        print(f"  RMS quantizer {m} x {k}: " + "  ".join(row), flush=True)


def prefix():
    """o, quantizer, gate-up, quantizer, down of 17 layers with weights and scales of their own, with overlap."""
    for m in CHAINS:
        tactics = {name: tactic_of(name, m) for name in ("o", "gate-up", "down")}
        x = random(m, WIDTH)
        start = x.clone()
        h = torch.zeros(m, HIDDEN, dtype=torch.bfloat16, device="cuda")
        _, mixed = slabs(tactics["o"], m, WIDTH)
        padded_x, x_q = slabs(tactics["gate-up"], m, WIDTH)
        padded_h, h_q = slabs(tactics["down"], m, HIDDEN)
        mixed_scale, x_scale, h_scale = torch.full((m,), 1e-4, device="cuda"), random(m), random(m)
        weights = {name: packed(LAYERS, *SIZES[name]) for name in tactics}
        scales = {name: [torch.rand(SIZES[name][0], device="cuda") * 1e-4 for _ in range(LAYERS)] for name in tactics}

        def gemm(name, i, *operands, residual, y, epilogue="NONE"):
            n, k = SIZES[name]
            launch.gemm(
                tactics[name], 4, *operands, weights[name][i], scales[name][i], None, residual, y,
                n=n, k=k, epilogue=epilogue, overlap=True,
            )  # fmt: skip

        def call(i):
            gemm("o", i, mixed, mixed_scale, residual=x, y=x)
            launch.rotate_quantize(
                x, x_q, x_scale, source="RMS_NORM", hadamard=64, slab_tokens=padded_x, overlap=True
            )
            gemm("gate-up", i, x_q, x_scale, residual=None, y=h, epilogue="GEGLU")
            launch.hadamard_quantize(h, h_q, h_scale, slab_tokens=padded_h, overlap=True)
            gemm("down", i, h_q, h_scale, residual=x, y=x)

        def result():
            x.copy_(start)
            for i in range(LAYERS):
                call(i)
            torch.cuda.synchronize()
            return x.clone()

        report(f"prefix {m}: o .. down, us a layer (x 17 a call)", call, list(range(LAYERS)), result)


def loop_chain():
    generator = torch.Generator("cuda").manual_seed(0)
    numbers = lambda *shape: torch.randn(shape, device="cuda", generator=generator)  # noqa: E731
    shared = loop.buffers(numbers)
    layers = [loop.Layer(numbers, shared) for _ in range(loop.LAYERS)]
    tactics = loop_tactics()
    start = {name: shared[name].clone() for name in ("x", "normed", "squares")}

    def call(layer):
        for each in layer.launches(tactics).values():
            each()

    def result():
        for name, value in start.items():
            shared[name].copy_(value)
        for each in layers:
            call(each)
        torch.cuda.synchronize()
        return shared["x"].clone()

    report("loop, us a layer (x 180 a call)", call, layers, result)


def report(name, call, turns, result):
    """Twice around the commits, so that a drift of the clocks shows."""
    times, before, words = {}, None, {}
    for _ in range(2):
        for number in IN_CHAIN:
            use(number)
            found = result()
            if before is not None and number not in words:
                difference = ((found - before).norm() / before.norm()).item()
                words[number] = "same bits" if difference == 0 and torch.equal(found, before) else f"differs by {difference:.1e}"
            before = found
            times.setdefault(number, []).append(time_us(call, turns))
    print(name, flush=True)
    for number, us in times.items():
        print(f"  {min(us):7.2f} ({', '.join(f'{u:.2f}' for u in us)}) {words.get(number, '')}: {COMMITS[number]}", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--only", choices=["singles", "prefix", "loop"])
    options = parser.parse_args()
    start, jobs = time.time(), wanted(options.only)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(job, jobs))
    print(f"{len(jobs)} kernels compiled in {time.time() - start:.0f} s", flush=True)
    if options.compile_only:
        return
    launch.compute_capability()
    print(torch.cuda.get_device_name(), "; commits:", *(f"\n  {i} {text}" for i, text in enumerate(COMMITS)), flush=True)
    torch.manual_seed(0)
    for name, part in (("singles", singles), ("prefix", prefix), ("loop", loop_chain)):
        if options.only in (None, name):
            part()
    print(f"{time.time() - start:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
