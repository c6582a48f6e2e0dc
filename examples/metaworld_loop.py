"""A policy, or the scripted expert, drives a simulated arm: `python examples/metaworld_loop.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing, suppress
from enum import Enum
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout
    from duq.commands import command

    command("metaworld_loop.py", "duq.examples.metaworld_loop:main", "examples")()

import numpy as np
import typer

from duq.examples.contact_sheet import contact_sheet
from duq.examples.metaworld_env import ACTION_DIM, PROMPTS, MetaworldEnv
from duq.plugins.errors import DuqError
from duq.runtime import Policy
from duq.runtime.cli_errors import check_output_file, one_line_errors
from duq.runtime.files import replacing
from duq.runtime.realtime import ChunkStream, Report, control_loop

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
Task = Enum("Task", {name: name for name in PROMPTS}, type=str)  # type: ignore[misc]


class EpisodeOver(Exception):
    """The task is done, or the steps are used up."""


class Episode:
    """A robot's two sides, observe and act, on a simulated start; it remembers what the cameras saw."""

    def __init__(self, env: MetaworldEnv, seed: int, limit: int):
        env.reset(seed)
        self.steps, self.success = 0, False
        self.seen: list[tuple[int, list[np.ndarray]]] = []  # (step, images)
        self._env, self._limit = env, limit

    def observe(self) -> dict:
        observation = self._env.observation()
        self.seen.append((self.steps, list(observation["image"].values())))
        return observation

    def act(self, action: np.ndarray) -> None:
        """Carries out an action [>= 4]; raises EpisodeOver after the last."""
        self.success = self._env.step(action[:ACTION_DIM])
        self.steps += 1
        if self.success or self.steps == self._limit:
            raise EpisodeOver


def run_synchronously(infer: Callable, episode: Episode, execute: int) -> None:
    """Stands still while the policy infers, then executes the first `execute` actions of its chunk."""
    with suppress(EpisodeOver):
        while True:
            for action in infer(episode.observe())["actions"][:execute]:
                episode.act(action)


def run_asynchronously(infer: Callable, episode: Episode, engine: Executor, rate: float, freeze: int, blend: int) -> Report:
    """Never stands still: see runtime/realtime.py. `engine` has one thread, for a client takes one call at a time."""
    stream = ChunkStream(infer, freeze=freeze, blend=blend, submit=engine.submit)
    with suppress(EpisodeOver):
        control_loop(stream, episode.observe, episode.act, rate=rate)
    return stream.report


@app.command()
def _run(
    task: Annotated[Task, typer.Option(help="What the arm is told to do.")] = Task["button-press-topdown"],
    plan: Annotated[Path | None, typer.Option(help="An engine.plan, run in this process.")] = None,
    server: Annotated[str | None, typer.Option(help="A policy server, ws://HOST:PORT.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="DUQ_API_KEY", help="What --server asks for, if it does.")] = None,
    scripted: Annotated[bool, typer.Option("--scripted", help="No policy but Meta-World's scripted expert.")] = False,
    episodes: Annotated[int, typer.Option(min=1)] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of the first start, the next count up, and of --plan's noise.")] = 0,
    steps: Annotated[int, typer.Option(min=1, max=500, help="After which an episode has failed.")] = 200,
    execute: Annotated[int, typer.Option(min=1, help="Actions of a chunk to execute before asking again.")] = 10,
    asynchronous: Annotated[
        bool, typer.Option("--asynchronous", help="Infer the next chunk while the current one is executed, in real time.")
    ] = False,
    rate: Annotated[float, typer.Option(min=1, help="Actions a second. This and the next two: --asynchronous.")] = 20,
    freeze: Annotated[int, typer.Option(min=1, help="Periods until a new chunk takes over; see docs/serving.md.")] = 4,
    blend: Annotated[int, typer.Option(min=0, help="Periods in which old and new actions are mixed.")] = 0,
    sheet: Annotated[Path | None, typer.Option(help="A PNG to write: what the cameras saw.")] = None,
) -> None:
    """Close the loop between a policy and a simulated robot, and count the episodes that succeed.

    For a policy that solves tasks, compile examples/metaworld_policy (docs/examples.md). A checkpoint of
    tools/make_checkpoint.py has random weights: its policy moves the arm, and solves nothing.

    [bold]Examples[/bold]

      python examples/metaworld_loop.py --scripted --task drawer-open --sheet drawer.png

      python examples/metaworld_loop.py --plan engine.plan

      duq-serve engine.plan & python examples/metaworld_loop.py --server ws://127.0.0.1:8000 --asynchronous
    """
    if (plan is not None) + (server is not None) + scripted != 1:
        raise DuqError("who drives? give one of --plan, --server and --scripted")
    if scripted and asynchronous:
        raise DuqError("--asynchronous: the scripted expert decides step by step, it has no chunks; leave it out")
    if sheet is not None:
        check_output_file("--sheet", sheet)
    done: list[Episode] = []
    with closing(MetaworldEnv(task.value)) as env, ThreadPoolExecutor(1) as engine:
        infer = _infer(env, plan, server, api_key, seed)
        for start in range(seed, seed + episodes):
            episode = Episode(env, start, steps)
            report = None
            if asynchronous:
                report = run_asynchronously(infer, episode, engine, rate, freeze, blend)
            else:
                run_synchronously(infer, episode, execute)
            episode.observe()
            done.append(episode)
            _print(task.value, start, episode, report)
    print(f"{sum(episode.success for episode in done)} of {episodes} episodes succeeded")
    if sheet is not None:
        with replacing(sheet) as file:
            contact_sheet(done).save(file, "PNG")


def _infer(
    env: MetaworldEnv, plan: Path | None, server: str | None, api_key: str | None, seed: int
) -> Callable[[dict], dict]:
    """Who drives: an observation to {"actions": [H, >= 4]}."""
    if plan is not None:
        policy = Policy(plan, seed=seed)
        policy.warmup()
        return policy.infer
    if server is not None:
        try:
            from openpi_client.websocket_client_policy import WebsocketClientPolicy
            from websockets.exceptions import InvalidStatus
        except ModuleNotFoundError as error:
            raise DuqError(f"--server needs {error.name}: pip install --no-deps openpi-client") from error
        try:
            return WebsocketClientPolicy(server, api_key=api_key).infer
        except InvalidStatus as error:
            raise DuqError(f"--server {server}: {error}; does it ask for another --api-key?") from error
    return lambda observation: {"actions": env.expert_action()[None]}


def _print(task: str, start: int, episode: Episode, report: Report | None) -> None:
    line = f"{task}, start {start}: {'success after' if episode.success else 'no success in'} {episode.steps} steps"
    if report is not None:
        line += f"; periods missed {report.missed}, starved {report.starved}; late inferences {report.late}"
    print(line)


def main() -> None:
    with one_line_errors():
        app()
