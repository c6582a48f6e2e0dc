"""Demonstrations on disk: a folder for each task, a file for each episode, with simulator states and actions only.

DIR/task_3/seed_1000012.npz     states float64 [T, numbers], actions float32 [T, 7], pushed bool [T]
DIR/task_3/seed_1000012.168.npz what a policy sees in these states, at 168 pixels, where render.py made it
                                (.168x3.npz: in one of three)
DIR/episodes.jsonl              task, seed and steps (null: failed, and thrown away) of everything tried
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from duq.plugins.errors import DuqError
from duq.runtime.files import replacing

JOURNAL = "episodes.jsonl"
LEAST = 5  # undisturbed actions that a moment must be followed by to be learned from
BLOCK = 25  # jobs of one task that a process does in a row, at most: a scene takes seconds to make


@dataclass(frozen=True)
class Demonstration:
    """An episode that succeeded, T steps.

    actions: what the expert wanted to do in each state, without the pushes. pushed: whether something else was added to it.
    """

    states: np.ndarray
    actions: np.ndarray
    pushed: np.ndarray


@dataclass(frozen=True)
class Seen:
    """The same episode as a policy sees it.

    steps: which of its moments, int [N]. pictures: uint8 [N, cameras, S, S, 3]. robot: its state, float32 [N, 8].
    targets: where the object is that the expert is after, m, float32 [N, 3]; objects: and everything that can be moved,
    float32 [N, K, 3], called names [K]. A policy may learn to see them.
    """

    steps: np.ndarray
    pictures: np.ndarray
    robot: np.ndarray
    targets: np.ndarray
    objects: np.ndarray
    names: np.ndarray
    prompt: str


def path_of(directory: Path, task: int, seed: int) -> Path:
    return directory / f"task_{task}" / f"seed_{seed}.npz"


def seen_path(file: Path, size: int, every: int = 1) -> Path:
    """Where the pictures of the demonstration in `file` are, of one of `every` moments."""
    return file.with_suffix(f".{size}.npz" if every == 1 else f".{size}x{every}.npz")


def learned_from(pushed: np.ndarray, offset: int, every: int) -> np.ndarray:
    """The steps of an episode, pushed bool [T], that LEAST undisturbed actions follow: one of `every`, from `offset` on."""
    after = np.concatenate((np.cumsum(np.append(0, pushed)), [np.inf]))  # pushes before each step
    begin = np.arange(len(pushed))
    end = np.minimum(begin + LEAST, len(pushed) + 1)
    return begin[after[end] == after[begin]][offset % every :: every]


def blocks(jobs: Sequence[tuple[int, int]], processes: int) -> list[list[tuple[int, int]]]:
    """Jobs (task, seed) in blocks of one task each, for so many processes; the tasks take turns."""
    size = min(BLOCK, -(-len(jobs) // (2 * processes)))
    by_task: dict[int, list[tuple[int, int]]] = {}
    for job in jobs:
        by_task.setdefault(job[0], []).append(job)
    cut = [(begin, of[begin : begin + size]) for of in by_task.values() for begin in range(0, len(of), size)]
    return [block for _, block in sorted(cut, key=lambda each: each[0])]


def listed(directory: Path) -> list[tuple[int, int]]:
    """(task, seed) of every demonstration in `directory`, in order. DuqError if there is none."""
    found = []
    for file in directory.glob("task_*/seed_*.npz"):
        if match := re.fullmatch(r"task_(\d+)/seed_(\d+)\.npz", f"{file.parent.name}/{file.name}"):
            found.append((int(match[1]), int(match[2])))
    if not found:
        raise DuqError(f"{directory}: holds no demonstrations; examples/libero/collect.py records them")
    return sorted(found)


def load(file: Path) -> Demonstration:
    """Raises DuqError unless `save` wrote the file."""
    try:
        with np.load(file) as found:
            return Demonstration(found["states"], found["actions"], found["pushed"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DuqError(f"{file}: is no demonstration ({error}); remove it and collect again") from error


def save(file: Path, demonstration: Demonstration) -> None:
    write_whole(file, lambda stream: np.savez_compressed(stream, **vars(demonstration)))


def save_seen(file: Path, seen: Seen, every: int = 1) -> None:
    """Beside the demonstration in `file`; not compressed, as pictures hardly get smaller."""
    write_whole(seen_path(file, seen.pictures.shape[2], every), lambda stream: np.savez(stream, **vars(seen)))


def load_seen(file: Path, size: int, every: int = 1) -> Seen:
    """Raises DuqError unless `save_seen` wrote what is beside `file`."""
    beside = seen_path(file, size, every)
    try:
        with np.load(beside) as found:
            arrays = {name: found[name] for name in Seen.__dataclass_fields__ if name != "prompt"}
            return Seen(**arrays, prompt=str(found["prompt"]))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DuqError(f"{beside}: holds no pictures ({error}); remove it and render again") from error


def write_whole(file: Path, write: Callable[[Any], None]) -> None:
    """The file, and the folder around it, appear when `write(stream)` has written everything."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as stream:
        write(stream)
