"""A joint's error as a share of its range."""

from __future__ import annotations

import math

import numpy as np
import pytest

from duq.compiler.accuracy.joints import NORMAL_RANGE, along_the_chunk, furthest_off, joints_json, working_range
from duq.runtime.preprocess import LeRobotNormalizer, Normalizer


@pytest.mark.parametrize("spread", [0.003, 1.0, 400.0])
def test_the_range_of_a_normal_distribution(spread):
    """From mean and deviation alone, and from percentiles, it is what the samples themselves show."""
    samples = np.random.default_rng(0).normal(7, spread, 200_000)
    shown = np.subtract(*np.percentile(samples, (99, 1))) / samples.std()
    assert shown == pytest.approx(NORMAL_RANGE, rel=0.01)
    stats = {"mean": [7.0], "std": [samples.std()], "q01": [np.percentile(samples, 1)], "q99": [np.percentile(samples, 99)]}
    widths, basis = working_range({"actions": stats}, 1, pi05=False)
    assert widths == pytest.approx([shown]) and "percentile" in basis
    widths, basis = working_range({"actions": stats | {"q01": None}}, 1, pi05=False)
    assert widths == [NORMAL_RANGE] and "standard deviations" in basis


@pytest.mark.parametrize(
    ("stats", "normalizer"),
    [
        ({"q01": [-3.0], "q99": [5.0]}, lambda s: Normalizer(s, "actions", 1, quantiles=True, epsilon=0)),
        ({"mode": "MIN_MAX", "min": [-3.0], "max": [5.0], "epsilon": 0}, lambda s: LeRobotNormalizer(s, "", 1, "lerobot")),
        (
            {"mode": "QUANTILES", "q01": [-3.0], "q99": [5.0], "epsilon": 0},
            lambda s: LeRobotNormalizer(s, "", 1, "lerobot"),
        ),
    ],
)
def test_a_full_range_is_100_percent_by_every_rule(stats, normalizer):
    """Two actions a range of 8 apart, as the policy's own normalizer sees them, are 100 % off."""
    rule = normalizer(stats)
    reference, engine = (rule.normalize(np.full((1, 1, 1), value)) for value in (-3.0, 5.0))
    widths, _ = working_range({"actions": stats}, 1, pi05=True)
    (joint,) = joints_json(["a"], ["m"], widths, (reference, engine), None)
    assert joint["percent_of_range"] == pytest.approx({"rms": 100, "p99": 100, "max": 100})


def test_joints_that_hardly_move_and_policies_without_statistics():
    still = {"mean": [0.0] * 3, "std": [0.0, 1.0, 1.0], "q01": [0.0, 0.0, -0.5], "q99": [0.0, 0.0, 2.5]}
    widths, _ = working_range({"actions": still}, 5, pi05=False)
    assert widths.tolist() == [NORMAL_RANGE, 2, 3, NORMAL_RANGE, NORMAL_RANGE]  # never 0; wider plans than statistics
    for nothing in (None, {}, {"actions": {}}, {"actions": {"mode": "IDENTITY"}}):
        widths, basis = working_range(nothing, 2, pi05=False)  # the strictest
        assert widths.tolist() == [2, 2] and "no normalization" in basis


def test_measures_of_joints_and_of_actions_against_their_formulas():
    random = np.random.default_rng(1)
    reference, error, ranges = random.normal(size=(3, 50, 2)), random.normal(size=(3, 50, 2)), np.array([2.0, 4.0])
    found = joints_json(["a", "b"], ["rad", ""], ranges, (reference, reference + error), (reference, reference + 9 * error))
    for index, joint in enumerate(found):
        own = np.sort(np.abs(error[..., index]).ravel())
        share = joint["percent_of_range"]
        assert share["rms"] == pytest.approx(100 * np.sqrt(np.mean(own**2)) / ranges[index])
        assert share["max"] == pytest.approx(100 * own[-1] / ranges[index])
        assert own[-3] <= joint["normalized"]["p99_error"] <= own[-2]  # one in a hundred of 150 is further off
        assert joint["robot"]["rms_error"] == pytest.approx(9 * joint["normalized"]["rms_error"])
    along = along_the_chunk(reference, reference + error, ranges)
    assert len(along) == 50
    assert along[7] == pytest.approx(100 * np.sqrt(np.mean((error[:, 7] / ranges) ** 2)))


def test_what_is_not_finite_is_the_worst():
    reference, engine = np.zeros((1, 4, 3)), np.ones((1, 4, 3))
    engine[0, 2, 1] = np.nan
    assert furthest_off(reference[0], engine[0]) == 1
    shares = [j["percent_of_range"] for j in joints_json("abc", "   ", np.ones(3), (reference, engine), None)]
    assert all(math.isnan(value) for value in shares[1].values()) and shares[0]["rms"] == pytest.approx(100)
