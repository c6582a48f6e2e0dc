"""Finds the constants of tools/latency.py from measured launches, and says how far the model is off.

    python -m benchmarks.fit_latency --add 90=profile-90.json      # keep a measured profile, small, in benchmarks/data
    python -m benchmarks.fit_latency                               # fit, write tools/latency.json, and check
    python -m benchmarks.fit_latency --check                       # check what is there
    python -m benchmarks.fit_latency --fit-cameras 1 --check-cameras 3     # write nothing: fit on some, check others

A profile is JSON of an H200: {"1": {"prefix", "denoise", "turn": [prefix, denoise]} in ms, "launches1": [{"program", "name",
"work", "moved", "grid", "threads", "shared", "kernel", "us"}], ...} by the number of cameras, of full-size pi0 with a prompt of
48, `denoise` and `turn` as CudaExecutor has them. "90=" is the SM of the program that ran. Sizes of the launches come from the
compiler, by their names.

A measured time has an event in it, whose cost is what the launches' sum exceeds the graph without events by, in a program
without overlapping launches. Errors are those of times without the event.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.optimize import least_squares

from duq.plugins.gpu import gpu_named
from duq.tools.latency import (
    CONSTANTS,
    MEASURED_ON,
    Constants,
    Launch,
    Sum,
    Terms,
    Timed,
    constants,
    kernel_of,
    sum_of,
    template_of,
    terms,
    time_of,
    time_of_terms,
)

DATA = Path(__file__).parent / "data"
CARDS = {80: "A100", 86: "A40", 87: "Jetson AGX Orin 64 GB", 89: "L40S", 90: "H200", 120: "RTX 5090"}  # that compiled for
GPU = gpu_named(MEASURED_ON)
STEPS = 10
KERNEL_BOUND, SUM_BOUND = 0.20, 0.10

# What is plausible before anything is measured, and by which factor it may be off: cycles, or a ratio to the peak.
PRIORS = {
    "edge": (4500.0, 1.7), "block": (200.0, 2.0), "bytes": (2.5, 1.5), "turn": (2500.0, 2.0), "issue": (17.0, 1.15),
    "reached": (1.3, 1.15), "chain": (300.0, 3.0), "tokens": (150.0, 3.0), "token": (50.0, 2.0), "staged": (100.0, 2.0),
    "rotary": (1500.0, 2.0), "cluster": (1500.0, 2.0), "memory": (3000.0, 2.0),
    "copied": (1.3, 1.5), "merged": (1.3, 1.5),
}  # fmt: skip
PRIORS_OF = {  # a softmax is between the products of attention; wgmma decodes INT4 in between
    ("attention_wgmma", "reached"): (2.5, 1.15),
    ("gemm_large", "issue"): (8.0, 1.3),  # its count has the reads of operands
    ("gemm_large", "staged"): (250.0, 2.0),
    ("attention", "issue"): (20.0, 1.3),
    ("attention_shared", "issue"): (20.0, 1.3),
}
NOISE = 0.05  # of a measured time


Compiled = tuple[str, str, Launch]  # half, name, launch


class Kind(NamedTuple):
    """Launches that are alike, of one half of a call; us: their median, with the event."""

    half: str
    launch: Launch
    count: int
    us: float


class Measured(NamedTuple):
    """A call of a program with so many cameras. Milliseconds are (prefix, all steps)."""

    program: int
    cameras: int
    graph_ms: tuple[float, float]
    in_turn_ms: tuple[float, float]
    kinds: list[Kind]

    @property
    def label(self) -> str:
        return f"SM {self.program}, {self.cameras} camera{'s' * (self.cameras > 1)}"


# The data


def add(program: int, profile: Path) -> Path:
    """Keeps what matters of a profile. Raises ValueError where its launches are not those of full-size pi0."""
    measured, data = json.loads(profile.read_text()), []
    for cameras in (c for c in (1, 2, 3) if f"launches{c}" in measured):
        whole = measured[str(cameras)]
        times = {"graph_ms": [whole["prefix"], whole["denoise"]], "in_turn_ms": whole["turn"]}
        kinds = kinds_of(measured[f"launches{cameras}"], _compiled(program, cameras))
        data.append({"program": program, "cameras": cameras, **times, "kinds": kinds})
    path = DATA / f"launches-sm{program}.json"
    DATA.mkdir(exist_ok=True)
    rows = [
        json.dumps(each | {"kinds": None})[: -len("null}")] + "[\n" + ",\n".join(map(json.dumps, each["kinds"])) + "]}"
        for each in data
    ]
    path.write_text("[" + ",\n".join(rows) + "]\n")
    return path


def kinds_of(launches: Iterable[Mapping[str, Any]], compiled: Iterable[Compiled]) -> list[dict[str, Any]]:
    """Measured launches of a profile by kind, with the sizes of the compiler's. Raises ValueError for one that it does not make."""
    known: dict[tuple[str, str, float], Launch] = {}
    for half, name, launch in compiled:
        known.setdefault((half, _generic(name), launch.work), launch)
    times: dict[tuple[str, str], list[float]] = {}
    for each in launches:
        key = each["program"], _generic(each["name"]), each["work"]
        if key not in known:
            raise ValueError(
                f"{each['program']}: {each['name']} of {each['work']:.0f} operations: the compiler makes no such launch of "
                "full-size pi0"
            )
        shape = {"grid": tuple(each["grid"] or ()), "threads": each["threads"] or 0, "shared": each["shared"] or 0}
        template = template_of(each["kernel"])
        launch = replace(known[key], kernel=each["kernel"], template=template, moved=each["moved"], **shape)
        times.setdefault((each["program"], json.dumps(asdict(launch))), []).append(each["us"])
    return [
        {"half": half, "count": len(us), "us": round(statistics.median(us), 3), **json.loads(launch)}
        for (half, launch), us in times.items()
    ]


def _compiled(program: int, cameras: int) -> Iterator[Compiled]:
    """Of full-size pi0 with few layers, which are alike."""
    from benchmarks.schedules import schedule_for, sizes  # torch

    config = sizes(depth=2, vision_depth=1)
    schedule = schedule_for(config, gpu_named(CARDS[program]))
    (variant,) = (v for v in schedule["variants"] if (v["cameras"], v["prompt"]) == (cameras, 48))
    for half in ("prefix", "step"):
        for launch in variant[half]:
            yield half, launch["name"], Launch.of(launch, kernel_of(schedule, launch))


def _generic(name: str) -> str:
    return re.sub(r"\.layers\.\d+\.", ".layers.*.", name)


def load(folder: Path = DATA) -> list[Measured]:
    """All that is kept."""
    found = []
    for path in sorted(folder.glob("launches-*.json")):
        for each in json.loads(path.read_text()):
            kinds = []
            for row in each["kinds"]:
                half, count, us = (row.pop(name) for name in ("half", "count", "us"))
                kinds.append(Kind(half, Launch(**row | {"grid": tuple(row["grid"])}), count, us))
            times = tuple(each["graph_ms"]), tuple(each["in_turn_ms"])
            found.append(Measured(each["program"], each["cameras"], *times, kinds))
    return found


# The fit


def fit(measured: Iterable[Measured]) -> Constants:
    """The constants that these calls say."""
    measured = list(measured)
    event_us = _event_us(measured)
    asked: dict[str, list[tuple[Terms, float]]] = {}
    rows = []
    for call in measured:
        for kind in call.kinds:
            needs, us = terms(kind.launch, GPU), kind.us - event_us
            asked.setdefault(needs.family, []).append((needs, us))
            if _is_of_rows(needs):
                rows.append((replace(needs, family="rows"), us))
    families = {name: _family(name, pairs) for name, pairs in sorted({**asked, "rows": rows}.items())}
    return _with_whole_calls(measured, families, event_us)


def _is_of_rows(needs: Terms) -> bool:
    return set(needs.counts) == {"block"}


def _event_us(measured: list[Measured]) -> float:
    """What an event adds to a launch: by calls whose launches do not overlap."""
    plain = [call for call in measured if not any(kind.launch.overlap for kind in call.kinds)]
    if not plain:
        raise ValueError("a program without overlapping launches (below SM 90) is needed to know what an event takes")
    over = sum(sum(kind.us * kind.count for kind in call.kinds) - 1e3 * _in_turn_ms(call) for call in plain)
    return over / sum(kind.count for call in plain for kind in call.kinds)


def _in_turn_ms(call: Measured) -> float:
    """Of the prefix and one step."""
    return call.in_turn_ms[0] + call.in_turn_ms[1] / STEPS


def _family(name: str, pairs: list[tuple[Terms, float]]) -> dict[str, float]:
    """Its constants: those that make the squares of relative errors least, held by what is plausible. One that no launch
    needed is what is plausible."""
    names = {"edge", *(count for needs, _ in pairs for count in needs.counts)}
    names |= {"bytes"} if all(_is_of_rows(needs) for needs, _ in pairs) else set()
    names |= {"issue"} if any(needs.instructions for needs, _ in pairs) else set()
    names |= {"reached"} if any(needs.operations for needs, _ in pairs) else set()
    order = sorted(names)
    priors = [PRIORS_OF.get((name, each), PRIORS[each]) for each in order]
    center, width = np.log([value for value, _ in priors]), np.log([factor for _, factor in priors])

    def residuals(logs: np.ndarray) -> np.ndarray:
        found = dict.fromkeys(PRIORS, 0.0) | dict(zip(order, np.exp(logs), strict=True))
        off = [np.log(1e6 * time_of_terms(needs, GPU, {needs.family: found}).seconds / us) / NOISE for needs, us in pairs]
        return np.array([*off, *((logs - center) / width)])

    best = least_squares(residuals, center, bounds=(np.log(1e-2), np.log(1e6)))
    return {each: float(f"{value:.4g}") for each, value in zip(order, np.exp(best.x), strict=True)}


def _with_whole_calls(measured: list[Measured], families: Mapping[str, Any], event_us: float) -> Constants:
    """By calls: what a launch saves that overlaps, and what the prefix loses to what runs beside it."""
    saved = overlapping = 0.0
    shares = []
    for call in measured:
        count = sum(kind.count for kind in call.kinds if kind.launch.overlap)
        alone = sum((kind.us - event_us) * kind.count for kind in call.kinds)
        if count:
            saved, overlapping = saved + alone - 1e3 * _in_turn_ms(call), overlapping + count
    overlap = 1e-6 * saved / overlapping if overlapping else 0.0
    for call in measured:

        def own(kind: Kind) -> float:
            return kind.count * (1e-6 * (kind.us - event_us) - overlap * kind.launch.overlap)

        beside = sum(own(kind) for kind in call.kinds if kind.half == "step" or kind.launch.branch)
        main = sum(own(kind) for kind in call.kinds if kind.half == "prefix" and not kind.launch.branch)
        shares.append((1e-3 * call.graph_ms[0] - main) / beside)
    return Constants(families, overlap, statistics.mean(shares), 1e-6 * event_us)


# The check


class Row(NamedTuple):
    """A kind of launch, or a sum; call: of which calls."""

    call: str
    what: str
    count: int
    measured_us: float
    predicted_us: float

    @property
    def error(self) -> float:
        return self.predicted_us / self.measured_us - 1


def kernel_errors(measured: Iterable[Measured], fitted: Constants) -> list[Row]:
    """Of each kind of launch whose family was fitted, without the event. Launches that are equal in several calls are one
    kind, with the mean of what was measured: they differ by more than an error that the model could have."""
    found: dict[str, list[tuple[str, Kind]]] = {}
    for call in measured:
        for kind in call.kinds:
            if terms(kind.launch, GPU).family in fitted.families:
                found.setdefault(equality(kind.launch), []).append((call.label, kind))
    rows = []
    for same in found.values():
        launch, count = same[0][1].launch, sum(kind.count for _, kind in same)
        us = statistics.mean(kind.us for _, kind in same) - 1e6 * fitted.event
        predicted = 1e6 * time_of(launch, GPU, fitted).seconds
        calls = "; ".join(dict.fromkeys(label for label, _ in same))
        rows.append(Row(calls, launch.kernel, count, us, predicted))
    return rows


def equality(launch: Launch) -> str:
    """Equal for launches that do the same."""
    return json.dumps([launch.kernel, launch.work, launch.moved, launch.grid, launch.threads, launch.shared, launch.sizes])


def sum_errors(measured: Iterable[Measured], fitted: Constants) -> list[Row]:
    """Of prefix and steps, in turn and in the graph, of calls all of whose kernels were fitted."""
    rows = []
    for call in measured:
        if not {terms(kind.launch, GPU).family for kind in call.kinds} <= set(fitted.families):
            continue
        found = predicted_sum(call, fitted)
        for name, ms, predicted in (
            ("prefix in turn", call.in_turn_ms[0], found.prefix_in_turn),
            ("steps in turn", call.in_turn_ms[1], STEPS * found.step_in_turn),
            ("prefix in the graph", call.graph_ms[0], found.prefix),
            ("steps in the graph", call.graph_ms[1], found.steps),
            ("the call", sum(call.graph_ms), found.call),
        ):
            rows.append(Row(call.label, name, 1, 1e3 * ms, 1e6 * predicted))
    return rows


def predicted_sum(call: Measured, fitted: Constants) -> Sum:
    halves: dict[str, list[Timed]] = {"prefix": [], "step": []}
    for kind in call.kinds:
        halves[kind.half] += [(kind.launch, time_of(kind.launch, GPU, fitted))] * kind.count
    return sum_of(halves["prefix"], halves["step"], STEPS, fitted)


def write(fitted: Constants, kernels: list[Row], sums: list[Row]) -> None:
    found = {
        "command": "python -m benchmarks.fit_latency",
        "measured_on": MEASURED_ON,
        "calls": [row.call for row in sums if row.what == "the call"],
        "kernel_error": round(worst(kernels), 3),
        "sum_error": round(worst(sums), 3),
        "event_us": round(1e6 * fitted.event, 3),
        "overlap_us": round(1e6 * fitted.overlap, 3),
        "beside": round(fitted.beside, 3),
    }
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in found.items()]
    families = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in fitted.families.items()]
    CONSTANTS.write_text("{\n" + ",\n".join(lines) + ',\n "families": {\n' + ",\n".join(families) + "\n }\n}\n")


def report(kernels: list[Row], alone: list[Row], sums: list[Row], every: bool) -> bool:
    """Prints errors, of kernels only the worst ones unless `every`; returns whether both bounds hold. alone: kernels of each
    call by itself."""
    for title, rows, bound in (("Kernels", kernels, KERNEL_BOUND), ("Sums", sums, SUM_BOUND)):
        title = f"{title}: {_within(rows, bound)}"
        table = Table("calls", "what", "times", "measured us", "predicted us", "error", title=title, title_justify="left")
        for row in sorted(rows, key=lambda row: -abs(row.error))[: None if every or rows is sums else 12]:
            numbers = f"{row.measured_us:.2f}", f"{row.predicted_us:.2f}", f"{row.error:+.1%}"
            table.add_row(row.call, row.what, str(row.count), *numbers)
        Console(width=160).print(table)
    print(f"Kernels of each call by itself: {_within(alone, KERNEL_BOUND)}")
    return worst(kernels) <= KERNEL_BOUND and worst(sums) <= SUM_BOUND


def _within(rows: list[Row], bound: float) -> str:
    inside = sum(abs(row.error) <= bound for row in rows)
    return f"{inside} of {len(rows)} within {bound:.0%}, the worst {worst(rows):.1%}"


def worst(rows: Iterable[Row]) -> float:
    return max((abs(row.error) for row in rows), default=0.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--add", metavar="SM=PROFILE", action="append", default=[], help="a measured profile to keep")
    parser.add_argument("--check", action="store_true", help="check tools/latency.json, and write nothing")
    parser.add_argument("--fit-cameras", type=int, nargs="+", help="fit calls with so many cameras alone; writes nothing")
    parser.add_argument("--fit-programs", type=int, nargs="+", help="fit these SMs' programs alone; writes nothing")
    parser.add_argument("--check-cameras", type=int, nargs="+", help="check calls with so many cameras alone")
    parser.add_argument("--check-programs", type=int, nargs="+", help="check calls of these SMs' programs alone")
    parser.add_argument("--all", action="store_true", help="print every kernel, not the worst alone")
    args = parser.parse_args()
    for each in args.add:
        program, _, profile = each.partition("=")
        print(add(int(program), Path(profile)))
    measured = load()
    chosen = [c for c in measured if c.cameras in (args.fit_cameras or (1, 2, 3))]
    chosen = [c for c in chosen if c.program in (args.fit_programs or CARDS)]
    fitted = constants() if args.check else fit(chosen)
    checked = [c for c in measured if c.cameras in (args.check_cameras or (1, 2, 3))]
    checked = [c for c in checked if c.program in (args.check_programs or CARDS)]
    kernels, sums = kernel_errors(checked, fitted), sum_errors(checked, fitted)
    if chosen == measured == checked and not args.check:
        write(fitted, kernels, sums)
    alone = [row for call in checked for row in kernel_errors([call], fitted)]
    return 0 if report(kernels, alone, sums, args.all) else 1


if __name__ == "__main__":
    sys.exit(main())
