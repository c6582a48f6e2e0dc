"""tests/support/fingerprint.py sees what a GPU would notice, and nothing else."""

from __future__ import annotations

import json

import pytest

from duq.plugins.nvrtc import compile_text
from tests.support.fingerprint import differences, fingerprint, machine_code

SOURCE = "__global__ void {name}(const float* from, float* to) {{ to[threadIdx.x] = {factor} * from[threadIdx.x]; }}"


def code(tmp_path, name: str, factor: str) -> str:
    cubin = compile_text("a.cu", SOURCE.format(name=name, factor=factor), 86, [name], cache=tmp_path)
    return machine_code(cubin.image, cubin.symbols[name])


def test_machine_code_is_what_is_computed_whatever_its_name(tmp_path):
    assert code(tmp_path, "a", "2.f") == code(tmp_path, "other", "(1.f + 1.f)") != code(tmp_path, "a", "3.f")


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}, []),
        ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}, ["/a/1/b: 2 -> 3"]),
        ({"a": [1]}, {"a": [1, 2]}, ["/a/1: only on one side"]),
        ({"a": 1}, {"b": 1}, ["/a: only on one side", "/b: only on one side"]),
        ([1], [1.0], ["/0: 1 -> 1.0"]),
        ([None], [[]], ["/0: None -> []"]),
    ],
)
def test_differences_are_placed(before, after, found):
    assert differences(before, after) == found


def test_arguments_by_name_are_those_in_order(monkeypatch, tmp_path):
    """A schedule names the arguments of its launches; before, they were a list."""
    cubin = compile_text("a.cu", SOURCE.format(name="a", factor="2.f"), 86, ["a"], cache=tmp_path)
    found = []
    for arguments in ([["w", "scale", 0, 4], 7, None], {"from": ["w", "scale", 0, 4], "depth": 7, "to": None}):
        launch = {"name": "x", "kernel": 0, "args": arguments, "overlap": True}
        schedule = {
            "arena_bytes": 256,
            "kernels": [{"cubin": "cubin/0", "symbol": cubin.symbols["a"], "expression": "a"}],
            "weights": {"scale": [0, 4]},
            "variants": [{"cameras": 1, "prefix": [launch], "step": []}],
        }
        entries = {
            "manifest.json": json.dumps({"target": "cuda", "sm": [86]}).encode(),
            "embedding": b"",
            "cubin/0": cubin.image,
            "weights/scale": b"1234",
            "schedule/sm86.json": json.dumps(schedule).encode(),
        }
        monkeypatch.setattr("tests.support.fingerprint.entries_of", lambda path, entries=entries: entries)
        found.append(fingerprint(tmp_path))
    assert found[0] == found[1] and "overlap" not in found[0]["sm86"]["variants"][0]["prefix"][0]
