"""Makes the pictures of demonstrations, where they are used: `python examples/libero/render.py --help`."""

from __future__ import annotations

import os
import sys
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


def look(scene: Scene, states: np.ndarray, size: int) -> Seen:
    """What a policy sees in each simulator state [T, numbers]; pictures reduced to `size` as the runtime reduces them."""
    pictures = np.empty((len(states), len(CAMERAS), size, size, 3), np.uint8)
    robot, targets = [], []
    for index, state in enumerate(states):
        scene.show(state)
        observation = scene.observation()
        for camera, key in enumerate(CAMERAS):
            pictures[index, camera] = resize_with_pad(observation[key], size, size)
        robot.append(observation["observation/state"])
        targets.append(scene.position(scene.target))
    return Seen(pictures, np.array(robot), np.array(targets, np.float32), scene.task.prompt)


def _render(job: tuple[int, int], directory: Path, size: int) -> None:
    file = demonstrations.path_of(directory, *job)
    states = demonstrations.load(file).states
    demonstrations.save_seen(file, look(held_scene(SUITE, job[0], IMAGE_SIZE), states, size))


def render(directory: Path, size: int, jobs: int) -> int:
    """Renders what is not rendered yet, at `size` pixels, in so many processes. How many demonstrations these were."""
    todo = [
        job
        for job in demonstrations.listed(directory)
        if not demonstrations.seen_path(demonstrations.path_of(directory, *job), size).exists()
    ]
    if not todo:
        return 0
    tasks(SUITE)  # says in one line if LIBERO is missing
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool, Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("Rendering", total=len(todo))
        for done in as_completed([pool.submit(_render, job, directory, size) for job in todo]):
            done.result()
            progress.advance(bar)
    return len(todo)


@app.command()
def _command(
    directory: Annotated[Path, typer.Argument(help="What collect.py recorded; the pictures go beside it.")],
    size: Annotated[int, typer.Option(min=14, help="Of the pictures, in pixels: the policy's.")] = 140,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, of 1.8 GB each.")] = os.cpu_count() or 1,
) -> None:
    """Render both cameras in every state of demonstrations, in all processes at once.

    train.py calls this itself. A run that was stopped goes on where it was. On a GPU, MuJoCo renders through EGL.

    [bold]Example[/bold]

      python examples/libero/render.py demonstrations --jobs 16
    """
    demonstrations.listed(directory)
    check_output_directory("DIRECTORY", directory)
    count = render(directory, size, jobs)
    Console(highlight=False).print(f"{directory}: {count} demonstrations rendered at {size} pixels", soft_wrap=True)


def main() -> None:
    with one_line_errors():
        app()
