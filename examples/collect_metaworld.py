"""Records what Meta-World's scripted expert does: `python examples/collect_metaworld.py --help`."""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout
    from duq.commands import command

    command("collect_metaworld.py", "duq.examples.collect_metaworld:main", "examples")()

import numpy as np
import typer
from rich.console import Console

from duq.compiler.quantize_cli import progress_bar
from duq.examples.metaworld_data import Demonstrations, encode, observations, save
from duq.examples.metaworld_env import ACTION_DIM, PROMPTS, MetaworldEnv
from duq.plugins.errors import DuqError
from duq.runtime.cli_errors import check_output_file, one_line_errors
from duq.runtime.images import resize_with_pad
from duq.runtime.observations import save_observations

# Tasks that forgive a centimeter, which is what a small policy sees at this image size.
TASKS = ("button-press-topdown", "coffee-button", "drawer-close", "handle-press", "window-open")
IMAGE_SIZE = 112
FIRST_SEED = 1_000_000  # of the starts to learn from: evaluation counts from 0
LIMIT = 250  # steps of an episode
CALIBRATION = 20

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


def disturbances(rng: np.random.Generator, steps: int, horizon: int, strength: float = 0.8) -> np.ndarray:
    """What pushes the arm off its way, to be added to the actions, float [steps, ACTION_DIM]; `strength`: its deviation.

    Cloning the expert alone goes wrong where it never was. Every few moments it is therefore pushed aside for some steps,
    and then left alone for long enough to see whole chunks of how it gets back.
    """
    pushes = np.zeros((steps, ACTION_DIM))
    step = int(rng.integers(0, horizon))
    while step < steps:
        end = step + int(rng.integers(3, 11))
        pushes[step:end] = rng.normal(0.0, strength, ACTION_DIM)
        step = end + int(rng.integers(horizon + 4, horizon + 20))
    return pushes


def demonstrate(env: MetaworldEnv, seed: int, horizon: int, every: int) -> Demonstrations | None:
    """An episode of the expert, disturbed now and then: the moments, one of `every` steps, that `horizon` undisturbed
    actions follow. None if it did not succeed."""
    pushes = disturbances(np.random.default_rng(seed), LIMIT + horizon, horizon)
    env.reset(seed)
    actions, moments = [], []
    for step in range(LIMIT):
        if step % every == 0 and not pushes[step : step + horizon].any():
            moments.append((step, env.observation()))
        actions.append(env.expert_action())
        if env.step(actions[-1] + pushes[step]):
            break
    else:
        return None
    for _ in range(horizon):  # the last chunks reach beyond the success
        actions.append(env.expert_action())
        env.step(actions[-1])
    if not moments:
        return None
    steps, observations = zip(*moments, strict=True)
    return Demonstrations(
        images=[
            [encode(resize_with_pad(image, IMAGE_SIZE, IMAGE_SIZE)) for image in observation["image"].values()]
            for observation in observations
        ],
        states=np.array([observation["state"] for observation in observations]),
        actions=np.array([actions[step : step + horizon] for step in steps], np.float16),
        prompts=np.array([observation["prompt"] for observation in observations]),
        episodes=np.full(len(moments), seed, np.int32),
    )


@cache
def _env(task: str) -> MetaworldEnv:
    """One for each task in each process."""
    return MetaworldEnv(task)


def _demonstrate(start: tuple[str, int], horizon: int, every: int) -> Demonstrations | None:
    task, seed = start
    return demonstrate(_env(task), seed, horizon, every)


@app.command()
def _collect(
    out: Annotated[Path, typer.Argument(help="The .npz file to write.")],
    task: Annotated[list[str], typer.Option(help="Repeatable.")] = list(TASKS),  # noqa: B006
    episodes: Annotated[int, typer.Option(min=1, help="Of each task.")] = 300,
    horizon: Annotated[int, typer.Option(min=1, help="Actions recorded from each moment on.")] = 16,
    every: Annotated[int, typer.Option(min=1, help="Steps from one recorded moment to the next.")] = 2,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
    calibration: Annotated[
        Path | None, typer.Option(help=f"Another file, for {CALIBRATION} of the moments, to calibrate duq-compile on.")
    ] = None,
) -> None:
    """Record demonstrations of Meta-World's scripted expert, to train a policy on with train_metaworld.py.

    The expert is pushed off its way now and then, so that the policy learns how to get back to it.

    [bold]Examples[/bold]

      python examples/collect_metaworld.py demonstrations.npz

      python examples/collect_metaworld.py drawer.npz --task drawer-close --episodes 20 --calibration calibration.npz
    """
    check_output_file("OUT", out)
    if calibration is not None:
        check_output_file("--calibration", calibration)
    for name in task:
        if name not in PROMPTS:
            raise DuqError(f"--task {name}: unknown, one of {', '.join(PROMPTS)}")
    starts = list(product(task, range(FIRST_SEED, FIRST_SEED + episodes)))
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool, progress_bar() as progress:
        found = pool.map(partial(_demonstrate, horizon=horizon, every=every), starts, chunksize=5)
        parts = [part for part in progress.track(found, len(starts), description="Recording") if part is not None]
    demonstrations = Demonstrations.join(parts)
    save(out, demonstrations)
    if calibration is not None:
        save_observations(calibration, observations(demonstrations, CALIBRATION))
    Console(highlight=False).print(
        f"{out}: {len(demonstrations):,} moments of {len(parts)} episodes ({len(starts) - len(parts)} failed), "
        f"{out.stat().st_size / 1e6:.1f} MB",
        soft_wrap=True,
    )


def main() -> None:
    with one_line_errors():
        app()
