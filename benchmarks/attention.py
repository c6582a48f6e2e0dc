"""Times every candidate tile of the policy's attentions, with its error, beside torch's attention.

    python -m benchmarks.attention [--only prefix suffix state SigLIP rotary] [--json FILE]

Launches are replayed from a CUDA graph on operands that rotate through several copies, which stay in L2 as they do in
the policy, where the kernel ahead has just written them. torch gets K and V in one piece (copies are not counted), and
q either as heads over a shared K and V or folded into one head, whichever is faster.
"""

from __future__ import annotations

import argparse
import json
import math
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gemm_integer import time_us
from duq.plugins import tactics
from tests.gpu.test_attention import definition, random
from tests.support import launch

COPIES = 16
PARTS = ("prefix", "suffix", "state", "SigLIP", "rotary")
BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def time_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: SDPBackend) -> float:
    """q [B, heads, T, D], k, v [B, kv_heads, S, D]; infinity where the backend refuses."""
    attend = torch.nn.functional.scaled_dot_product_attention
    queries = [q]
    if k.shape[1] == 1:
        queries.append(q.transpose(1, 2).flatten(1, 2)[:, None].contiguous())
    times = []
    for query in queries:
        gqa = query.shape[1] != k.shape[1]
        with sdpa_kernel([backend]):
            try:
                call = partial(attend, query, k, v, enable_gqa=gqa)
                times.append(time_us(lambda _, call=call: call(), [None] * COPIES))
            except RuntimeError:
                times.append(math.inf)
    return min(times)


def bench(name: str, configs: list, tokens: int, keys: int, own: int, images: int = 1) -> dict:
    """`own` of the keys come from the matrix that q comes from."""
    heads, kv_heads, dims = (8, 1, 256) if configs[0].dims == 256 else (16, 16, 72)
    width, kv_width = heads * dims, kv_heads * dims
    matrices = [random(images * tokens, width + 2 * kv_width, seed=i) for i in range(COPIES)]
    caches = [random(images * keys, 2 * kv_width, seed=100 + i) for i in range(COPIES)]
    out = torch.empty(images * tokens, width, dtype=torch.bfloat16, device="cuda")

    def run(config, i, overlap=False):
        q, own_k, own_v = matrices[i].split([width, kv_width, kv_width], 1)
        k, v = caches[i].split(kv_width, 1)
        own_operands = (own_k, own_v) if own else ()
        launch.attention(config, q, k, v, out, *own_operands, images=images, cache_ready=own > 0, overlap=overlap)

    q, own_k, own_v = matrices[0].split([width, kv_width, kv_width], 1)
    k, v = caches[0].split(kv_width, 1)
    if own:
        k, v = torch.cat([k, own_k]), torch.cat([v, own_v])
    per_image = list(zip(*(x.chunk(images) for x in (q, k, v)), strict=True))
    exact = torch.cat([definition(*operands, heads, kv_heads) for operands in per_image])
    timed = []
    for config in configs:
        if not config.fits(launch.gpu()):
            continue
        out.fill_(math.nan)
        run(config, 0)
        error = float((out.double() - exact).norm() / exact.norm())
        us = time_us(lambda i, config=config: run(config, i), list(range(COPIES)))
        overlapped = time_us(lambda i, config=config: run(config, i, overlap=True), list(range(COPIES)))
        timed.append((us, overlapped, error, config))
    timed.sort(key=lambda entry: entry[0])
    q, k, v = (
        x.unflatten(0, (images, -1)).unflatten(2, (n, dims)).transpose(1, 2).contiguous()
        for x, n in ((q, heads), (k, kv_heads), (v, kv_heads))
    )
    times = {f"{name}_us": time_torch(q, k, v, backend) for name, backend in BACKENDS.items()}
    us, overlapped, error, config = timed[0]
    tflops = 4e-6 * images * tokens * k.shape[2] * width / us
    result = {"name": name, "tokens": tokens, "keys": k.shape[2], "images": images} | {
        "us": us,
        "overlapped_us": overlapped,
        "tflops": tflops,
        "error": error,
        **times,
    }
    print(", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in result.items()))
    for us, overlapped, error, config in timed:
        print(f"    {us:7.2f} {overlapped:7.2f}  {error:.1e}  {config}", flush=True)
    return result | {"all": [(*entry[:3], repr(entry[3])) for entry in timed]}


def bench_rotary(tokens: int, to_cache: bool, overlap: bool) -> float:
    qkv, cache, tables = random(tokens, 2560, seed=0), random(tokens, 512, seed=1), launch.rotary_tables(tokens, 256)
    settings = {"cache": cache.split(256, 1) if to_cache else None, "heads": 8, "dims": 256, "overlap": overlap}
    return time_us(lambda _: launch.rotary(qkv, tables, **settings), [None] * COPIES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts, by default all")
    parser.add_argument("--json", type=Path, help="all timings")
    options = parser.parse_args()
    few, every_part = tactics.FEW_QUERIES + tactics.SPLIT_KEYS, options.only or PARTS
    every = {
        "prefix": [*tactics.MANY_QUERIES, tactics.FEWER_ROWS],
        "suffix": few,
        "state": few,
        "SigLIP": [*tactics.VISION_AT_ONCE, *tactics.VISION],
    }
    needed = {tactic for part in every_part for tactic in every.get(part, []) if tactic.fits(launch.gpu())}
    launch.compile_all(tactic.instance(1) for tactic in needed)
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda)
    sizes = [("prefix", tokens, tokens, 0, 1) for tokens in (306, 562, 816)]
    sizes += [("suffix", 50, keys, 50, 1) for keys in (307, 817)] + [("state", 1, 816, 1, 1)]
    sizes += [("SigLIP", 256, 256, 0, images) for images in (1, 2, 3)]
    results = [bench(part, every[part], *each) for part, *each in sizes if part in every_part]
    for tokens, to_cache in ((50, False), (816, False), (816, True)) if "rotary" in every_part else ():
        times = ", overlapped ".join(f"{bench_rotary(tokens, to_cache, overlap):.2f}" for overlap in (False, True))
        print(f"rotary embedding of {tokens} tokens, {'with cache' if to_cache else 'in place'}: {times} us")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
