"""Records a scripted expert in LIBERO-Object: `python examples/libero/collect.py --help`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # the checkout
    from duq.commands import command

    command("collect.py", "duq.examples.libero.collect:main", "libero")()

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from duq.examples.libero import demonstrations
from duq.examples.libero.demonstrations import Demonstration
from duq.examples.libero.expert import Expert
from duq.examples.libero.journal import Journal
from duq.examples.libero.scene import ACTION_DIM, Scene, held_scene, tasks
from duq.examples.libero.starts import DRIFTING, PLACES, PUSHING, TRAINING_SEED, Start
from duq.plugins.errors import DuqError
from duq.runtime.cli_errors import check_output_directory, one_line_errors

SUITE = "libero_object"  # the expert's
LIMIT = 220  # steps of an episode
DRIFT, PUSH, NOISE = (
    0.7,
    0.5,
    0.05,
)  # standard deviations of what is added to actions: before the episode, now and then, always
TURN = 0.3  # of that, for rotations
GIVE_UP = 3  # times the demonstrations asked for: so many starts are tried

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


def pushes(random: np.random.Generator, steps: int) -> np.ndarray:
    """What pushes the arm off its way, to be added to the actions, float [steps, 7]: short pushes with long pauses.

    The pauses are there to be learned from: whole chunks of how the expert gets back.
    """
    added, step = np.zeros((steps, ACTION_DIM)), int(random.integers(5, 30))
    while step < steps:
        end = step + int(random.integers(2, 6))
        added[step:end] = direction(random, PUSH)
        step = end + int(random.integers(20, 45))
    return added


def direction(random: np.random.Generator, strength: float) -> np.ndarray:
    """Something to add to an action [7]; never the gripper, whose opening would drop the object."""
    return random.normal(0.0, strength, ACTION_DIM) * (1, 1, 1, TURN, TURN, TURN, 0)


def demonstrate(
    scene: Scene, start: Start, expert: Callable[[Scene], Expert] = Expert, strength: float = 1.0
) -> Demonstration | None:
    """An episode of the expert. None if it does not succeed.

    strength: of all that disturbs it; with 0 the recorded actions are what was carried out.
    """
    scene.begin(start)
    drifting = start.generator(DRIFTING)
    drift = np.append(strength * direction(drifting, DRIFT)[:6], -1)
    for _ in range(int(drifting.integers(0, 12)) if strength else 0):
        scene.step(drift)
    random = start.generator(PUSHING)
    pushed = strength * pushes(random, LIMIT)
    states, actions, driver = [], [], expert(scene)
    for step in range(LIMIT):
        states.append(scene.sim_state())
        actions.append(driver.action())
        noise = strength * direction(random, NOISE)
        if scene.step(actions[-1] + pushed[step] + noise):
            count = len(actions)
            return Demonstration(np.array(states), np.array(actions, np.float32), np.asarray(pushed[:count].any(axis=1)))
    return None


def _record(block: list[tuple[int, int]], out: Path, places: str, strength: float) -> list[tuple[int, int, int | None]]:
    """In a worker: writes demonstrations, and says which, and how long each was."""
    done: list[tuple[int, int, int | None]] = []
    for task, seed in block:
        found = demonstrate(held_scene(SUITE, task, None), Start(task, seed, places), strength=strength)
        if found is not None:
            demonstrations.save(demonstrations.path_of(out, task, seed), found)
        done.append((task, seed, None if found is None else len(found.actions)))
    return done


def missing(tried: dict[tuple[int, int], int | None], chosen: list[int], episodes: int) -> list[tuple[int, int]]:
    """The starts to try next: of each task as many, further on, as it still has too few successes.

    So the demonstrations are those of a task's first starts that succeed, however often the run was stopped.
    """
    jobs = []
    for task in chosen:
        seeds = {seed: steps for (of, seed), steps in tried.items() if of == task}
        wanted, seed = episodes - sum(steps is not None for steps in seeds.values()), TRAINING_SEED
        while wanted > 0 and seed < TRAINING_SEED + GIVE_UP * episodes:
            if seed not in seeds:
                jobs.append((task, seed))
                wanted -= 1
            seed += 1
    return jobs


@app.command()
def _collect(
    out: Annotated[Path, typer.Argument(help="Directory for the demonstrations; what is there already is kept.")],
    task: Annotated[list[int] | None, typer.Option(help="Number, repeatable; by default all.")] = None,
    episodes: Annotated[int, typer.Option(min=1, help="Of each task.")] = 50,
    places: Annotated[str, typer.Option(help=f"Of the objects: {' or '.join(PLACES)}.")] = "permuted",
    strength: Annotated[
        float, typer.Option(min=0.0, help="Of pushes, drift and noise; 0 for demonstrations to replay.")
    ] = 1.0,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, of 1.1 GB each.")] = 2,
) -> None:
    """Record demonstrations of a scripted expert in LIBERO-Object, to train a policy on with train.py.

    Objects stand in each other's places, some centimeters off, and the arm is pushed now and then. What is written are
    states of the simulator and actions; render.py makes the pictures. A run that was stopped goes on where it was.

    [bold]Examples[/bold]

      python examples/libero/collect.py demonstrations

      python examples/libero/collect.py demonstrations --task 0 --episodes 5
    """
    check_output_directory("OUT", out)
    if places not in PLACES:
        raise DuqError(f"--places {places}: unknown, one of {', '.join(PLACES)}")
    known = tasks(SUITE)
    chosen = sorted(set(range(len(known)) if task is None else task))
    for number in chosen:
        if not 0 <= number < len(known):
            raise DuqError(f"--task {number}: {SUITE} has tasks 0 to {len(known) - 1}")
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out / demonstrations.JOURNAL)
    lines = journal.read()
    others = {line.get("places") for line in lines} - {places}
    if others:
        raise DuqError(f"{journal.file}: records --places {others.pop()}, not {places}; name another directory")
    if any(line.get("strength") != strength for line in lines):
        raise DuqError(f"{journal.file}: records an expert disturbed otherwise; name another directory")
    tried = {(line["task"], line["seed"]): line["steps"] for line in lines}
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool, Progress(console=Console(stderr=True)) as progress:
        while todo := missing(tried, chosen, episodes):
            bar = progress.add_task("Recording", total=len(todo))
            submitted = [pool.submit(_record, block, out, places, strength) for block in demonstrations.blocks(todo, jobs)]
            for found in as_completed(submitted):
                for number, seed, steps in found.result():
                    tried[number, seed] = steps
                    journal.add({"task": number, "seed": seed, "steps": steps, "places": places, "strength": strength})
                    progress.advance(bar)
    Console(highlight=False).print(summary(tried, {number: known[number].prompt for number in chosen}))
    short = [number for number in chosen if _successes(tried)[number] < episodes]
    if short:
        raise DuqError(f"task {short[0]}: fewer than {episodes} of {GIVE_UP * episodes} starts succeeded")


def _successes(tried: dict[tuple[int, int], int | None]) -> Counter[int]:
    return Counter(task for (task, _), steps in tried.items() if steps is not None)


def summary(tried: dict[tuple[int, int], int | None], prompts: dict[int, str]) -> Table:
    """How often the expert succeeded at each task, and how fast."""
    table = Table("task", "", "succeeded", "steps")
    for task, prompt in prompts.items():
        steps = [steps for (of, _), steps in tried.items() if of == task]
        done = [each for each in steps if each is not None]
        table.add_row(str(task), prompt, f"{len(done)} of {len(steps)}", f"{min(done)} to {max(done)}" if done else "")
    return table


def main() -> None:
    with one_line_errors():
        app()
