"""Makes the pictures of demonstrations, where they are used: `python examples/libero/render.py --help`."""

from __future__ import annotations

import math
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # the checkout
    from duq.commands import command

    command("render.py", "duq.examples.libero.render:main", "libero")()

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress

from duq.examples.libero import demonstrations
from duq.examples.libero.collect import SUITE
from duq.examples.libero.demonstrations import Seen
from duq.examples.libero.scene import CAMERAS, IMAGE_SIZE, Scene, held_scene, tasks
from duq.runtime.cli_errors import check_output_directory, one_line_errors
from duq.runtime.images import resize_with_pad

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


def look(scene: Scene, states: np.ndarray, steps: np.ndarray, size: int) -> Seen:
    """What a policy sees at these steps [N] of the simulator's states [T, numbers]; pictures reduced to `size` as the
    runtime reduces them."""
    pictures = np.empty((len(steps), len(CAMERAS), size, size, 3), np.uint8)
    names = list(scene.bodies)
    robot, targets, objects = [], [], []
    for index, step in enumerate(steps):
        scene.show(states[step])
        observation = scene.observation()
        for camera, key in enumerate(CAMERAS):
            pictures[index, camera] = resize_with_pad(observation[key], size, size)
        robot.append(observation["observation/state"])
        targets.append(scene.position(scene.target))
        objects.append([scene.position(name) for name in names])
    shown = np.reshape(np.array(robot, np.float32), (-1, 8)), np.reshape(np.array(targets, np.float32), (-1, 3))
    places = np.reshape(np.array(objects, np.float32), (-1, len(names), 3))
    return Seen(np.asarray(steps), pictures, *shown, places, np.array(names), scene.task.prompt)


def _render(block: list[tuple[int, int]], directory: Path, size: int, every: int, until: float) -> int:
    """In a worker: how many of the block were done by the time `until`."""
    for count, (task, seed) in enumerate(block):
        if time.time() > until:
            return count
        file = demonstrations.path_of(directory, task, seed)
        found = demonstrations.load(file)
        steps = demonstrations.learned_from(found.pushed, seed, every)
        seen = look(held_scene(SUITE, task, IMAGE_SIZE), found.states, steps, size)
        demonstrations.save_seen(file, seen, every)
    return len(block)


def rendered(directory: Path, size: int, every: int) -> list[tuple[int, int]]:
    """(task, seed) of the demonstrations that have pictures."""
    listed = demonstrations.listed(directory)
    return [
        job for job in listed if demonstrations.seen_path(demonstrations.path_of(directory, *job), size, every).exists()
    ]


def render(directory: Path, size: int, jobs: int, every: int = 1, minutes: float = math.inf) -> int:
    """Renders what is not rendered yet, at `size` pixels and one of `every` moments, in so many processes, until the time
    is over. How many demonstrations these were."""
    there = set(rendered(directory, size, every))
    todo = [job for job in demonstrations.listed(directory) if job not in there]
    until, count = time.time() + 60 * minutes, 0
    if not todo:
        return 0
    tasks(SUITE)  # says in one line if LIBERO is missing
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool, Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("Rendering", total=len(todo))
        parts = demonstrations.blocks(todo, jobs)
        for done in as_completed([pool.submit(_render, block, directory, size, every, until) for block in parts]):
            count += done.result()
            progress.update(bar, completed=count)
    return count


@app.command()
def _command(
    directory: Annotated[Path, typer.Argument(help="What collect.py recorded; the pictures go beside it.")],
    size: Annotated[int, typer.Option(min=14, help="Of the pictures, in pixels: the policy's.")] = 168,
    every: Annotated[int, typer.Option(min=1, help="Render one of so many moments that are learned from.")] = 1,
    minutes: Annotated[float, typer.Option(min=0.01, help="The most it may take; tasks take turns.")] = math.inf,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, of 1.8 GB each.")] = os.cpu_count() or 1,
) -> None:
    """Render both cameras in the states of demonstrations that are learned from, in all processes at once.

    train.py calls this itself. A run that was stopped goes on where it was. On a GPU, MuJoCo renders through EGL.

    [bold]Example[/bold]

      python examples/libero/render.py demonstrations --jobs 16
    """
    demonstrations.listed(directory)
    check_output_directory("DIRECTORY", directory)
    count = render(directory, size, jobs, every, minutes)
    Console(highlight=False).print(f"{directory}: {count} demonstrations rendered at {size} pixels", soft_wrap=True)


def main() -> None:
    with one_line_errors():
        app()
