"""The verdict: what passes, what is worth a look, what fails."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from duq.compiler.accuracy.thresholds import CRITERIA, RESULTS, criteria, judge
from duq.plugins.errors import DuqError


def summary(rms=0.5, p99=1.0, cosine=0.999, keys=20.0) -> dict:
    stages = dict.fromkeys(("image_features", "values", "velocity_at_engine_x", "velocity"), {"sqnr_db": 40.0})
    joints = [
        {"name": "elbow", "percent_of_range": {"rms": 0.1, "p99": 0.2}},
        {"name": "gripper", "percent_of_range": {"rms": rms, "p99": p99}},
    ]
    return {"dimensions": joints, "stages": stages | {"keys": {"sqnr_db": keys}, "actions": {"cosine": cosine}}}


def judged(found: dict, failures=(), made_up=False, by=CRITERIA) -> dict:
    return judge(found, by, failures, made_up)


def test_a_good_engine_passes():
    verdict = judged(summary())
    assert verdict["result"] == "pass" and verdict["reasons"] == []
    assert [check["result"] for check in verdict["checks"]] == ["pass"] * len(CRITERIA)
    assert [check["where"] for check in verdict["checks"]] == ["gripper", "gripper", "", "keys"]


@pytest.mark.parametrize(
    ("name", "measure", "good", "look", "fail"),
    [
        ("joint-error", "rms", 2.0, 2.01, 5.01),
        ("joint-peak", "p99", 10.0, 10.1, 25.1),
        ("cosine", "cosine", 0.99, 0.9899, 0.9499),
        ("stage", "keys", 12.0, 11.9, 5.9),
    ],
)
def test_each_criterion_decides(name, measure, good, look, fail):
    for value, expected in ((good, "pass"), (look, "look"), (fail, "fail"), (math.nan, "fail")):
        verdict = judged(summary(**{measure: value}))
        assert verdict["result"] == expected, value
        (check,) = (each for each in verdict["checks"] if each["name"] == name)
        assert check["result"] == expected and (check["reason"] is None) == (expected == "pass")
        assert verdict["reasons"] == [check["reason"]] * (expected != "pass")


def test_an_infinite_sqnr_passes():
    assert judged(summary(keys=math.inf))["result"] == "pass"


def test_the_verdict_is_the_worst_of_all():
    assert judged(summary(rms=3.0, cosine=0.9))["result"] == "fail"
    assert judged(summary(), failures=["an error is past --max-error 1"])["result"] == "fail"
    assert judged(summary(), made_up=True)["result"] == "look"
    assert judged(summary(cosine=0.5), made_up=True)["result"] == "fail"
    assert len(judged(summary(rms=3.0), ["a bound"], made_up=True)["reasons"]) == 3


def test_other_thresholds():
    by = criteria(["joint-error=0.1,0.4", "cosine=0.5,0.5"])
    assert (
        judged(summary(), by=by)["result"] == "fail" and judged(summary(cosine=0.6), by=by)["checks"][2]["result"] == "pass"
    )
    assert judged(summary(rms=0.3), by=by)["result"] == "look"
    assert criteria() == CRITERIA and CRITERIA["joint-error"].look == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("jerk=1,2", "there is no 'jerk', one of joint-error"),
        ("joint-error", "expected joint-error=LOOK,FAIL"),
        ("joint-error=1", "expected joint-error=LOOK,FAIL"),
        ("joint-error=1,2,3", "expected joint-error=LOOK,FAIL"),
        ("joint-error=one,2", "expected joint-error=LOOK,FAIL"),
        ("joint-error=1,inf", "two finite numbers"),
        ("cosine=nan,0.5", "two finite numbers"),
        ("joint-error=3,2", "FAIL must be at least LOOK, 3"),
        ("cosine=0.9,0.99", "FAIL must be at most LOOK, 0.9"),
    ],
)
def test_thresholds_that_are_none_are_refused(change, said):
    with pytest.raises(DuqError, match="--criterion " + change) as refused:
        criteria([change])
    assert said in str(refused.value)


def test_results_are_in_order():
    assert RESULTS == ("pass", "look", "fail")


def test_the_docs_have_every_criterion_with_its_thresholds():
    page = (Path(__file__).parents[3] / "docs" / "accuracy.md").read_text()
    section = page.partition("## Is my plan good enough?")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([\w-]+)` \| .* \| ([\d.]+) \| ([\d.]+) \|$", section, re.MULTILINE)
    assert [(name, float(look), float(fail)) for name, look, fail in rows] == [
        (name, each.look, each.fail) for name, each in CRITERIA.items()
    ]
