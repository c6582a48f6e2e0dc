"""Edits of JSON documents: one value somewhere in it becomes another one, goes, or comes twice."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

BOTTOMLESS: Any = []
for _ in range(300):
    BOTTOMLESS = [BOTTOMLESS]
VALUES = (
    None, True, False, 0, -1, 1, 3, 10**9, 2**63, 10**400, 1e308, -1e308, float("nan"), float("inf"), 0.5,
    "", "a", "\x00", "\x1b[2J", "\ud800", "\xe9" * 300,
    [], [[]], {}, {"a": 1}, [None], ["a", 5], ["w", "nothing", 0, 0], [0, 0], [-1, 1, 1], [0] * 5000, BOTTOMLESS,
)  # fmt: skip


def places(data: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every value's place in the document, as keys and indices."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [place, *(found for key, value in inner for found in places(value, (*place, key)))]


@st.composite
def edited(draw: st.DrawFn, document: Any) -> Any:
    """The document with one edit."""
    document = copy.deepcopy(document)
    place = draw(st.sampled_from(places(document)[1:]))
    holder = document
    for key in place[:-1]:
        holder = holder[key]
    match draw(st.sampled_from(["replace", "replace", "delete", "add"])):
        case "replace":
            holder[place[-1]] = draw(st.sampled_from(VALUES))
        case "delete":
            del holder[place[-1]]
        case "add" if isinstance(holder, list):
            holder.append(copy.deepcopy(holder[place[-1]]))
        case "add":
            holder["unknown"] = draw(st.sampled_from(VALUES))
    return document
