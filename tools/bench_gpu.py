"""The GPU suite of duq-bench: cuda plans against PyTorch on the same card, in one process, with the same inputs."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.progress import Progress
from rich.table import Table

from duq.compiler.accuracy.metrics import difference
from duq.compiler.checkpoint import Checkpoint
from duq.compiler.model import Pi0, build_model
from duq.compiler.pipeline import compile_policy, quantize_checkpoint
from duq.compiler.quant import Quantization, Recipe
from duq.compiler.quant.linears import select_linears
from duq.compiler.targets.cuda import options_of_program
from duq.plugins.driver import free_memory, open_device
from duq.runtime.config import ModelConfig
from duq.runtime.executors.cuda import CudaExecutor
from duq.runtime.executors.programs import Program
from duq.runtime.plan import Plan
from duq.runtime.policy import Policy
from duq.runtime.preprocess import ModelInputs, Preprocessor
from duq.tools.figures import save_figure
from duq.tools.made_up import bare_observation

CASES = [(1, 48), (2, 48), (3, 48)]  # cameras, prompt tokens
WARM_UP, CALLS = 20, 300


def measure(
    checkpoint: Checkpoint,
    recipes: dict[str, Recipe],
    directory: Path,
    compile_pytorch: bool,
    progress: Progress,
    program: int | None = None,
) -> list[dict]:
    """One record for each contender and case: milliseconds of all calls, and what the engine reports of itself.

    program: an SM whose program the engines run on this GPU, in place of the GPU's own, or a stand-in for it runs. Raises
    KernelError where neither can.
    """
    shape = checkpoint.config.action_horizon, checkpoint.config.action_dim
    noise = np.random.default_rng(1).standard_normal(shape, np.float32)
    observations = {case: bare_observation(checkpoint.config, *case) for case in CASES}
    with _paused(progress):
        records = _measure_pytorch(checkpoint, observations, noise, compile_pytorch)
    expected = {case: records[index]["actions"] for index, case in enumerate(CASES)}  # the first: float32
    for name, recipe in recipes.items():
        gc.collect()
        torch.cuda.empty_cache()  # the quantizer's memory is not the engine's
        plan, start = directory / f"{name}.plan", time.perf_counter()
        inputs = [Preprocessor(checkpoint.config).model_inputs(obs) for obs in observations.values()]
        quantized = select_linears(recipe, checkpoint.config)
        integers = (
            quantize_checkpoint(checkpoint, recipe, inputs, progress, device="cuda") if quantized else Quantization(recipe)
        )
        options = options_of_program(program or open_device(), open_device())
        compile_policy(checkpoint, integers, plan, options, progress)
        seconds = time.perf_counter() - start
        del integers
        torch.cuda.empty_cache()
        with _paused(progress):
            contender = f"engine, --quant {name}"
            records += _measure_engine(contender, plan, seconds, checkpoint.config, observations, noise, program)
    for record in records:
        actions = record.pop("actions")
        record["cosine"] = difference(expected[record["cameras"], record["prompt_tokens"]], actions).cosine
    return records


@contextmanager
def _paused(progress: Progress) -> Iterator[None]:
    """Without the bar's thread, which draws ten times a second: a call that ends meanwhile waits for the interpreter."""
    progress.stop()
    yield
    progress.start()


def _measure_pytorch(checkpoint: Checkpoint, observations: dict, noise: np.ndarray, compile_pytorch: bool) -> list[dict]:
    model, records = build_model(checkpoint).cuda(), []

    def measure(name: str, cases: list, calls: int, prepare: Callable) -> None:
        for case in cases:
            infer = prepare(model, Preprocessor(checkpoint.config).model_inputs(observations[case]), noise)
            records.append(_record(name, case, *_timed(infer, calls)))

    measure("PyTorch eager fp32", CASES, 3, _eager)
    model.to(torch.bfloat16)
    measure("PyTorch eager bf16", CASES, 20, _eager)
    if compile_pytorch:  # for minutes, and for each case anew
        measure("torch.compile bf16, CUDA graph", CASES[-1:], 100, _in_graph)
    return records


def _measure_engine(
    name: str,
    plan: Path,
    compile_s: float,
    config: ModelConfig,
    observations: dict,
    noise: np.ndarray,
    program: int | None,
) -> list[dict]:
    free, start = free_memory()[0], time.perf_counter()
    policy = Policy(plan)
    opened = time.perf_counter()
    policy.warmup()
    facts = {
        "compile_s": compile_s,
        "open_s": opened - start,
        "warmup_s": time.perf_counter() - opened,
        "device_bytes": free - free_memory()[0],
        "plan_bytes": plan.stat().st_size,
    }
    records = []
    for case, obs in observations.items():
        stages: list[dict] = []

        def infer(obs=obs, stages=stages) -> np.ndarray:
            result = policy.infer(obs, noise)
            stages.append(result["policy_timing"])
            return result["actions"]

        controls: list[float] = []
        actions, times = _timed(infer, CALLS, partial(_append_control, controls))
        stages = stages[-CALLS:]
        replay = [each["prefix_ms"] + each["denoise_ms"] for each in stages]
        split = {key: float(np.median([each[key] for each in stages])) for key in ("prefix_ms", "denoise_ms")}
        host = _host(stages) | {"control": controls[-CALLS:]}
        records.append(_record(name, case, actions, times, replay_ms=replay, host_ms=host, **split, **facts))
    executor, preprocessor = CudaExecutor(Plan(plan, verify=False)), Preprocessor(config)
    for record, obs in zip(records, observations.values(), strict=True):
        record["contender"] += _foreign(program, executor.program, open_device())
        size = executor.stage(preprocessor.model_inputs(obs), noise)
        record["loop_ms"] = executor.milliseconds_in_turn(size)[1]
    return records


def _foreign(wanted: int | None, ran: Program, sm: int) -> str:
    """Says of the program of an SM that it was not made for the GPU of compute capability `sm`, which ran it or a stand-in."""
    if wanted in (None, sm):
        return ""
    if ran.sm != wanted:
        return f"; foreign program: schedule of SM {wanted}, compiled for SM {ran.sm} without what it lacks"
    how = "PTX" if ran.image == "ptx" else "machine code"
    return f"; foreign program: made for SM {wanted}, run as {how} on SM {sm}"


def _host(stages: list[dict]) -> dict[str, list[float]]:
    """Milliseconds of each call's parts on the host, the wait without the replay that it is for."""
    parts = {name: [each[f"{name}_ms"] for each in stages] for name in ("preprocess", "stage", "launch")}
    parts["wait"] = [each["wait_ms"] - each["prefix_ms"] - each["denoise_ms"] for each in stages]
    known = ("preprocess_ms", "stage_ms", "launch_ms", "wait_ms")
    return parts | {"rest": [each["infer_ms"] - sum(each[key] for key in known) for each in stages]}


def _tensors(model: Pi0, inputs: ModelInputs, noise: np.ndarray) -> list[Any]:
    """What `sample_actions` takes; absent cameras and prompt padding left out, as the engine leaves them out."""
    fields = (inputs.pixels()[inputs.image_mask], inputs.image_mask[inputs.image_mask], inputs.tokens[inputs.token_mask],
              inputs.token_mask[inputs.token_mask], inputs.state, noise)  # fmt: skip
    dtype = model.projector.weight.dtype if model.projector.weight.dtype == torch.bfloat16 else torch.float32
    tensors = [torch.from_numpy(field)[None].cuda() for field in fields]
    return [each.to(dtype) if each.is_floating_point() else each for each in tensors]


def _eager(model: Pi0, inputs: ModelInputs, noise: np.ndarray) -> Callable[[], np.ndarray]:
    return lambda: model.sample_actions(*_tensors(model, inputs, noise))[0].float().cpu().numpy()


def _in_graph(model: Pi0, inputs: ModelInputs, noise: np.ndarray) -> Callable[[], np.ndarray]:
    """The whole call, its parts compiled by Inductor, in one CUDA graph: the least that PyTorch can take."""
    for part in ("embed_images", "prefix", "velocity"):
        setattr(model, part, torch.compile(getattr(model, part), dynamic=False))
    static = _tensors(model, inputs, noise)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            model.sample_actions(*static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actions = model.sample_actions(*static)

    def infer() -> np.ndarray:
        for to, source in zip(static, _tensors(model, inputs, noise), strict=True):
            to.copy_(source)
        graph.replay()
        return actions[0].float().cpu().numpy()

    return infer


def _timed(
    infer: Callable[[], np.ndarray], calls: int, between: Callable[[], None] = lambda: None
) -> tuple[np.ndarray, list[float]]:
    times = []
    for _ in range((WARM_UP if calls > 100 else 2) + calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        actions = infer()
        times.append((time.perf_counter() - start) * 1e3)
        between()
    return actions, times[-calls:]


def _append_control(controls: list[float]) -> None:
    controls.append(_control())


def _control() -> float:
    """Milliseconds of a fixed piece of interpreter work after each call: where it is slow, so is the machine."""
    start = time.perf_counter()
    sum(range(10_000))
    return (time.perf_counter() - start) * 1e3


def _record(name: str, case: tuple[int, int], actions: np.ndarray, times: list[float], **more) -> dict:
    cameras, prompt = case
    return {"contender": name, "cameras": cameras, "prompt_tokens": prompt, "wall_ms": times, "actions": actions, **more}


def table(records: list[dict]) -> Table:
    """Medians and 99th percentiles, and what else is known of a contender."""
    columns = [
        "",
        "cameras",
        "wall p50",
        "p99",
        "replay p50",
        "p99",
        "prefix",
        "steps",
        "loop",
        "memory",
        "compile",
        "open+warm",
        "cosine",
    ]
    title = "milliseconds (steps: behind the prefix, beside which most of the first runs; "
    title += "loop: all of them, nothing beside the prefix);"
    title += "\nmemory in GB, compile and open in s; cosine of the actions to fp32"
    found = Table(*columns, title=title, title_justify="left")
    for each in records:
        wall, replay = np.percentile(each["wall_ms"], [50, 99]), each.get("replay_ms")
        cells = [f"{value:.2f}" for value in wall]
        cells += [f"{value:.2f}" for value in np.percentile(replay, [50, 99])] if replay else ["", ""]
        cells += [f"{each[key]:.2f}" if key in each else "" for key in ("prefix_ms", "denoise_ms", "loop_ms")]
        cells.append(f"{each['device_bytes'] / 1e9:.2f}" if "device_bytes" in each else "")
        cells.append(f"{each['compile_s']:.0f}" if "compile_s" in each else "")
        cells.append(f"{each['open_s']:.1f}+{each['warmup_s']:.1f}" if "open_s" in each else "")
        found.add_row(each["contender"], str(each["cameras"]), *cells, f"{each['cosine']:.6f}")
    return found


def host_table(records: list[dict]) -> Table:
    """What the engines' calls take beyond the replay of their graphs, and where."""
    names = ("preprocess", "stage", "launch", "wait", "rest", "control")
    title = (
        "microseconds of the host, p50 / p99; wait: beyond the replay; control: the same work each time, not the engine's"
    )
    found = Table("", "cameras", *names, title=title, title_justify="left")
    for each in records:
        if "host_ms" in each:
            spread = {name: 1e3 * np.percentile(each["host_ms"][name], [50, 99]) for name in names}
            cells = [f"{median:.0f} / {tail:.0f}" for median, tail in spread.values()]
            found.add_row(each["contender"], str(each["cameras"]), *cells)
    return found


def plot(records: list[dict], path: Path, title: str) -> None:
    """Bars of the median wall time, a group for each number of cameras."""
    contenders = list(dict.fromkeys(each["contender"] for each in records))
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for index, name in enumerate(contenders):
        chosen = [each for each in records if each["contender"] == name]
        places = [each["cameras"] + (index - (len(contenders) - 1) / 2) * 0.8 / len(contenders) for each in chosen]
        bars = axes.bar(places, [np.median(each["wall_ms"]) for each in chosen], 0.8 / len(contenders), label=name)
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    axes.set(yscale="log", ylabel="milliseconds, observation to actions (p50)", xlabel="cameras", title=title)
    axes.set_xticks(sorted({each["cameras"] for each in records}))
    axes.legend(fontsize=8)
    figure.tight_layout()
    save_figure(figure, path)
