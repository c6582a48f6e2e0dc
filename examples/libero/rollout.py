"""Episodes of a policy in LIBERO's scenes: simulators in processes of their own, one policy for all of them."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from duq.examples.libero.scene import CAMERAS, IMAGE_SIZE, Scene, held_scene
from duq.examples.libero.starts import INFERRING, STRESSING, Start
from duq.plugins.errors import DuqError

PUSH_AFTER, PUSH_BEFORE = 10, 40  # steps between which an object is pushed
WORTH_A_SCENE = 3  # episodes left to each process that has a task's scene: then another makes it, in seconds


@dataclass(frozen=True)
class Stress:
    """What makes an episode harder, equal for all policies.

    noise: of pixels, deviation in steps of 1/255. camera: how far the camera of the scene is moved, m, in a direction of the
    episode's own. push: speed that the object is given on the ground once, m/s, likewise.
    """

    noise: float = 0.0
    camera: float = 0.0
    push: float = 0.0

    def begin(self, scene: Scene, start: Start) -> tuple[np.random.Generator, int, np.ndarray]:
        """Moves the camera; returns the pixels' generator, and when and how the object is to be pushed."""
        random = start.generator(STRESSING)
        offset = random.standard_normal(3)
        if self.camera:
            scene.move_camera(self.camera * offset / np.linalg.norm(offset))
        step, angle = int(random.integers(PUSH_AFTER, PUSH_BEFORE)), random.uniform(0, 2 * np.pi)
        return random, step, self.push * np.array([np.cos(angle), np.sin(angle)])

    def disturbed(self, observation: dict, random: np.random.Generator) -> dict:
        if not self.noise:
            return observation
        changed = dict(observation)
        for key in CAMERAS:
            image = observation[key]
            added = self.noise * random.standard_normal(image.shape, np.float32)
            changed[key] = (image + added).round().clip(0, 255).astype(np.uint8)
        return changed


@dataclass(frozen=True)
class Conditions:
    """Of every episode. execute: actions of each chunk that are carried out. limit: steps after which it has failed.
    plain: pictures without antialiasing, shadows and reflections (`Scene`)."""

    suite: str
    execute: int
    limit: int
    image_size: int = IMAGE_SIZE
    plain: bool = True
    stress: Stress = Stress()


@dataclass
class Result:
    success: bool
    actions: np.ndarray  # float32 [T, 7], those carried out
    first: np.ndarray  # float32 [H, 7], the first chunk


Answer = Callable[[Sequence[Start], Sequence[int], Sequence[dict], np.ndarray], list[np.ndarray]]
# (episodes, steps so far, observations, noise [N, H, A]) -> a chunk of actions [H, 7] for each


class Episode:
    """One episode in a simulator: `observation` until `done`."""

    def __init__(self, scene: Scene, start: Start, conditions: Conditions):
        self._scene, self._conditions = scene, conditions
        scene.begin(start)
        self._pixels, self._push_at, self._velocity = conditions.stress.begin(scene, start)
        self.steps, self.success = 0, False

    @property
    def done(self) -> bool:
        return self.success or self.steps >= self._conditions.limit

    def observation(self) -> dict:
        return self._conditions.stress.disturbed(self._scene.observation(), self._pixels)

    def carry_out(self, actions: np.ndarray) -> int:
        """Up to `execute` actions, until the episode is done. How many these were."""
        before = self.steps
        for action in actions[: self._conditions.execute]:
            if self.done:
                break
            if self.steps == self._push_at and self._velocity.any():
                self._scene.push(self._scene.target, self._velocity)
            self.success = self._scene.step(action)
            self.steps += 1
        return self.steps - before


def simulate(connection: Connection, conditions: Conditions) -> None:
    """A worker: takes a Start or an array of actions, and answers with (observation or None if done, success, actions
    carried out); a string instead is what failed."""
    episode = None
    try:
        while (message := connection.recv()) is not None:
            carried_out = 0
            if isinstance(message, Start):
                arguments = conditions.suite, message.task, conditions.image_size, conditions.plain
                episode = Episode(held_scene(*arguments), message, conditions)
            else:
                assert episode is not None
                carried_out = episode.carry_out(message)
            connection.send((None if episode.done else episode.observation(), episode.success, carried_out))
    except DuqError as error:
        connection.send(str(error))
    except (EOFError, KeyboardInterrupt):
        pass
    except Exception:
        connection.send(traceback.format_exc())


@dataclass
class _Running:
    start: Start
    noise: np.random.Generator
    chunks: list[np.ndarray]
    executed: list[np.ndarray]

    @property
    def steps(self) -> int:
        return sum(map(len, self.executed))


class Simulators:
    """So many processes, each with one scene at a time. `run` yields results as episodes end."""

    def __init__(self, jobs: int, conditions: Conditions, worker: Callable[[Connection, Conditions], Any] = simulate):
        context = get_context("spawn")
        self._connections: list[Connection] = []
        self._processes = []
        for _ in range(jobs):
            ours, theirs = context.Pipe()
            process = context.Process(target=worker, args=(theirs, conditions), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
        self._tasks: dict[Connection, int] = {}  # of the scene that a process holds

    def __enter__(self) -> Simulators:
        return self

    def __exit__(self, *_: object) -> None:
        for connection, process in zip(self._connections, self._processes, strict=True):
            if process.is_alive():
                try:
                    connection.send(None)
                    process.join(10)
                except OSError:
                    pass
            if process.is_alive():
                process.terminate()
            connection.close()

    def run(self, starts: Sequence[Start], answer: Answer, noise_shape: tuple[int, int]) -> Iterator[tuple[Start, Result]]:
        """All episodes. Whatever simulators wait for actions at one time are answered together."""
        waiting, running = list(starts), dict[Connection, _Running]()
        for connection in self._connections:
            self._next(connection, waiting, running)
        while running:
            asked = []
            ready: list[Any] = wait(list(running))
            for connection in ready:
                observation, success, count = self._receive(connection)
                episode = running[connection]
                if count:
                    episode.executed.append(episode.chunks[-1][:count])
                if observation is not None:
                    asked.append((connection, observation))
                    continue
                del running[connection]
                self._next(connection, waiting, running)
                yield episode.start, Result(success, np.concatenate(episode.executed), episode.chunks[0])
            if asked:
                episodes = [running[connection] for connection, _ in asked]
                noise = np.stack([each.noise.standard_normal(noise_shape, np.float32) for each in episodes])
                starts_, steps = [each.start for each in episodes], [each.steps for each in episodes]
                found = answer(starts_, steps, [observation for _, observation in asked], noise)
                for (connection, _), episode, chunk in zip(asked, episodes, found, strict=True):
                    episode.chunks.append(chunk)
                    connection.send(chunk)

    def _next(self, connection: Connection, waiting: list[Start], running: dict[Connection, _Running]) -> None:
        """Starts another episode: of the task whose scene the process has, or of one that is worth making the scene."""
        held = Counter(self._tasks.values())
        left = Counter(start.task for start in waiting)
        task = self._tasks.get(connection)
        if task not in left:
            task = max(left, key=lambda each: left[each] / (held[each] or 0.5 / WORTH_A_SCENE), default=None)
            if task is None or (running and held[task] and left[task] < WORTH_A_SCENE * held[task]):
                return
        start = waiting.pop(next(i for i, start in enumerate(waiting) if start.task == task))
        self._tasks[connection] = start.task
        running[connection] = _Running(start, start.generator(INFERRING), [], [])
        connection.send(start)

    def _receive(self, connection: Connection) -> tuple[dict | None, bool, int]:
        try:
            message = connection.recv()
        except EOFError as error:
            raise DuqError("a simulator's process died, perhaps for want of memory: give fewer --jobs") from error
        if isinstance(message, str):
            raise DuqError(f"a simulator failed: {message}")
        return message
