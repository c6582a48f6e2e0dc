"""A layer of the denoising loop as the SM 86 program launches it: one kernel after the other, and as a chain.

    PYTHONPATH=$PWD python3 trials/loop86/time_chain.py [--quick]

Kernels are machine code for this GPU without clusters and programmatic launch (a stand-in), so that nothing is left to the
driver's compiler. 18 layers with weights of their own, in a CUDA graph. Every chain's result is compared bit for bit with its
kernels' one by one. Prints us a layer, and for some chains when the blocks of each part start, have waited, and end.
"""

import argparse
import os
import time
from concurrent.futures import ProcessPoolExecutor

import torch

from benchmarks.gemm_integer import time_us
from benchmarks.layer import chosen_for, layers_of
from duq.plugins import driver
from duq.plugins.gpu import gpu_of, stand_in
from duq.plugins.kernels import GemmFloat, Small, SplitAttention
from duq.plugins.nvrtc import SOURCES, compile_cubin, compile_text
from tests.support import launch

LAYERS, TOKENS = 18, 50
GPU = stand_in(gpu_of(86), 90)
NAMES = ("qkv", "attention", "o", "quantizer", "gate-up", "quantizer", "down")
F, S, A = GemmFloat, Small, SplitAttention


def named(tactics):
    return dict(zip(("qkv", "attention", "o", "gate-up", "down"), tactics))


class Chains:
    """One for each layer. first, last: the parts that it makes; the others are launches of their own."""

    def __init__(self, layers, tactics, residents, pieces=((0, 7),)):
        a_layer = sum(last - first > 1 for first, last in pieces)
        self.links = torch.zeros(max(1, len(layers) * a_layer), 16, dtype=torch.int32, device="cuda")
        self.calls, index = [], 0
        for layer in layers:
            parts, made = layer.recorded(named(tactics)), []
            for first, last in pieces:
                if last - first == 1:
                    made.append(parts[first])
                else:
                    made.append(launch.chained(parts[first:last], self.links[index], self.links[index - 1], residents))
                    index += 1
            self.calls.append(made)

    def __call__(self, number):
        for each in self.calls[number]:
            launch.run(*each)


def compile_one(job):
    source, expression, headers, text = job
    if text is None:
        compile_cubin(source, GPU, [expression], headers)
    else:
        compile_text(source, text, GPU, [expression], headers)


def instrumented(instance):
    """The chain's source and headers such that each block leaves three times behind the links."""
    text = (SOURCES / "chain.cu").read_text()
    text = text.replace("__shared__ Place of_chain;", """__shared__ Place of_chain;
__device__ inline long long now() { long long t; asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t) :: "memory"); return t; }
__shared__ long long times[2];""")
    text = text.replace("  if (!of_chain.ahead) return;", "  if (threadIdx.x == 0) times[0] = now(), times[1] = times[0];\n  if (!of_chain.ahead) return;")
    text = text.replace("    while (done < of_chain.blocks_ahead);\n", "    while (done < of_chain.blocks_ahead);\n    times[1] = now();\n")
    text = text.replace("inline void leave(int* link) {\n  __syncthreads();", """inline void leave(int* link, int block, int* base) {
  __syncthreads();
  if (threadIdx.x == 0) {
    long long* const to = reinterpret_cast<long long*>(base) + 8 + block * 4;
    to[0] = times[0], to[1] = times[1], to[2] = now();
  }""")
    headers = dict(instance.headers)
    parts = headers["parts.cuh"]
    for number in range(7):
        parts = parts.replace(f"leave(links + {number});", f"leave(links + {number}, blockIdx.x, links);")
    headers["parts.cuh"] = parts
    return text, headers


def timeline(layers, tactics, residents):
    parts = layers[0].recorded(named(tactics))
    sizes = [p.instance.shape.grid[0] * p.instance.shape.grid[1] * p.instance.shape.grid[2] for p in parts]
    links = torch.zeros(len(layers), 16 + 8 * sum(sizes), dtype=torch.int32, device="cuda")
    calls = []
    for number, layer in enumerate(layers):
        instance, arguments = launch.chained(layer.recorded(named(tactics)), links[number], links[number - 1], residents)
        calls.append((instance, arguments))
    instance = calls[0][0]
    text, headers = instrumented(instance)
    kernel = driver.load(compile_text("chain.cu", text, GPU, ["chain"], headers))["chain"]
    stream = torch.cuda.current_stream().cuda_stream
    for _ in range(3):
        for _, arguments in calls:
            values = {n: launch.Address(e) if isinstance(e, torch.Tensor) else e for n, e in arguments.items()}
            kernel.launch(instance.shape, instance.scalars(values), stream)
    torch.cuda.synchronize()
    times = links[:, 16:].contiguous().view(torch.int64).view(len(layers), sum(sizes), 4)[:, :, :3].cpu().double()
    times -= times[:, :, 0].amin(1)[:, None, None]
    print("   part        blocks | started: first, last | waited: first, last | ended: first, last   (ns, medians over layers)")
    at = 0
    for name, size in zip(NAMES, sizes):
        part = times[:, at : at + size]
        at += size
        row = [f(part[:, :, i]).median().item() for i in range(3) for f in (lambda v: v.amin(1), lambda v: v.amax(1))]
        print(f"   {name:11} {size:6} | " + " ".join(f"{v:7.0f}" for v in row), flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--past", type=int, default=817)
    args = parser.parse_args()
    launch.compute_capability()
    launch._program.append(launch.Image(GPU))
    chosen = chosen_for(GPU, args.past)
    now = tuple(chosen[name] for name in named(range(5)))
    keys = args.past + TOKENS
    share = lambda split: 16 * -(-(-(-keys // 16)) // split)  # noqa: E731
    att = lambda rows16, split: A(8, rows16, share(split), split)  # noqa: E731
    lean = (F(2, 7, 8, 1), att(2, 10), F(1, 7, 8, 1), S(2, 7, 8, 1), S(1, 7, 8, 2))

    def but(**other):
        names = ["qkv", "att", "o", "gu", "dn"]
        return tuple(other.get(n, t) for n, t in zip(names, lean))

    variants = {"as now, 1 a multiprocessor": (now, 1), "lean, 2": (lean, 2)}
    if not args.quick:
        variants |= {
            "lean, 1": (lean, 1),
            "as now, 2": (now, 2),
            "as now, 1, qkv 2 7 8 1": ((F(2, 7, 8, 1), *now[1:]), 1),
            "as now, 1, gate-up 2 7 8 2": ((*now[:3], S(2, 7, 8, 2), now[4]), 1),
            "as now, 1, gate-up 4 7 8 1": ((*now[:3], S(4, 7, 8, 1), now[4]), 1),
            "as now, 1, attention 10": ((now[0], att(2, 10), *now[2:]), 1),
            "as now, 1, o and down of 32 rows": ((*now[:2], F(2, 7, 8, 1), now[3], S(2, 7, 8, 2)), 1),
            "lean, 2, gate-up 4 7 4 1": (but(gu=S(4, 7, 4, 1)), 2),
            "lean, 2, attention 16 rows, 5": (but(att=att(1, 5)), 2),
            "lean, 2, attention 6": (but(att=att(2, 6)), 2),
            "lean, 2, attention 14": (but(att=att(2, 14)), 2),
            "lean, 2, attention 16 rows, 6": (but(att=att(1, 6)), 2),
            "lean, 2, attention 16 rows, 10": (but(att=att(1, 10)), 2),
            "lean, 2, gate-up 2 7 8 2": (but(gu=S(2, 7, 8, 2)), 2),
            "lean, 2, gate-up 1 7 8 2": (but(gu=S(1, 7, 8, 2)), 2),
            "lean, 2, gate-up 2 7 4 2": (but(gu=S(2, 7, 4, 2)), 2),
            "lean, 2, qkv 1 7 8 1": (but(qkv=F(1, 7, 8, 1)), 2),
            "lean, 2, o 1 7 8 2": (but(o=F(1, 7, 8, 2)), 2),
            "lean, 2, down 1 7 8 1": (but(dn=S(1, 7, 8, 1)), 2),
            "lean, 2, all 4 warps but attention": (
                (F(1, 7, 4, 1), att(2, 16), F(1, 7, 4, 1), S(1, 7, 4, 2), S(1, 7, 4, 2)), 2),
        }  # fmt: skip
    pieces = {
        "lean, 2, in pieces: qkv-attention-o, quantizer-...-down": (lean, 2, ((0, 3), (3, 7))),
        "lean, 2, only the MLP": (lean, 2, ((0, 1), (1, 2), (2, 7))),
    }
    layers, shared = layers_of(args.past)
    jobs = {}
    every = [*((t, r, ((0, 7),)) for t, r in variants.values()), *pieces.values()]
    for tactics, residents, split in every:
        parts = layers[0].recorded(named(tactics))
        zero = torch.zeros(16, dtype=torch.int32, device="cuda")
        chains = [launch.chained(parts[a:b], zero, zero, residents).instance for a, b in split if b - a > 1]
        for instance in [*(p.instance for p in parts), *chains]:
            jobs[instance.code] = (instance.source, instance.expression, dict(instance.headers), None)
    shown = ["lean, 2", "as now, 1 a multiprocessor"]
    for name in shown:
        tactics, residents = variants[name]
        zero = torch.zeros(16, dtype=torch.int32, device="cuda")
        text, headers = instrumented(launch.chained(layers[0].recorded(named(tactics)), zero, zero, residents).instance)
        jobs[name] = ("chain.cu", "chain", headers, text)
    start = time.time()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sorted(jobs.values(), key=lambda j: j[0] != "chain.cu")))
    print(f"{torch.cuda.get_device_name()}; {len(jobs)} kernels compiled in {time.time() - start:.0f} s; past {args.past}", flush=True)

    state = {name: shared[name].clone() for name in ("x", "normed", "squares")}

    def result(call):
        for name, value in state.items():
            shared[name].copy_(value)
        for number in range(LAYERS):
            call(number)
        torch.cuda.synchronize()
        return [shared[name].clone() for name in ("x", "normed", "squares", "own", "h_q")]

    def apart(tactics):
        return Chains(layers, tactics, 1, [(i, i + 1) for i in range(7)])

    for name, tactics in {"as now": now, "lean": lean}.items():
        call = apart(tactics)
        print(f"{time_us(call, list(range(LAYERS))):7.2f} us a layer  one by one, {name}: {tactics}", flush=True)
    for name, (tactics, residents, *split) in (variants | pieces).items():
        try:
            expected = result(apart(tactics))
            call = Chains(layers, tactics, residents, *split)
            found = result(call)
            again = result(call)
            same = all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(expected, found, again))
            finite = bool(torch.isfinite(found[0]).all())
            us = time_us(call, list(range(LAYERS)))
            print(f"{us:7.2f} us a layer  chain, {name}: {'same bits' if same else 'DIFFERS'}{'' if finite else ' NOT FINITE'}; {tactics}", flush=True)
        except Exception as error:
            print(f"    failed: {name}: {error!r}", flush=True)
    for name in shown:
        print(f"timeline of: {name}")
        timeline(layers, *variants[name])


if __name__ == "__main__":
    main()
