"""Which observations of a dataset to calibrate on: spread over its tasks, their episodes and the time within them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from duq.compiler.data.lerobot_dataset import Dataset


def spread(dataset: Dataset, count: int, seed: int = 0) -> list[int]:
    """Numbers of ``count`` different frames (fewer if the dataset has no more), ascending; equal for equal arguments.

    Every task gets an equal share, within a task every episode, and within an episode every stretch of its time; where
    shares do not come out even, or there are more tasks than frames to pick, the seed decides.
    """
    rng = np.random.default_rng(seed)
    picked: list[int] = []
    tasks = list(dataset.frames_by_task().values())
    for episodes, of_task in zip(tasks, shares([sum(map(len, episodes)) for episodes in tasks], count, rng), strict=True):
        for frames, of_episode in zip(episodes, shares([len(frames) for frames in episodes], of_task, rng), strict=True):
            picked += [int(frames[position]) for position in positions(len(frames), of_episode, rng)]
    return sorted(picked)


def shares(sizes: Sequence[int], count: int, rng: np.random.Generator) -> list[int]:
    """Divides ``count`` as evenly as ``sizes`` allow: no share is larger than its size, and the shares that are smaller
    than their size differ by at most one. Which of them get the odd ones is drawn."""
    given = [0] * len(sizes)
    order = rng.permutation(len(sizes)).tolist()
    while count and (open_ := [index for index in order if given[index] < sizes[index]]):
        each = max(1, count // len(open_))
        for index in open_[:count]:
            more = min(each, sizes[index] - given[index])
            given[index] += more
            count -= more
    return given


def positions(length: int, count: int, rng: np.random.Generator) -> list[int]:
    """One random position of each of ``count`` equal stretches of ``range(length)``; count <= length."""
    edges = [index * length // max(count, 1) for index in range(count + 1)]
    return [int(rng.integers(begin, end)) for begin, end in itertools.pairwise(edges)]


def evenly(length: int, count: int | None) -> list[int]:
    """Up to ``count`` positions of ``range(length)``, evenly spaced from the first to the last; None: all."""
    count = length if count is None else min(count, length)
    return np.linspace(0, length - 1, count).round().astype(int).tolist()
