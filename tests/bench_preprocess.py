"""Times what `infer` does to three images before the model: python -m tests.bench_preprocess [calls]"""
from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np

from runtime import images as resizing

SIZES = [(224, 224), (480, 640), (720, 1280)]


def median_ms(call: Callable[[], object], calls: int) -> float:
    times = []
    for _ in range(calls + 10):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times[10:]))


def main(calls: int) -> None:
    random = np.random.default_rng(0)
    print(f"three images to 224 x 224, p50 of {calls} calls; {'compiled' if resizing._compiled else 'not compiled'} loops")
    for height, width in SIZES:
        dense = [random.integers(0, 256, (height, width, 3), np.uint8) for _ in range(3)]
        planes = [np.ascontiguousarray(image.transpose(2, 0, 1)).transpose(1, 2, 0) for image in dense]
        for layout, images in (("HWC", dense), ("CHW", planes)):
            for rule in resizing.RULES:
                ms = median_ms(lambda: resizing.resize_all(images, 224, 224, rule), calls)
                print(f"{height:5} x {width:<5} {layout}  {rule:12} {ms:7.3f} ms")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
