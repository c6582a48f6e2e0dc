"""The work of duq-evaluate: every scheme drives a simulated robot."""

from __future__ import annotations

import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from duq.compiler.accuracy.metrics import jerk
from duq.compiler.accuracy.rates import paired_difference, wilson
from duq.compiler.checkpoint import Checkpoint, load_checkpoint
from duq.compiler.pipeline import compile_policy, quantize_checkpoint
from duq.compiler.quant import load_recipe
from duq.compiler.targets import Options
from duq.examples.collect_metaworld import TASKS
from duq.examples.metaworld_env import PROMPTS
from duq.runtime.cli_errors import check_output_file
from duq.runtime.command_line import check_choice, progress_bar
from duq.runtime.files import write_text
from duq.tools import rollout
from duq.tools.evaluate import OF_QUANTIZATION, SCHEMES
from duq.tools.figures import Success, check_figure, draw_success

CALIBRATION_SEED, OBSERVATION_SEED = 2_000_000, 3_000_000  # starts that are neither trained nor evaluated on
CALIBRATION, OBSERVATIONS = 32, 50


@dataclass
class Outcome:
    """What a scheme made of the policy."""

    success: dict[str, list[bool]]  # by task, an episode each, in the order of their starts
    action_error: float  # root mean square of the difference from fp32, on recorded observations
    jerk: (
        float | None
    )  # None: chunks of fewer than four actions; mean squared third difference along the chunks for these observations
    sqnr_db: float | None  # mean over the quantized linears
    steps: float | None  # mean over the episodes that succeed

    @property
    def episodes(self) -> list[bool]:
        return [episode for task in self.success.values() for episode in task]

    @property
    def rate(self) -> float:
        return sum(self.episodes) / len(self.episodes)


Rows = dict[str, list[str]]  # of a table, by scheme; the first, "", has the names of the columns


def prepare(name: str, checkpoint: Checkpoint, inputs: list, directory: Path, progress: Progress) -> rollout.Source:
    """What the workers make a policy of: a compiled plan, or for PyTorch a quantization of the checkpoint."""
    scheme = SCHEMES[name]
    recipe = load_recipe(scheme.preset, scheme.settings, environment={})
    quantization = quantize_checkpoint(checkpoint, recipe, inputs, progress)
    source = rollout.Source(checkpoint.path, quantization, None)
    if scheme.engine:
        options = Options(cameras=rollout.CAMERAS, num_steps=scheme.num_steps, solver=scheme.solver)
        source.plan = directory / f"{name}.plan"
        compile_policy(checkpoint, quantization, source.plan, options, progress)
    return source


def evaluate(
    checkpoint: Path,
    scheme: list[str] | None,
    task: list[str] | None,
    *,
    episodes: int,
    execute: int,
    steps: int,
    push: float,
    jobs: int,
    as_json: bool,
    plot: Path | None,
    markdown: Path | None,
) -> None:
    """What duq-evaluate does, with its options by name."""
    chosen, tasks = scheme or OF_QUANTIZATION, task or list(TASKS)
    for flag, names, known in (("--scheme", chosen, SCHEMES), ("--task", tasks, PROMPTS)):
        for name in names:
            check_choice(flag, name, known)
    if plot is not None:
        check_figure("--plot", plot)
    if markdown is not None:
        check_output_file("--markdown", markdown)
    if "fp32" not in chosen:
        chosen = ["fp32", *chosen]  # what the others are compared with
    policy = load_checkpoint(checkpoint)
    with tempfile.TemporaryDirectory() as directory, progress_bar() as progress:
        overall = progress.add_task("Preparing", total=len(chosen))
        inputs = calibration(policy, tasks)
        sources = {}
        for name in chosen:
            sources[name] = prepare(name, policy, inputs, Path(directory), progress)
            for other in set(progress.task_ids) - {overall}:
                progress.remove_task(other)
            progress.advance(overall)
        conditions = rollout.Conditions(execute, steps, push)
        found = measure(sources, tasks, episodes, conditions, jobs, policy.config, progress)
    if plot is not None:
        draw_success(rates(found), plot)
    if markdown is not None:
        write_text(markdown, f"{markdown_table(measures(found))}\n{markdown_table(successes(found))}")
    if as_json:
        typer.echo(to_json(found))
    else:
        count = f"{episodes} episodes of each of {len(tasks)} tasks"
        Console().print(table(f"{count}; 95 % intervals", measures(found)), table("Success by task, %", successes(found)))


def spread(tasks: list[str], first_seed: int, count: int) -> list[dict]:
    """Recorded observations, `count` in all, of every task."""
    return [o for task in tasks for o in rollout.record(task, first_seed, -(-count // len(tasks)))][:count]


def calibration(checkpoint: Checkpoint, tasks: list[str]) -> list:
    preprocessor = rollout.preprocessor(checkpoint)
    return [preprocessor.model_inputs(observation) for observation in spread(tasks, CALIBRATION_SEED, CALIBRATION)]


def measure(sources, tasks, episodes, conditions, jobs, config, progress: Progress) -> dict[str, Outcome]:
    """Runs all episodes of all schemes, the slow PyTorch ones beside the others."""
    noise_shape = config.action_horizon, config.action_dim
    observations = spread(tasks, OBSERVATION_SEED, OBSERVATIONS)
    noise = np.random.default_rng(0).standard_normal((len(observations), *noise_shape), np.float32)
    work = list(product(sources, tasks, range(episodes)))
    with ProcessPoolExecutor(jobs, get_context("spawn"), rollout.start_worker, (sources,)) as pool:
        chunks = {name: pool.submit(rollout.run_chunks, name, observations, noise) for name in sources}
        run = partial(rollout.run_episode, noise_shape=noise_shape, conditions=conditions)
        results = progress.track(pool.map(run, work, chunksize=5), len(work), description="Episodes")
        lengths = dict(zip(work, results, strict=True))
        actions = {name: chunk.result() for name, chunk in chunks.items()}
    return {name: outcome(name, sources[name], tasks, episodes, lengths, actions) for name in sources}


def outcome(name, source, tasks, episodes, lengths, actions) -> Outcome:
    of_task = {task: [lengths[name, task, start] for start in range(episodes)] for task in tasks}
    solved = [length for each in of_task.values() for length in each if length is not None]
    packs = source.quantization.packs.values()
    return Outcome(
        success={task: [length is not None for length in each] for task, each in of_task.items()},
        steps=float(np.mean(solved)) if solved else None,
        action_error=float(np.sqrt(np.square(actions[name] - actions["fp32"]).mean())),
        jerk=jerk(actions[name]),
        sqnr_db=sum(pack.sqnr_db for pack in packs) / len(packs) if packs else None,
    )


def measures(found: dict[str, Outcome]) -> Rows:
    """By scheme: success over all tasks and its difference from fp32, with their intervals, and what leads to it."""
    shown = {"": ["success, %", "against fp32", "steps", "action error", "jerk", "SQNR, dB"]}
    for name, o in found.items():
        low, high = wilson(sum(o.episodes), len(o.episodes))
        difference, (lower, upper) = paired_difference(found["fp32"].episodes, o.episodes)
        shown[name] = [
            f"{100 * o.rate:.1f} ({100 * low:.1f} to {100 * high:.1f})",
            "" if name == "fp32" else f"{100 * difference:+.1f} ({100 * lower:+.1f} to {100 * upper:+.1f})",
            "" if o.steps is None else f"{o.steps:.1f}",
            f"{o.action_error:.4f}",
            "" if o.jerk is None else f"{o.jerk:.4f}",
            "" if o.sqnr_db is None else f"{o.sqnr_db:.1f}",
        ]
    return shown


def successes(found: dict[str, Outcome]) -> Rows:
    """By scheme: what it is, and success at each task, %."""
    rates = {name: [f"{100 * sum(each) / len(each):.0f}" for each in o.success.values()] for name, o in found.items()}
    tasks = next(iter(found.values())).success
    return {"": ["", *tasks]} | {name: [SCHEMES[name].title, *each] for name, each in rates.items()}


def table(title: str, rows: Rows) -> Table:
    shown = Table(title=title, title_justify="left")
    for index, column in enumerate(["", *rows[""]]):
        shown.add_column(column, justify="right" if index else "left")
    for name, cells in rows.items():
        if name:
            shown.add_row(name, *cells)
    return shown


def markdown_table(rows: Rows) -> str:
    head, *body = [[f"`{name}`" if name else "", *cells] for name, cells in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---", *["---:"] * (len(head) - 1)], *body))


def to_json(found: dict[str, Outcome]) -> str:
    return json.dumps({name: asdict(SCHEMES[name]) | asdict(o) for name, o in found.items()}, indent=2)


def rates(found: dict[str, Outcome]) -> list[Success]:
    """What the figure shows of each scheme."""
    return [
        Success(name, o.rate, wilson(sum(o.episodes), len(o.episodes)), o.action_error, SCHEMES[name].engine)
        for name, o in found.items()
    ]
