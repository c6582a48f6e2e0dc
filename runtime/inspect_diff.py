"""What differs between two plans: settings, linears, launches, sizes. For `duq-inspect A.plan --diff B.plan`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table

from duq.runtime.executors.schedule import read_schedule
from duq.runtime.inspect import human_size, launch_rows, settings_rows
from duq.runtime.plan import Plan

ABSENT = "-"
LISTED = ("target", "sm", "gpu", "cameras", "float_images", "timing", "loop", "float_type", "created_by")

Pair = list[Any]  # of the first plan and of the second


def differences(first: Plan, second: Plan) -> dict[str, Any]:
    """In JSON types, each value a pair; a section is empty where nothing differs.

    "settings", "plan", "recipe": by name. "linears": by name, with the op, or "SQNR" alone. "launches": by schedule, kernel
    and what it computes, their numbers. "bytes": of the file, and of the entries by kind.
    """
    return {
        "settings": _unequal(_settings(first), _settings(second)),
        "plan": _unequal(_listed(first), _listed(second)),
        "recipe": _unequal(_recipe(first), _recipe(second)),
        "linears": _unequal(_linears(first), _linears(second)),
        "launches": _unequal(_launches(first), _launches(second), absent=0),
        "bytes": _unequal(_sizes(first), _sizes(second), absent=0),
    }


def difference_tables(found: Mapping[str, Mapping[str, Pair]], first: str, second: str) -> list[Table]:
    """The differences for people: one table a section that has any. Linears and launches are summed over layers."""
    rows = {
        "Settings": found["settings"].items(),
        "Plan": found["plan"].items(),
        "Recipe": found["recipe"].items(),
        "Linears": _over_layers(found["linears"]),
        "Launches": found["launches"].items(),
        "Sizes": ((name, [human_size(each) for each in pair]) for name, pair in found["bytes"].items()),
    }
    tables = (_table(title, cells, first, second) for title, cells in rows.items())
    return [table for table in tables if table.row_count]


def _unequal(first: Mapping[str, Any], second: Mapping[str, Any], absent: Any = None) -> dict[str, Pair]:
    pairs = {name: [first.get(name, absent), second.get(name, absent)] for name in {**first, **second}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _settings(plan: Plan) -> dict[str, str]:
    return {name: value for name, value, _ in settings_rows(plan.manifest)}


def _listed(plan: Plan) -> dict[str, Any]:
    made_from = (plan.manifest.get("checkpoint") or {}).get("fingerprint")
    return {name: plan.manifest[name] for name in LISTED if name in plan.manifest} | {"checkpoint": made_from}


def _recipe(plan: Plan) -> dict[str, Any]:
    return _quantization(plan).get("recipe") or {}


def _quantization(plan: Plan) -> dict[str, Any]:
    return plan.manifest.get("quantization") or {}


def _linears(plan: Plan) -> dict[str, str]:
    """Each quantized linear's op and SQNR, as one text: "W4A8, 21.3 dB"."""
    found = {}
    for name, linear in (_quantization(plan).get("linears") or {}).items():
        op, sqnr = str(linear.get("op")).removeprefix("duq::").removesuffix("Linear"), linear.get("sqnr_db")
        found[name] = op if sqnr is None else f"{op}, {sqnr:.1f} dB"
    return found


def _launches(plan: Plan) -> dict[str, int]:
    """ "schedule, part, what, kernel" -> launches at the largest size, over all layers."""
    counts: Counter[str] = Counter()
    for name in plan.names:
        if name.startswith("schedule/"):
            for part, computes, kernel, _, _ in launch_rows(read_schedule(plan, name), each_layer=False):
                counts[f"{name.removeprefix('schedule/').removesuffix('.json')} {part}: {computes}, {kernel}"] += 1
    return dict(counts)


def _sizes(plan: Plan) -> dict[str, int]:
    sizes = Counter({"file": plan.path.stat().st_size})
    for name, entry in plan.manifest["entries"].items():
        sizes[name if "/" not in name else f"{name.partition('/')[0]}/"] += entry["bytes"]
    return dict(sizes)


def _over_layers(linears: Mapping[str, Pair]) -> Iterable[tuple[str, Pair]]:
    """Linears of all layers that differ alike, as one row; those whose SQNR alone differs, as one a kind."""
    groups: dict[tuple[str, tuple[str, ...]], list[Pair]] = {}
    for name, pair in linears.items():
        ops = tuple("float" if each is None else str(each).partition(",")[0] for each in pair)
        groups.setdefault((re.sub(r"\.layers\.\d+\.", ".layers.*.", name), ops), []).append(pair)
    for (name, ops), pairs in groups.items():
        yield f"{name} ({len(pairs)})", [_worst(op, [pair[side] for pair in pairs]) for side, op in enumerate(ops)]


def _worst(op: str, texts: Iterable[str | None]) -> str:
    """The op with the least SQNR that is among the texts."""
    found = [float(match[1]) for text in texts if text and (match := re.search(r", (\S+) dB", text))]
    return f"{op}, worst {min(found):.1f} dB" if found else op


def _table(title: str, rows: Iterable[tuple[str, Pair]], first: str, second: str) -> Table:
    table = Table("", first, second, title=title, title_justify="left")
    for name, pair in rows:
        table.add_row(name, *(ABSENT if each in (None, 0) and each is not False else str(each) for each in pair))
    return table
