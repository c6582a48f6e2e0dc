"""Whether an engine is good enough: the verdict by default criteria, and bounds of the user's own.

docs/accuracy.md gives the reasons for the criteria's thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from duq.plugins.errors import DuqError

RESULTS = ("pass", "look", "fail")  # from good to bad
INNER_STAGES = ("image_features", "keys", "values", "velocity_at_engine_x", "velocity")
MADE_UP = "the observations are made up; judge a plan on your robot's (--observations)"


@dataclass(frozen=True)
class Measured:
    """A value of a criterion, and of what: the joint, say."""

    value: float
    where: str = ""


@dataclass(frozen=True)
class Criterion:
    """Something that a good engine keeps small, or large. A value past `look` is worth a look, one past `fail` fails.

    title and unit say what `measure` takes from a comparison's summary.
    """

    title: str
    unit: str
    look: float
    fail: float
    measure: Callable[[Mapping], Measured]
    larger_is_better: bool = False

    @property
    def short_unit(self) -> str:
        """Without what it is a share of."""
        return self.unit.partition(" ")[0]

    def result(self, value: float) -> str:
        """Of RESULTS. NaN fails."""
        sign = -1 if self.larger_is_better else 1
        if not sign * value <= sign * self.fail:
            return "fail"
        return "pass" if sign * value <= sign * self.look else "look"


def _badness(error: float) -> float:
    """To find the worst by: what is not finite is worse than everything."""
    return math.inf if math.isnan(error) else error


def _worst_joint(share: str) -> Callable[[Mapping], Measured]:
    def measure(summary: Mapping) -> Measured:
        shares = [joint["percent_of_range"][share] for joint in summary["dimensions"]]
        worst = max(range(len(shares)), key=lambda index: _badness(shares[index]))
        return Measured(shares[worst], summary["dimensions"][worst]["name"])

    return measure


def _cosine(summary: Mapping) -> Measured:
    return Measured(summary["stages"]["actions"]["cosine"])


def _worst_stage(summary: Mapping) -> Measured:
    found = {name: summary["stages"][name]["sqnr_db"] for name in INNER_STAGES}
    worst = max(found, key=lambda name: _badness(-found[name]))
    return Measured(found[worst], worst.replace("_", " "))


CRITERIA = {
    "joint-error": Criterion("RMS error, worst joint", "% of its range", 2.0, 5.0, _worst_joint("rms")),
    "joint-peak": Criterion("99th percentile of the error, worst joint", "% of its range", 10.0, 25.0, _worst_joint("p99")),
    "cosine": Criterion("cosine of the actions", "", 0.99, 0.95, _cosine, larger_is_better=True),
    "stage": Criterion("SQNR, worst stage", "dB", 12.0, 6.0, _worst_stage, larger_is_better=True),
}


def criteria(changes: Sequence[str] = ()) -> dict[str, Criterion]:
    """CRITERIA with other thresholds: "joint-error=1,3" looks past 1 and fails past 3.

    Raises DuqError for an unknown name, for what are not two finite numbers, and for a `fail` stricter than its `look`.
    """
    found = dict(CRITERIA)
    for change in changes:
        name, _, bounds = change.partition("=")
        if name not in found:
            raise DuqError(f"--criterion {change}: there is no {name!r}, one of {', '.join(CRITERIA)}")
        try:
            look, fail = (float(bound) for bound in bounds.split(","))
        except ValueError:
            look = fail = math.nan
        if not (math.isfinite(look) and math.isfinite(fail)):
            raise DuqError(f"--criterion {change}: expected {name}=LOOK,FAIL with two finite numbers")
        changed = replace(found[name], look=look, fail=fail)
        if changed.result(look) == "fail":
            order = "at most" if changed.larger_is_better else "at least"
            raise DuqError(f"--criterion {change}: FAIL must be {order} LOOK, {look:g}")
        found[name] = changed
    return found


def judge(summary: Mapping, by: Mapping[str, Criterion], failures: Sequence[str], made_up: bool) -> dict:
    """The verdict in JSON types.

    "result": one of RESULTS, the worst of all; "reasons": a line for everything that is not a pass; "checks": by criterion
    its "name", "title", "unit", "look", "fail", the "value" and "where" found, the "result", and its "reason" if not a pass.
    failures: bounds of the user's that are broken. made_up: a plan cannot pass on observations that are no robot's.
    """
    checks = [_check(name, criterion, criterion.measure(summary)) for name, criterion in by.items()]
    results = ["fail"] * bool(failures) + ["look"] * made_up + [check["result"] for check in checks]
    reasons = [*failures, *(check["reason"] for check in checks if check["reason"]), *[MADE_UP] * made_up]
    return {"result": max(results, key=RESULTS.index), "reasons": reasons, "checks": checks}


def _check(name: str, criterion: Criterion, found: Measured) -> dict:
    known = {key: value for key, value in vars(criterion).items() if key != "measure"} | {
        "short_unit": criterion.short_unit
    }
    result = criterion.result(found.value)
    reason = None if result == "pass" else _reason(criterion, found, result)
    return {"name": name, **known, **asdict(found), "result": result, "reason": reason}


def _reason(criterion: Criterion, found: Measured, result: str) -> str:
    where = f" ({found.where})" if found.where else ""
    side = "at least" if criterion.larger_is_better else "at most"
    bound = with_unit(criterion.fail if result == "fail" else criterion.look, criterion.short_unit, digits="g")
    return f"{criterion.title}{where}: {with_unit(found.value, criterion.unit)}, expected {side} {bound}"


def with_unit(value: float, unit: str, digits: str = "") -> str:
    """As in 1.23% and 18.4 dB: three significant digits, or five places of what has no unit, a cosine; or by `digits`."""
    if math.isnan(value):
        return "not finite"
    shown = format(value, digits or (".3g" if unit else ".5f"))
    return f"{shown} {unit}".rstrip().replace(" %", "%")


@dataclass(frozen=True)
class Thresholds:
    """Bounds which the actions of every observation have to keep; None is no bound.

    All are on the normalized actions that the robot reads, but max_robot_error, which is in the robot's units and on the
    observations that are a robot's. DuqError for a bound that is not finite, which would always or never be kept.
    """

    min_cosine: float | None = None
    max_error: float | None = None
    min_sqnr: float | None = None
    max_robot_error: float | None = None

    def __post_init__(self) -> None:
        for name, bound in vars(self).items():
            if bound is not None and not math.isfinite(bound):
                raise DuqError(f"--{name.replace('_', '-')} {bound}: must be a finite number")

    def failures(self, observations: Sequence[Mapping]) -> list[str]:
        """A line for each bound that is broken, about the observation that breaks it most. NaN breaks every bound."""
        failures = []
        for stage, key, bound, sign, flag in (
            ("actions", "cosine", self.min_cosine, 1, "--min-cosine"),
            ("actions", "max_error", self.max_error, -1, "--max-error"),
            ("actions", "sqnr_db", self.min_sqnr, 1, "--min-sqnr"),
            ("robot_actions", "max_error", self.max_robot_error, -1, "--max-robot-error"),
        ):
            measured = {index: each[stage] for index, each in enumerate(observations) if each.get(stage)}
            if bound is None or not measured:
                continue
            worst = max(measured, key=lambda index: _badness(-sign * measured[index][key]))
            found = measured[worst][key]
            if not sign * found >= sign * bound:
                where = f" ({measured[worst]['worst_dimension']})" if stage == "robot_actions" else ""
                name = stage.replace("_", " ")
                failures.append(f"{name} of observation {worst}: {key} {found:.6g}{where} is past {flag} {bound:g}")
        for index, observation in enumerate(observations):
            if math.isnan(observation["actions"]["cosine"]):
                failures.append(f"actions of observation {index} are not finite")
        return failures
