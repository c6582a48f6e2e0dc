"""Times quantizing a full-size pi0 with made weights: calibration, then the weights without and with error compensation.

    python -m benchmarks.quantizing [--device cuda] [--observations 3] [--layers 18] [--threads 2] [--checkpoint DIR]

On a GPU seconds are of the wall clock; on the CPU of the processor, all cores together, which other work on the machine hardly
changes. With fewer layers, those of the first are measured and the weights' time is scaled to all weights.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from duq.compiler.accuracy.synthetic import synthetic_observations
from duq.compiler.checkpoint import load_checkpoint
from duq.compiler.checkpoint.synthetic import make_checkpoint
from duq.compiler.model import build_model
from duq.compiler.quant import load_recipe
from duq.compiler.quant.calibrate import calibrate
from duq.compiler.quant.linears import select_linears
from duq.compiler.quant.quantize import quantize_weights
from duq.runtime.preprocess import Preprocessor

CAMERAS, OBSERVATIONS = 3, (3, 32)  # of a sum: a quick calibration and the default one
SILENT = Progress(disable=True)
T = TypeVar("T")


def timed(work: Callable[[], T], device: str) -> tuple[float, T]:
    """The seconds that it takes, and its result."""

    def now() -> float:
        if device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    start = now()
    result = work()
    return now() - start, result


def measure(directory: Path, device: str, observations: int, layers: int) -> dict[str, float]:
    """Seconds: of calibration, an observation; of all weights, without and with compensation."""
    checkpoint = load_checkpoint(directory)
    recipe, config = load_recipe("llm+expert-mlp", environment={}), checkpoint.config
    inputs = [Preprocessor(config).model_inputs(each) for each in synthetic_observations(config, CAMERAS, observations)]
    model = build_model(checkpoint).to(device)
    weights, linears = model.state_dict(), select_linears(recipe, config)
    calibration, statistics = timed(lambda: calibrate(model, config, linears, inputs, observations, SILENT), device)
    measured = {name: bits for name, bits in linears.items() if int(re.findall(r"layers\.(\d+)", name)[0]) < layers}
    scale = count(weights, linears) / count(weights, measured)
    seconds = {"calibration": calibration / observations}
    for compensate in (False, True):
        each = replace(recipe, compensate=compensate)
        took, _ = timed(lambda each=each: quantize_weights(weights, config, each, measured, statistics, SILENT), device)
        seconds["compensated" if compensate else "plain"] = took * scale
    return seconds


def count(weights, linears) -> int:
    return sum(weights[f"{name}.weight"].numel() for name in linears)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--observations", type=int, default=3)
    parser.add_argument("--layers", type=int, default=18, help="Of each Gemma, whose weights are quantized.")
    parser.add_argument("--threads", type=int, help="Of PyTorch on the CPU.")
    parser.add_argument("--checkpoint", type=Path, help="A full-size one; by default it is made, and removed again.")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = arguments.checkpoint or make_checkpoint(Path(directory) / "checkpoint", variant="full")
        seconds = measure(checkpoint, arguments.device, arguments.observations, arguments.layers)
    table = Table("seconds", "calibration", "weights", "weights, compensated", "ratio")
    for observations in OBSERVATIONS:
        calibration = observations * seconds["calibration"]
        ratio = (calibration + seconds["compensated"]) / (calibration + seconds["plain"])
        times = (calibration, seconds["plain"], seconds["compensated"])
        table.add_row(f"{observations} observations", *(f"{each:.1f}" for each in times), f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
