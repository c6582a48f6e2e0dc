"""A full-size policy with made weights: the cuda engine against the CPU engine stage by stage, then many calls.

    python -m benchmarks.full_size [--pi05] [--quant llm+expert-mlp] [--calls 10000] [--only-calls] [--directory DIR]

The CPU engine computes the same INT8 x INT4 accumulators exactly and everything else in float32. Prints the cosine of what
every stage of a call produces, three times:

    same integers   the CPU engine multiplies the INT8 activations that the cuda engine has made
                    (tests/support/same_integers.py)
    on its own      each engine rounds for itself
    CPU, moved      the CPU engine on its own, its pixels moved by a millionth, against itself: how far roundings that turn
                    the other way carry any two computations of this policy apart

and, for the many calls, the median and the 99th percentile, the median of the first and the last tenth, and what memory
grew by. Exits with 1 if a stage with the same integers is below BOUND, an integer is further than STEPS from the CPU
engine's own, or memory grew.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from duq.compiler.accuracy.metrics import Difference, difference
from duq.compiler.checkpoint import load_checkpoint
from duq.compiler.checkpoint.synthetic import make_checkpoint
from duq.compiler.pipeline import compile_policy, quantize_checkpoint
from duq.compiler.quant import Quantization, load_recipe
from duq.compiler.quantize_cli import progress_bar
from duq.compiler.targets import Options
from duq.compiler.targets.cuda import CudaOptions
from duq.plugins.driver import free_memory, open_device
from duq.runtime.config import ModelConfig
from duq.runtime.executors.cpu import CpuExecutor
from duq.runtime.plan import Plan
from duq.runtime.policy import Policy
from duq.runtime.preprocess import ModelInputs, Preprocessor
from duq.tools.made_up import bare_observation
from tests.support.recording import Recording
from tests.support.same_integers import run_given

CAMERAS, PROMPT_TOKENS = 3, 48
BOUND = 0.9999  # of a stage's cosine
STEPS = 2  # of an activation scale
GROWTH = 4 << 20  # bytes of the host, of which Python's own allocator keeps some


def make_plans(directory: Path, pi05: bool, quant: str) -> dict[str, Path]:
    """The cpu and the cuda plan of the same integers."""
    checkpoint = load_checkpoint(make_checkpoint(directory / "checkpoint", variant="full", pi05=pi05))
    recipe, preprocessor = load_recipe(quant, environment={}), Preprocessor(checkpoint.config)
    inputs = [
        preprocessor.model_inputs(bare_observation(checkpoint.config, cameras, PROMPT_TOKENS)) for cameras in (1, 2, 3)
    ]
    with progress_bar() as progress:
        if quant == "none":
            integers = Quantization(recipe)
        else:
            integers = quantize_checkpoint(checkpoint, recipe, inputs, progress, device="cuda")
        plans = {target: directory / f"{target}.plan" for target in ("cpu", "cuda")}
        for options in (CudaOptions(sm=(open_device(),)), Options()):
            compile_policy(checkpoint, integers, plans[options.target], options, progress)
    return plans


def compare(plans: dict[str, Path]) -> tuple[list, bool]:
    """What to print of a call's stages, and whether the bounds hold."""
    executor, cpu = Recording(Plan(plans["cuda"])), CpuExecutor(Plan(plans["cpu"]))
    manifest = Plan(plans["cuda"]).manifest["model"]
    config = ModelConfig.from_json(manifest)
    inputs = Preprocessor(config).model_inputs(bare_observation(config, CAMERAS, PROMPT_TOKENS))
    noise = np.random.default_rng(1).standard_normal((config.action_horizon, config.action_dim), np.float32)
    found, runs = executor.record(inputs, noise)
    expected, roundings = run_given(plans["cpu"], *runs, inputs, noise)
    alone, moved = {}, {}
    cpu.run(inputs, noise, alone)
    cpu.run(Moved(**vars(inputs)), noise, moved)

    pairs = {"same integers": (expected, found), "on its own": (alone, found), "CPU, moved": (alone, moved)}
    table = Table("cosine (SQNR in dB)", *pairs)
    columns = [_stages(*pair) for pair in pairs.values()]
    for name in columns[0]:
        table.add_row(name, *(f"{each[name].cosine:.7f} ({each[name].sqnr_db:.1f})" for each in columns))
    text = f"{roundings.different} of {roundings.count} integers differ from the CPU engine's own, "
    text += f"by {roundings.farthest} at most"
    return [table, text], min(each.cosine for each in columns[0].values()) >= BOUND and roundings.farthest <= STEPS


class Moved(ModelInputs):
    """Inputs whose pixels are a millionth off."""

    def pixels(self) -> np.ndarray:
        pixels = super().pixels()
        return pixels * (1 + 1e-6 * np.random.default_rng(2).standard_normal(pixels.shape)).astype(np.float32)


def _stages(expected: dict, found: dict) -> dict[str, Difference]:
    stages = {"image features": difference(expected["image_features"], found["image_features"])}
    for kind in ("key", "value"):
        names = [name for name in expected if name.startswith(f"{kind}.")]
        of_layers = [difference(expected[name], found[name]) for name in names]
        stages[f"{kind}s, the worst of {len(names)} layers"] = min(of_layers, key=lambda each: each.cosine)
    for step in range(1, len(expected["x"])):
        stages[f"x after step {step}"] = difference(expected["x"][step], found["x"][step])
    return stages


def endure(policy: Policy, calls: int) -> tuple[str, bool]:
    """What `calls` calls took, and whether memory stayed as it was after the first tenth."""
    obs, tenth = bare_observation(policy._opened.config, CAMERAS, PROMPT_TOKENS), calls // 10
    times, memory = [], []
    for index in range(calls):
        if index in (tenth, calls - 1):
            memory.append((free_memory()[0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
        start = time.perf_counter()
        policy.infer(obs)
        times.append((time.perf_counter() - start) * 1e3)
    (free, host), (free_later, host_later) = memory
    first, last, tail = np.median(times[:tenth]), np.median(times[-tenth:]), np.percentile(times, 99)
    text = f"{calls} calls: p50 {np.median(times):.2f} ms, p99 {tail:.2f}; "
    text += f"p50 of the first tenth {first:.2f}, of the last {last:.2f}; "
    text += f"device memory grew by {free - free_later} bytes, the host's peak by {host_later - host}"
    return text, free == free_later and host_later - host <= GROWTH


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pi05", action="store_true")
    parser.add_argument("--quant", default="llm+expert-mlp", help="preset or recipe")
    parser.add_argument("--calls", type=int, default=10_000, help="0: none")
    parser.add_argument("--only-calls", action="store_true", help="no comparison")
    parser.add_argument("--directory", type=Path, help="keep the plans here, and use those that are there")
    options = parser.parse_args()
    directory = options.directory or Path(tempfile.mkdtemp())
    plans = {target: directory / f"{target}.plan" for target in ("cpu", "cuda")}
    if not all(path.exists() for path in plans.values()):
        plans = make_plans(directory, options.pi05, options.quant)
    close, steady = True, True
    if not options.only_calls:
        lines, close = compare(plans)
        for line in lines:
            Console(width=140).print(line)
    if options.calls:
        policy = Policy(plans["cuda"])
        policy.warmup()
        text, steady = endure(policy, options.calls)
        print(text)
    return int(not (close and steady))


if __name__ == "__main__":
    sys.exit(main())
