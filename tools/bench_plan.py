"""The time of one plan on this machine, alone, as `duq-bench PLAN` measures it. Needs no PyTorch.

Between two calls runs a control, the same small work of numpy each time: where its time varies, the machine does, not the
engine. The calls are divided into repetitions; their medians' spread says how far the figures are to be trusted.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress
from rich.table import Table

import duq
from duq.plugins.driver import device_properties, free_memory, open_device
from duq.plugins.errors import DuqError, KernelError
from duq.runtime.config import ModelConfig
from duq.runtime.errors import EngineError
from duq.runtime.extras import version_of
from duq.runtime.machine import cores, cpu_name
from duq.runtime.observations import load_observations
from duq.runtime.plan import Plan
from duq.runtime.policy import Policy
from duq.tools.made_up import bare_observation

PERCENTILES = {"min": 0, "p50": 50, "p90": 90, "p99": 99, "max": 100}
PROMPT_TOKENS = 48  # by default, as everywhere in docs/performance.md
STEADY = 0.1  # a control whose repetitions differ by more is worth a warning
LIBRARIES = ("numpy", "onnxruntime", "cuda-bindings", "nvidia-cublas", "tensorrt")


def measure(
    path: Path,
    progress: Progress,
    *,
    calls: int,
    warm_up: int,
    repetitions: int,
    cameras: int | None = None,
    prompt_tokens: int | None = None,
    threads: int | None = None,
    observations: Path | None = None,
    batches: Sequence[int] = (),
    in_flight: int | None = None,
) -> dict[str, Any]:
    """Times calls of `Policy.infer`, from observation to actions, in JSON types; times in milliseconds.

    cameras, prompt_tokens: of a made-up observation; observations: those of a file instead, in turn. batches: sizes for
    `Policy.infer_batch`, timed beside as many single calls; in_flight: as `Policy` takes it.
    Raises DuqError before anything is opened where the plan does not take such an observation.
    """
    plan = Plan(path, verify=False)
    found, case = _observations(plan, cameras, prompt_tokens, observations)
    target, before = plan.manifest["target"], _memory(plan.manifest["target"])
    start = time.perf_counter()
    policy = Policy(path, threads=threads, in_flight=in_flight)
    opened = time.perf_counter()
    policy.warmup()
    ready = time.perf_counter()
    turn = cycle(found)
    noise = np.random.default_rng(0).standard_normal(
        (policy.metadata["action_horizon"], policy.metadata["model_action_dim"]), np.float32
    )

    def infer() -> dict[str, float]:
        timing: dict[str, float] = policy.infer(next(turn), noise)["policy_timing"]
        return timing

    stages, controls = _time(infer, calls, warm_up, progress)
    after = _memory(target)
    throughput = in_batches(policy, found, batches, calls, repetitions, progress) if batches else None
    with_batches = _memory(target)
    latency = [each["infer_ms"] for each in stages]
    return {
        "plan": {"path": str(path), "bytes": path.stat().st_size, **_about(plan, policy)},
        "case": case | {"calls": calls, "warm_up": warm_up, "threads": threads},
        "latency_ms": summary(latency) | {"mean": float(np.mean(latency))},
        "calls_per_second": 1e3 / float(np.mean(latency)),
        "stages_ms": {key: summary([each[key] for each in stages]) for key in stages[0] if key != "infer_ms"},
        "control_ms": summary(controls),
        "spread": {"engine": spread(latency, repetitions), "control": spread(controls, repetitions)},
        "open_s": opened - start,
        "warmup_s": ready - opened,
        "memory_bytes": {key: after[key] - before[key] for key in after},
        "machine": _machine(target),
        "times_ms": latency,
    } | (
        {"batches": throughput | {"memory_bytes": {key: with_batches[key] - after[key] for key in after}}}
        if throughput
        else {}
    )


def summary(times: Sequence[float]) -> dict[str, float]:
    values = np.percentile(times, list(PERCENTILES.values()))
    return dict(zip(PERCENTILES, map(float, values), strict=True))


def spread(times: Sequence[float], repetitions: int) -> float:
    """How far the medians of equal parts of the times are apart, the largest from the least, over the median of all."""
    medians = [float(np.median(part)) for part in np.array_split(times, min(repetitions, len(times)))]
    return (max(medians) - min(medians)) / float(np.median(times))


def _observations(
    plan: Plan, cameras: int | None, prompt_tokens: int | None, file: Path | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What to call with, and what the result says of it."""
    if file is not None:
        if cameras is not None or prompt_tokens is not None:
            raise DuqError("--observations has cameras and prompts of its own; leave --cameras and --prompt-tokens out")
        found = load_observations(file)
        return found, {"observations": str(file), "count": len(found)}
    config, most = ModelConfig.from_json(plan.manifest["model"]), plan.manifest["cameras"]
    cameras = most if cameras is None else cameras
    prompt_tokens = min(PROMPT_TOKENS, config.max_prompt_tokens) if prompt_tokens is None else prompt_tokens
    if cameras > most:
        raise DuqError(f"--cameras {cameras}: {plan.path} takes at most {most}")
    if prompt_tokens > config.max_prompt_tokens:
        raise DuqError(f"--prompt-tokens {prompt_tokens}: {plan.path} takes at most {config.max_prompt_tokens}")
    return [bare_observation(config, cameras, prompt_tokens)], {"cameras": cameras, "prompt_tokens": prompt_tokens}


def _time(
    infer: Callable[[], dict[str, float]], calls: int, warm_up: int, progress: Progress
) -> tuple[list[dict[str, float]], list[float]]:
    """What each counted call says of its stages, and the control after it. The bar is drawn between two calls."""
    stages: list[dict[str, float]] = []
    controls: list[float] = []
    control = _control()
    task = progress.add_task("Measuring", total=warm_up + calls)
    for index in range(warm_up + calls):
        timing, milliseconds = infer(), next(control)
        if index >= warm_up:
            stages.append(timing)
            controls.append(milliseconds)
        progress.advance(task)
        progress.refresh()
    return stages, controls


def _control() -> Iterator[float]:
    """Milliseconds of a product of two matrices, computed anew each time."""
    matrix = np.random.default_rng(0).standard_normal((256, 256), np.float32)
    while True:
        start = time.perf_counter()
        matrix @ matrix
        yield (time.perf_counter() - start) * 1e3


def in_batches(
    policy: Policy, found: Sequence[dict[str, Any]], sizes: Sequence[int], calls: int, repetitions: int, progress: Progress
) -> dict[str, Any]:
    """Calls a second of `infer_batch`, by size, beside as many single calls: in each round every size runs once both ways.

    calls: of each size and way, at least; repetitions: rounds, at least. Raises EngineError where actions differ in a bit.
    """
    shape = (policy.metadata["action_horizon"], policy.metadata["model_action_dim"])
    noise = np.random.default_rng(0).standard_normal((max(sizes), *shape), np.float32)
    given = [observation for observation, _ in zip(cycle(found), noise, strict=False)]

    def single(size: int) -> list[dict[str, Any]]:
        return [policy.infer(*each) for each in zip(given[:size], noise[:size], strict=True)]

    def batch(size: int) -> list[dict[str, Any]]:
        return policy.infer_batch(given[:size], noise[:size])

    for alone, together in zip(single(max(sizes)), batch(max(sizes)), strict=True):  # the first batch: opens what it needs
        if not np.array_equal(alone["actions"], together["actions"]):
            raise EngineError("infer_batch gives other actions than single calls; report it")
    rounds = max(repetitions, -(-calls // max(sizes)))
    times: dict[tuple[int, str], list[float]] = {(size, way): [] for size in sizes for way in ("single", "batch")}
    task = progress.add_task("Measuring batches", total=rounds)
    for _ in range(rounds):
        for size in sizes:
            for _ in range(max(sizes) // size):
                for way, work in (("single", single), ("batch", batch)):
                    start = time.perf_counter()
                    work(size)
                    times[size, way].append((time.perf_counter() - start) * 1e3)
        progress.advance(task)
        progress.refresh()
    return {"in_flight": policy.in_flight, "sizes": [_of_size(size, times, repetitions) for size in sizes]}


def _of_size(size: int, times: dict[tuple[int, str], list[float]], repetitions: int) -> dict[str, Any]:
    single, batch = times[size, "single"], times[size, "batch"]
    rates = {name: 1e3 * size / float(np.median(each)) for name, each in (("single", single), ("batch", batch))}
    return {
        "batch": size,
        "calls_per_second": rates["batch"],
        "single_calls_per_second": rates["single"],
        "faster": rates["batch"] / rates["single"],
        "batch_ms": summary(batch),
        "single_ms": summary(single),  # of as many calls
        "spread": {"batch": spread(batch, repetitions), "single": spread(single, repetitions)},
    }


def _memory(target: str) -> dict[str, int]:
    """Bytes in use now: of this process, and where the plan is a GPU's, of its memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    found = {"host": pages * os.sysconf("SC_PAGE_SIZE")}
    if target != "cpu":
        try:
            open_device()
            free, total = free_memory()
            found["device"] = total - free
        except KernelError:  # opening the plan will say so
            pass
    return found


def _about(plan: Plan, policy: Policy) -> dict[str, Any]:
    recipe = (plan.manifest.get("quantization") or {}).get("recipe") or {}
    keys = ("model", "robot", "target", "num_steps", "solver", "action_horizon", "checkpoint", "program")
    return {key: policy.metadata[key] for key in keys if key in policy.metadata} | {"scheme": recipe.get("scheme")}


def _machine(target: str) -> dict[str, Any]:
    """What the figures were measured on."""
    versions = {name: version for name in LIBRARIES if (version := version_of(name))}
    machine = {
        "cpu": cpu_name(), "cores": cores(), "system": platform.platform(),
        "python": platform.python_version(), "duq": duq.__version__, "libraries": versions,
    }  # fmt: skip
    return machine | ({"gpu": device_properties()[0]} if target != "cpu" else {})


def unsteady(result: dict[str, Any]) -> str:
    """A warning where the machine itself was not steady, or nothing."""
    found = result["spread"]["control"]
    if found <= STEADY:
        return ""
    return (
        f"the machine was not steady: its control varied by {found:.0%} between repetitions; run it again when it is idle"
    )


def tables(result: dict[str, Any]) -> list[Table | str]:
    """The result for people."""
    case, plan, machine = result["case"], result["plan"], result["machine"]
    what = f"observations of {case['observations']}" if "observations" in case else (
        f"{case['cameras']} cameras, {case['prompt_tokens']} prompt tokens"
    )  # fmt: skip
    head = f"{plan['path']}: {plan['model']}, {plan['target']}, {what}, {case['calls']} calls after {case['warm_up']}"
    table = Table("milliseconds", *PERCENTILES, title_justify="left")
    rows = {"a call": result["latency_ms"]} | {
        f"  {key.removesuffix('_ms')}": values for key, values in result["stages_ms"].items()
    }
    for name, values in (rows | {"control (not the engine)": result["control_ms"]}).items():
        table.add_row(name, *(f"{values[key]:.2f}" for key in PERCENTILES))
    memory = ", ".join(f"{name} {count / 1e6:,.0f} MB" for name, count in result["memory_bytes"].items())
    engine, control = result["spread"]["engine"], result["spread"]["control"]
    batches = [_batches_table(result["batches"])] if "batches" in result else []
    return [
        head,
        table,
        *batches,
        f"throughput {result['calls_per_second']:.2f} calls/s; between repetitions the median varied by {engine:.1%}, "
        f"that of the control by {control:.1%}",
        f"open {result['open_s']:.2f} s, warm up {result['warmup_s']:.2f} s; memory that the policy took: {memory}",
        f"on {machine.get('gpu', machine['cpu'])}, {machine['cores']} cores, Python {machine['python']}, duq {machine['duq']}",
    ]


def _batches_table(batches: dict[str, Any]) -> Table:
    memory = ", ".join(f"{name} {count / 1e6:,.0f} MB" for name, count in batches["memory_bytes"].items())
    title = f"infer_batch, up to {batches['in_flight']} at once (memory that it took: {memory}), and single calls in the same run"
    table = Table("batch", "calls/s", "single calls/s", "faster", "p50 ms", "p99 ms", title=title, title_justify="left")
    for each in batches["sizes"]:
        rates = each["calls_per_second"], each["single_calls_per_second"], each["faster"]
        times = each["batch_ms"]["p50"], each["batch_ms"]["p99"]
        table.add_row(str(each["batch"]), *(f"{value:.2f}" for value in (*rates, *times)))
    return table
