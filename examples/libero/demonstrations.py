"""Demonstrations on disk: a folder for each task, a file for each episode, with simulator states and actions only.

DIR/task_3/seed_1000012.npz     states float64 [T, numbers], actions float32 [T, 7], pushed bool [T]
DIR/task_3/seed_1000012.140.npz what a policy sees in these states, at 140 pixels, where render.py made it
DIR/episodes.jsonl              task, seed and steps (null: failed, and thrown away) of everything tried
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from duq.plugins.errors import DuqError
from duq.runtime.files import replacing

JOURNAL = "episodes.jsonl"


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

    pictures: uint8 [T, cameras, S, S, 3]. robot: its state, float32 [T, 8]. targets: where the object is that the expert is
    after, m, float32 [T, 3], which a policy may learn to see.
    """

    pictures: np.ndarray
    robot: np.ndarray
    targets: np.ndarray
    prompt: str


def path_of(directory: Path, task: int, seed: int) -> Path:
    return directory / f"task_{task}" / f"seed_{seed}.npz"


def seen_path(file: Path, size: int) -> Path:
    """Where the pictures of the demonstration in `file` are."""
    return file.with_suffix(f".{size}.npz")


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


def save_seen(file: Path, seen: Seen) -> None:
    """Beside the demonstration in `file`; not compressed, as pictures hardly get smaller."""
    write_whole(seen_path(file, seen.pictures.shape[2]), lambda stream: np.savez(stream, **vars(seen)))


def load_seen(file: Path, size: int) -> Seen:
    """Raises DuqError unless `save_seen` wrote what is beside `file`."""
    beside = seen_path(file, size)
    try:
        with np.load(beside) as found:
            return Seen(found["pictures"], found["robot"], found["targets"], str(found["prompt"]))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DuqError(f"{beside}: holds no pictures ({error}); remove it and render again") from error


def write_whole(file: Path, write: Callable[[Any], None]) -> None:
    """The file, and the folder around it, appear when `write(stream)` has written everything."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as stream:
        write(stream)
