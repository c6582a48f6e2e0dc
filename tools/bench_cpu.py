"""The suites of duq-bench: the engines against PyTorch on the same machine with the same inputs."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import typer
from rich.console import Console
from rich.table import Table

from duq.compiler.checkpoint import load_checkpoint
from duq.compiler.checkpoint.synthetic import VARIANTS, make_checkpoint
from duq.compiler.model import Pi0, build_model
from duq.compiler.pipeline import compile_policy, quantize_checkpoint
from duq.compiler.quant import load_recipe
from duq.compiler.targets import Options
from duq.compiler.targets.cuda import options_of_program
from duq.plugins.driver import open_device
from duq.plugins.errors import DuqError, KernelError
from duq.runtime.command_line import progress_bar
from duq.runtime.config import IMAGE_SLOTS, ModelConfig
from duq.runtime.executors.cpu import CpuExecutor
from duq.runtime.files import check_output_directory, write_text, writing
from duq.runtime.plan import Plan
from duq.runtime.preprocess import ModelInputs
from duq.tools import bench_gpu

QUANT = ("none", "llm+expert-mlp", "all")
EAGER = "PyTorch eager fp32"
PAUSE = 0.02  # seconds between two contenders: PyTorch's threads spin for a while when they run out of work

Infer = Callable[[ModelInputs, np.ndarray], object]


def bench(
    suite: str,
    variant: list[str] | None,
    checkpoint: str | None,
    *,
    pi05: bool,
    quant: list[str] | None,
    cameras: int,
    prompt_tokens: int,
    threads: int | None,
    rounds: int,
    torch_compile: bool,
    as_json: bool,
    program: int | None,
    out: Path | None,
) -> None:
    """A suite of duq-bench, with its options by name."""
    _check_program(suite, program)
    variant = variant or (["full"] if suite == "gpu" else ["tiny", "small"])
    if checkpoint is None and (unknown := [name for name in variant if name not in VARIANTS]):
        raise DuqError(f"--variant {unknown[0]}: unknown, one of {', '.join(VARIANTS)}")
    recipes = {name: load_recipe(name, environment={}) for name in quant or QUANT}
    if out is not None:
        check_output_directory("--out", out)
    threads = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="duq-bench-") as name, progress_bar() as progress:
        for index, each in enumerate([checkpoint] if checkpoint else variant):
            directory = Path(name) / str(index)
            directory.mkdir()
            path = checkpoint or make_checkpoint(directory / "checkpoint", variant=str(each), pi05=pi05)
            if suite == "gpu":
                records = bench_gpu.measure(load_checkpoint(path), recipes, directory, torch_compile, progress, program)
                results.append({"policy": f"{each}{' pi0.5' if pi05 else ' pi0'}", "records": records})
                continue
            times = _measure(path, recipes, directory, cameras, prompt_tokens, threads, rounds, torch_compile, progress)
            results.append({"policy": str(each), "cameras": cameras, "threads": threads, "milliseconds": times})
    if out is not None and suite == "gpu":
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        write_text(out / "bench.json", json.dumps({"gpu": torch.cuda.get_device_name(), "results": results}, indent=1))
        for result in results:
            stem = result["policy"].rpartition("/")[2].replace(" ", "-")
            bench_gpu.plot(
                result["records"], out / f"bench-{stem}.svg", f"{result['policy']}, {torch.cuda.get_device_name()}"
            )
    if as_json:
        versions = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__}
        typer.echo(json.dumps({"versions": versions, "results": results}, indent=1))
        return
    for result in results:
        if suite == "gpu":
            Console(width=160).print(bench_gpu.table(result["records"]), bench_gpu.host_table(result["records"]))
        else:
            Console().print(_table(result))


def _check_program(suite: str, program: int | None) -> None:
    """Finds out before anything is compiled whether this machine's GPU runs a program of that SM, or stands in for one."""
    if program is None:
        return
    if suite != "gpu":
        raise DuqError(f"--program {program}: is for --suite gpu; leave it out for {suite}")
    try:
        options_of_program(program, open_device())
    except KernelError as error:
        raise DuqError(f"--program {program}: {error}") from error


def _measure(
    path, recipes, directory, cameras, prompt_tokens, threads, rounds, torch_compile, progress
) -> dict[str, list[float]]:
    """Milliseconds of every call, by contender."""
    policy = load_checkpoint(path)
    inputs, noise = _inputs(policy.config, cameras, prompt_tokens)
    contenders: dict[str, Infer] = {EAGER: _pytorch(build_model(policy))}
    if torch_compile:
        contenders["torch.compile fp32"] = _pytorch(_inductor(build_model(policy)))
    for name, recipe in recipes.items():
        plan = directory / f"{len(contenders)}.plan"
        compile_policy(policy, quantize_checkpoint(policy, recipe, [inputs], progress), plan, Options(), progress)
        contenders[f"engine, --quant {name}"] = CpuExecutor(Plan(plan), threads).run
    times: dict[str, list[float]] = {name: [] for name in contenders}
    task = progress.add_task("Measuring", total=rounds + 1)
    for round_index in range(rounds + 1):
        for name, infer in contenders.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            infer(inputs, noise)
            if round_index:  # the first round compiles, unpacks and allocates
                times[name].append((time.perf_counter() - start) * 1e3)
        progress.advance(task)
    return times


def _inputs(config: ModelConfig, cameras: int, prompt_tokens: int) -> tuple[ModelInputs, np.ndarray]:
    """One observation and its noise. Times depend on the sizes alone, so the contents are random."""
    random, size = np.random.default_rng(0), config.vision.image_size
    inputs = ModelInputs(
        images=random.integers(0, 256, (len(IMAGE_SLOTS), size, size, 3), np.uint8),
        image_mask=np.arange(len(IMAGE_SLOTS)) < cameras,
        tokens=random.integers(0, config.vocab_size, config.max_prompt_tokens),
        token_mask=np.arange(config.max_prompt_tokens) < prompt_tokens,
        state=random.standard_normal(config.action_dim).astype(np.float32),
    )
    return inputs, random.standard_normal((config.action_horizon, config.action_dim), np.float32)


def _pytorch(model: Pi0) -> Infer:
    def infer(inputs: ModelInputs, noise: np.ndarray) -> torch.Tensor:
        fields = (inputs.pixels(), inputs.image_mask, inputs.tokens, inputs.token_mask, inputs.state, noise)
        tensors: list[Any] = [torch.from_numpy(field)[None] for field in fields]
        return model.sample_actions(*tensors)

    return infer


def _inductor(model: Pi0) -> Pi0:
    """The three parts of a call, each compiled; compiling the whole unrolled loop takes an hour and gains nothing here."""
    for part in ("embed_images", "prefix", "velocity"):
        setattr(model, part, torch.compile(getattr(model, part), dynamic=False))
    return model


def _table(result: dict) -> Table:
    title = f"{result['policy']}: {result['cameras']} cameras, {result['threads']} threads"
    table = Table("", "p50 ms", "p99 ms", "against eager", title=title, title_justify="left")
    eager = np.median(result["milliseconds"][EAGER])
    for name, times in result["milliseconds"].items():
        p50, p99 = np.percentile(times, [50, 99])
        table.add_row(name, f"{p50:.1f}", f"{p99:.1f}", f"{eager / p50:.2f} x")
    return table
