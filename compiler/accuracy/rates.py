"""Rates of success, and how sure one can be of them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

Interval = tuple[float, float]


def wilson(successes: int, episodes: int, confidence: float = 0.95) -> Interval:
    """Wilson's interval for a rate; unlike rate +- z sigma it holds near 0 and 1 too."""
    z = _quantile(confidence)
    rate, shrink = successes / episodes, 1 + z * z / episodes
    middle = (rate + z * z / (2 * episodes)) / shrink
    half = z * (rate * (1 - rate) / episodes + (z / (2 * episodes)) ** 2) ** 0.5 / shrink
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_difference(reference: Sequence[bool], found: Sequence[bool], confidence: float = 0.95) -> tuple[float, Interval]:
    """How much higher the rate of `found` is than that of `reference` over the same episodes, and the interval.

    Only episodes that turn out differently count. The interval is Agresti and Min's (Statistics in Medicine, 2005): that of
    Wald after adding half an episode to each of the four outcomes of a pair.
    """
    if len(reference) != len(found):
        raise ValueError(f"{len(reference)} and {len(found)} episodes are no pairs")
    gained = sum(f and not r for r, f in zip(reference, found, strict=True))
    lost = sum(r and not f for r, f in zip(reference, found, strict=True))
    padded = len(found) + 2
    middle = (gained - lost) / padded
    half = _quantile(confidence) * ((gained + lost + 1) / padded - middle**2) ** 0.5 / padded**0.5
    return (gained - lost) / len(found), (max(-1.0, middle - half), min(1.0, middle + half))


def _quantile(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)
