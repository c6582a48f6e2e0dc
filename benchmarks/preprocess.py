"""Times what `infer` does to three images before the model: python -m benchmarks.preprocess [calls]"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from duq.compiler.checkpoint.synthetic.files import train_tokenizer
from duq.runtime import images as resizing
from duq.runtime.config import GemmaConfig, ModelConfig, VisionConfig
from duq.runtime.preprocess import Preprocessor

SIZES = [(224, 224), (480, 640), (720, 1280)]


def median_ms(call: Callable[[], object], calls: int) -> float:
    times = []
    for _ in range(calls + 10):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times[10:]))


GEMMA = GemmaConfig(256, 1, 64, 2, 1, 256)
CONFIG = ModelConfig(False, VisionConfig(144, 1, 528, 2), GEMMA, GEMMA, vocab_size=512)  # nothing of it is computed here
ROBOTS = {  # name -> cameras of its observation, numbers of its state
    "aloha": (("cam_high", "cam_left_wrist", "cam_right_wrist"), 14),
    "libero": (("observation/image", "observation/wrist_image"), 8),
}


def whole(calls: int) -> None:
    """`Preprocessor.model_inputs`: state, images and prompt."""
    random, tokenizer = np.random.default_rng(0), train_tokenizer()
    print(f"model_inputs, p50 of {calls} calls")
    for robot, (cameras, dims) in ROBOTS.items():
        stats = {key: {"mean": [0.0] * dims, "std": [1.0] * dims} for key in ("state", "actions")}
        for layout in ("openpi", "lerobot"):
            rule = {"rule": "lerobot"} if layout == "lerobot" else {}
            entries = {key: entry | {"mode": "MEAN_STD", "epsilon": 1e-8} for key, entry in stats.items()}
            policy = Preprocessor(CONFIG, robot=robot, layout=layout, norm_stats=entries | rule, tokenizer=tokenizer)
            for height, width in SIZES[:2]:
                shape = (3, height, width) if robot == "aloha" else (height, width, 3)
                images = {name: random.integers(0, 256, shape, np.uint8) for name in cameras}
                state = {"state" if robot == "aloha" else "observation/state": np.zeros(dims)}
                observation = (
                    ({"images": images} if robot == "aloha" else images) | state | {"prompt": "pick up the red block"}
                )
                ms = median_ms(partial(policy.model_inputs, observation), calls)
                print(f"{height:5} x {width:<5} {robot:7} {layout:8} {ms:7.3f} ms")


def main(calls: int) -> None:
    whole(calls)
    random = np.random.default_rng(0)
    print(f"three images to 224 x 224, p50 of {calls} calls; {'compiled' if resizing._compiled else 'not compiled'} loops")
    for height, width in SIZES:
        dense = [random.integers(0, 256, (height, width, 3), np.uint8) for _ in range(3)]
        planes = [np.ascontiguousarray(image.transpose(2, 0, 1)).transpose(1, 2, 0) for image in dense]
        for layout, images in (("HWC", dense), ("CHW", planes)):
            for rule in resizing.RULES:
                ms = median_ms(partial(resizing.resize_all, images, 224, 224, rule), calls)
                print(f"{height:5} x {width:<5} {layout}  {rule:12} {ms:7.3f} ms")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
