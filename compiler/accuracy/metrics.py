"""What is measured between two arrays that should be equal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass
class Difference:
    """The difference of an engine's values from the reference's, summed up over any number of arrays, in float64."""

    signal: float = 0.0  # sum of reference^2
    engine: float = 0.0  # sum of engine^2
    product: float = 0.0  # sum of reference * engine
    noise: float = 0.0  # sum of (reference - engine)^2
    count: int = 0  # of values
    max_error: float = 0.0

    def add(self, reference: np.ndarray, engine: np.ndarray) -> None:
        """Takes in two arrays of one shape. A value that is not finite makes every measure NaN."""
        if reference.shape != engine.shape:
            raise ValueError(f"cannot compare {reference.shape} with {engine.shape}")
        reference, engine = (array.astype(np.float64).ravel() for array in (reference, engine))
        error = reference - engine
        self.signal += float(reference @ reference)
        self.engine += float(engine @ engine)
        self.product += float(reference @ engine)
        self.noise += float(error @ error)
        self.count += error.size
        self.max_error = float(np.maximum(self.max_error, np.abs(error).max(initial=0.0)))  # NaN stays NaN

    @classmethod
    def sum(cls, parts: Iterable[Difference]) -> Difference:
        """The difference over everything that the parts have seen."""
        total = cls()
        for part in parts:
            total.signal, total.engine = total.signal + part.signal, total.engine + part.engine
            total.product, total.noise = total.product + part.product, total.noise + part.noise
            total.max_error = float(np.maximum(total.max_error, part.max_error))
            total.count += part.count
        return total

    @property
    def cosine(self) -> float:
        """Of the angle between the two; 1 where both are zero."""
        norms = np.sqrt(self.signal * self.engine)
        return float(self.product / norms) if norms != 0 else float(self.noise == 0)

    @property
    def rms_error(self) -> float:
        """Root of the mean squared error; 0 where there is nothing to compare."""
        return float(np.sqrt(self.noise / max(1, self.count)))

    @property
    def sqnr_db(self) -> float:
        """10 log10(|reference|^2 / |reference - engine|^2); infinite where they are equal."""
        if self.noise == 0:
            return float("inf")
        return float(10 * np.log10(self.signal / self.noise)) if self.signal != 0 else float("-inf")

    def to_json(self) -> dict:
        return {"cosine": self.cosine, "max_error": self.max_error, "sqnr_db": self.sqnr_db}


def difference(reference: np.ndarray, engine: np.ndarray) -> Difference:
    found = Difference()
    found.add(reference, engine)
    return found


def by_dimension(reference: np.ndarray, engine: np.ndarray) -> list[Difference]:
    """The difference of each of the D dimensions of two arrays [..., D]."""
    return [difference(reference[..., index], engine[..., index]) for index in range(reference.shape[-1])]


def jerk(actions: np.ndarray) -> float | None:
    """Mean squared third difference along the H actions of chunks [..., H, D], per action period cubed.

    None where a chunk is shorter than four actions.
    """
    third = np.diff(actions.astype(np.float64), n=3, axis=-2)
    return float(np.square(third).mean()) if third.size else None
