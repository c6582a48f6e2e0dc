"""Where episodes begin: a seed alone decides, and every policy gets the same. Needs no simulator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PLACES = ("official", "permuted")
JITTER = 0.03  # m, of permuted objects, along x and y
APART = 0.09  # m: permuted objects' centers are at least so far from each other
TRAINING_SEED = 1_000_000  # the first of the starts to learn from: evaluation counts from 0
BASE, REACH = np.array([-0.6, 0.0]), 0.755  # m: where the arm stands, and how far from there objects may be
_TRIES = 1000


@dataclass(frozen=True)
class Start:
    """An episode's beginning.

    places: "official", one of LIBERO's recorded states as it is; or "permuted", with its objects in each other's places and
    up to 3 cm beside them.
    """

    task: int
    seed: int
    places: str = "permuted"

    def generator(self, purpose: int) -> np.random.Generator:
        """Random numbers of this start; `purpose` keeps those for places, pushes and noise independent."""
        return np.random.default_rng((self.seed, self.task, purpose))

    def recorded(self, count: int) -> int:
        """Which of LIBERO's `count` recorded states it begins with."""
        return self.seed % count


PLACING, DRIFTING, PUSHING, INFERRING, STRESSING = range(5)  # purposes of random numbers


def permute(places: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Places [N, 2] in another order, each moved by up to JITTER along x and y; all are APART and within REACH."""
    for _ in range(_TRIES):
        found = places[random.permutation(len(places))] + random.uniform(-JITTER, JITTER, places.shape)
        apart = np.linalg.norm(found[:, None] - found, axis=-1)[np.triu_indices(len(found), 1)]
        if apart.min(initial=np.inf) >= APART and np.linalg.norm(found - BASE, axis=1).max() <= REACH:
            return found
    raise ValueError(f"no places within {JITTER} m of these {len(places)} are {APART} m apart and within {REACH} m")
