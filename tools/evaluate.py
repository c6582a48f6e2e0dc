"""What quantisation costs a policy in success: `python tools/evaluate.py --help`."""
from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Any, Optional

if __name__ in ("__main__", "__mp_main__"):  # import from the repository: tools/profile.py would pass for the standard library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from compiler.accuracy.metrics import jerk
from compiler.accuracy.plots import ENGINE, REFERENCE, STYLE
from compiler.checkpoint import Checkpoint, load_checkpoint
from compiler.pipeline import Options, compile_policy, quantize_checkpoint
from compiler.quant import load_recipe
from compiler.quantize_cli import progress_bar
from plugins.errors import DuqError
from runtime.cli_errors import check_output_file, one_line_errors
from runtime.preprocess import Preprocessor

try:
    from examples.collect_metaworld import TASKS
    from examples.metaworld_env import PROMPTS
    from tools import rollout
except ModuleNotFoundError as missing:
    raise SystemExit(f"error: {missing}; pip install 'duq[compile,examples]'") from None

CALIBRATION_SEED, OBSERVATION_SEED = 2_000_000, 3_000_000  # starts that are neither trained nor evaluated on
CALIBRATION, OBSERVATIONS = 32, 50


@dataclass(frozen=True)
class Scheme:
    """A preset with recipe settings; `engine` or PyTorch."""

    title: str
    preset: str
    settings: dict[str, Any] = field(default_factory=dict)
    engine: bool = True


SCHEMES = {
    "fp32": Scheme("PyTorch fp32", "none", engine=False),
    "none": Scheme("engine, float", "none"),
    "w4a8-llm": Scheme("W4A8: language model", "llm"),
    "w4a8": Scheme("W4A8: and the expert's MLPs (default)", "llm+expert-mlp"),
    "w4a8-compensated": Scheme("- with error compensation", "llm+expert-mlp", {"compensate": True}),
    "w4a8-all": Scheme("W4A8: all linears", "all"),
    "w4a8-all-compensated": Scheme("- with error compensation", "all", {"compensate": True}),
    "w4a16": Scheme("W4A16: all linears", "all", {"activation_bits": 0}),
    "w8a8": Scheme("W8A8: all linears", "all", {"weight_bits": 8}),
    "reference": Scheme("original fake quantisation: default scope", "llm+expert-mlp", {"scheme": "reference"}, engine=False),
    "reference-all": Scheme("original fake quantisation: all linears", "all", {"scheme": "reference"}, engine=False),
}


@dataclass
class Outcome:
    """What a scheme made of the policy."""

    success: dict[str, list[bool]]  # by task, an episode each, in the order of their starts
    action_error: float  # root mean square of the difference from fp32, on recorded observations
    jerk: float  # mean squared third difference along the chunks for these observations
    sqnr_db: float | None  # mean over the quantised linears
    steps: float | None  # mean over the episodes that succeed

    @property
    def episodes(self) -> list[bool]:
        return [episode for task in self.success.values() for episode in task]


Interval = tuple[float, float]


def wilson(successes: int, episodes: int, confidence: float = 0.95) -> Interval:
    """Wilson's interval for a rate: right also at 0 % and 100 %."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate, shrink = successes / episodes, 1 + z * z / episodes
    middle = (rate + z * z / (2 * episodes)) / shrink
    half = z * (rate * (1 - rate) / episodes + z * z / (4 * episodes**2)) ** 0.5 / shrink
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_difference(reference: Sequence[bool], found: Sequence[bool], confidence: float = 0.95) -> tuple[float, Interval]:
    """Difference of two rates over the same episodes, and Agresti and Min's interval for it: half an episode is added to
    each of the four outcomes of a pair."""
    z, n = NormalDist().inv_cdf(0.5 + confidence / 2), len(reference) + 2
    gained = sum(f and not r for r, f in zip(reference, found)) + 0.5
    lost = sum(r and not f for r, f in zip(reference, found)) + 0.5
    middle = (gained - lost) / n
    half = z * ((gained + lost) - (gained - lost) ** 2 / n) ** 0.5 / n
    return (gained - lost) / len(reference), (max(-1.0, middle - half), min(1.0, middle + half))


def prepare(name: str, checkpoint: Checkpoint, inputs: list, directory: Path, progress: Progress) -> rollout.Source:
    """What the workers make a policy of: a compiled plan, or for PyTorch a quantisation of the checkpoint."""
    scheme = SCHEMES[name]
    recipe = load_recipe(scheme.preset, scheme.settings, environment={})
    quantization = quantize_checkpoint(checkpoint, recipe, inputs, progress)
    source = rollout.Source(checkpoint.path, quantization, None)
    if scheme.engine:
        source.plan = directory / f"{name}.plan"
        compile_policy(checkpoint, quantization, source.plan, Options(cameras=rollout.CAMERAS), progress)
    return source


app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.command()
def _evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Trained by examples/train_metaworld.py.")] = Path("examples/metaworld_policy"),
    scheme: Annotated[Optional[list[str]], typer.Option(help=f"Repeatable; by default all: {', '.join(SCHEMES)}.")] = None,
    task: Annotated[Optional[list[str]], typer.Option(help="Repeatable; by default those that the policy was trained on.")] = None,
    episodes: Annotated[int, typer.Option(min=1, help="Of each task and scheme.")] = 100,
    execute: Annotated[int, typer.Option(min=1, help="Actions of a chunk to carry out before asking again.")] = 8,
    steps: Annotated[int, typer.Option(min=1, max=500, help="After which an episode has failed.")] = 200,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, of one thread each.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, each episode included.")] = False,
    plot: Annotated[Optional[Path], typer.Option(help="Figure to write (.svg, .png, .pdf).")] = None,
    markdown: Annotated[Optional[Path], typer.Option(help="Table to write.")] = None,
) -> None:
    """Drive a simulated robot with a policy at each quantisation, and count the episodes that succeed.

    Every scheme gets the same starts and the same noise, so that what differs is the arithmetic. Calibration, and the
    observations on which actions are compared, come from the scripted expert, at starts of their own.

    [bold]Examples[/bold]

      python tools/evaluate.py --episodes 20 --scheme fp32 --scheme w4a8

      python tools/evaluate.py --plot docs/success.svg --markdown success.md --json > success.json
    """
    chosen, tasks = scheme or list(SCHEMES), task or list(TASKS)
    _check_choice("--scheme", chosen, SCHEMES)
    _check_choice("--task", tasks, PROMPTS)
    for flag, file in (("--plot", plot), ("--markdown", markdown)):
        if file is not None:
            check_output_file(flag, file)
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
        found = measure(sources, tasks, episodes, execute, steps, jobs, policy.config, progress)
    if plot is not None:
        draw(found, plot)
    if markdown is not None:
        markdown.write_text("\n".join(markdown_lines(found)) + "\n")
    typer.echo(to_json(found)) if as_json else Console().print(table(found))


def _check_choice(flag: str, chosen: list[str], known) -> None:
    for name in chosen:
        if name not in known:
            raise DuqError(f"{flag} {name}: unknown, one of {', '.join(known)}")


def spread(tasks: list[str], first_seed: int, count: int) -> list[dict]:
    """Recorded observations, `count` in all, of every task."""
    return [o for task in tasks for o in rollout.record(task, first_seed, -(-count // len(tasks)))][:count]


def calibration(checkpoint: Checkpoint, tasks: list[str]) -> list:
    preprocessor = Preprocessor(checkpoint.config, tokenizer=checkpoint.tokenizer.read_bytes(), cameras=rollout.CAMERAS)
    return [preprocessor.model_inputs(observation) for observation in spread(tasks, CALIBRATION_SEED, CALIBRATION)]


def measure(sources, tasks, episodes, execute, steps, jobs, config, progress: Progress) -> dict[str, Outcome]:
    """Runs all episodes of all schemes, the slow PyTorch ones beside the others."""
    noise_shape = config.action_horizon, config.action_dim
    observations = spread(tasks, OBSERVATION_SEED, OBSERVATIONS)
    noise = np.random.default_rng(0).standard_normal((len(observations), *noise_shape), np.float32)
    work = list(product(sources, tasks, range(episodes)))
    with ProcessPoolExecutor(jobs, get_context("spawn"), rollout.start_worker, (sources,)) as pool:
        chunks = {name: pool.submit(rollout.run_chunks, name, observations, noise) for name in sources}
        run = partial(rollout.run_episode, noise_shape=noise_shape, execute=execute, limit=steps)
        results = progress.track(pool.map(run, work, chunksize=5), len(work), description="Episodes")
        lengths = dict(zip(work, results))
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


def rows(found: dict[str, Outcome]) -> list[list[str]]:
    """Title, success by task, of all with its interval, difference from fp32 with its interval, action error, jerk."""
    shown = []
    for name, o in found.items():
        rates = [f"{100 * sum(each) / len(each):.0f}" for each in o.success.values()]
        low, high = wilson(sum(o.episodes), len(o.episodes))
        overall = f"{100 * sum(o.episodes) / len(o.episodes):.1f} ({100 * low:.1f} to {100 * high:.1f})"
        difference, (lower, upper) = paired_difference(found["fp32"].episodes, o.episodes)
        paired = "" if name == "fp32" else f"{100 * difference:+.1f} ({100 * lower:+.1f} to {100 * upper:+.1f})"
        sqnr = "" if o.sqnr_db is None else f"{o.sqnr_db:.1f}"
        shown.append([SCHEMES[name].title, *rates, overall, paired, f"{o.action_error:.4f}", f"{o.jerk:.4f}", sqnr])
    return shown


def columns(found: dict[str, Outcome]) -> list[str]:
    tasks = next(iter(found.values())).success
    return ["", *tasks, "all", "against fp32", "action error", "jerk", "SQNR dB"]


def table(found: dict[str, Outcome]) -> Table:
    count = len(next(iter(next(iter(found.values())).success.values())))
    shown = Table(title=f"Episodes that succeed, %, of {count} for each task (95 % intervals)", title_justify="left")
    for index, column in enumerate(columns(found)):
        shown.add_column(column, justify="right" if index else "left")
    for row in rows(found):
        shown.add_row(*row)
    return shown


def markdown_lines(found: dict[str, Outcome]) -> list[str]:
    head = columns(found)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows(found)]
    return [f"| {' | '.join(line)} |" for line in lines]


def to_json(found: dict[str, Outcome]) -> str:
    return json.dumps({name: asdict(SCHEMES[name]) | asdict(o) for name, o in found.items()}, indent=2)


def draw(found: dict[str, Outcome], file: Path) -> None:
    """Success of each scheme over all tasks, with its interval."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        canvas = Figure(figsize=(7.2, 0.8 + 0.28 * len(found)), layout="constrained")
        axes = canvas.subplots()
        for row, o in enumerate(found.values()):
            episodes = o.episodes
            rate, (low, high) = 100 * sum(episodes) / len(episodes), wilson(sum(episodes), len(episodes))
            axes.plot((100 * low, 100 * high), (row, row), color=ENGINE if row else REFERENCE)
            axes.plot(rate, row, "o", color=ENGINE if row else REFERENCE)
        axes.set(xlabel="episodes that succeed, % (95 % interval)", yticks=range(len(found)))
        axes.set_yticklabels([SCHEMES[name].title for name in found])
        axes.grid(axis="y", visible=False)
        axes.invert_yaxis()
        canvas.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def main() -> None:
    with one_line_errors():
        app()


if __name__ == "__main__":
    main()
