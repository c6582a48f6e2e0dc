"""Files that were edited at random are read, or refused in one line that is a DuqError: quickly, and in little memory."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duq.plugins.errors import DuqError
from tests.fuzz import judge, kinds
from tests.fuzz.kinds import KINDS, check
from tests.fuzz.mutate import _places, damage, edit_json, edit_lines, edit_npz, edit_safetensors, edit_zip

SLOW = {"orbax", "ocdbt"}  # a whole policy is converted each time
EDITS = [40, pytest.param(100, marks=pytest.mark.slow)]  # of the campaign's 1000


@pytest.fixture(scope="session")
def intact(tmp_path_factory):
    """Kind -> a folder with its files; kinds of the same files share one."""
    folders: dict = {}

    def made(name: str):
        make = KINDS[name].make
        if make not in folders:
            folders[make] = tmp_path_factory.mktemp("fuzz") / "files"
            folders[make].mkdir()
            make(folders[make])
        return folders[make]

    return made


@pytest.mark.parametrize("edits", EDITS)
@pytest.mark.parametrize("name", KINDS)
def test_edited_files_are_read_or_refused(name, edits, intact):
    folder = intact(name)
    KINDS[name].read(folder)  # intact, they are read
    ends = set()

    @settings(max_examples=edits // 4 if name in SLOW else edits, deadline=None, derandomize=True, database=None)
    @given(st.integers(0, 10**6))
    def edit(seed: int) -> None:
        ends.add(check(name, folder, seed) is None)

    edit()
    assert False in ends, "no edit was refused"
    KINDS[name].read(folder)  # and they are intact again


def fails_with(error: BaseException):
    def read(folder):
        raise error

    return read


@pytest.mark.parametrize(
    "read, message",
    [
        (fails_with(KeyError("x")), "recipe, seed 3, recipe.yaml: KeyError: 'x'"),
        (fails_with(AssertionError("not finite")), "recipe, seed 3, recipe.yaml: not finite"),
        (fails_with(DuqError("x" * 9999)), "an error of 9999 characters"),
        (fails_with(DuqError("")), "an error of 0 characters"),
        (lambda folder: time.sleep(0.2), "took 0.0 s, 0.[2-9] s of the clock"),
        (lambda folder: np.ones(20_000_000).sum(), "took 0.[12] GB"),
    ],
)
def test_what_must_not_happen_is_noticed(read, message, tmp_path, monkeypatch):
    KINDS["recipe"].make(tmp_path)
    before = (tmp_path / "recipe.yaml").read_bytes()
    monkeypatch.setitem(KINDS, "recipe", replace(KINDS["recipe"], read=read))
    monkeypatch.setattr(judge, "PATIENCE_S", 0.1 if "clock" in message else 60)
    monkeypatch.setattr(judge, "MEMORY", 1 << 26)
    peaks = iter((0, 160_000_000))
    if "GB" in message:  # the process may have had its peak before
        monkeypatch.setattr(judge, "peak", lambda: next(peaks))
    with pytest.raises(AssertionError, match=message):
        check("recipe", tmp_path, 3)
    assert (tmp_path / "recipe.yaml").read_bytes() == before


def test_equal_seeds_make_equal_edits_and_most_edits_change_something(intact):
    document = json.dumps({"a": [1, {"b": None}], "c": {"d": "text", "e": 2.5}}).encode()
    npz = (intact("observations") / "observations.npz").read_bytes()
    tensors = (intact("packs' floats") / "packs" / "float_weights.safetensors").read_bytes()
    for mutate, data in (
        (damage, npz), (edit_json, document), (edit_lines, kinds.RECIPE.encode()), (edit_npz, npz), (edit_zip, npz),
        (edit_safetensors, tensors),
    ):  # fmt: skip
        edits = [mutate(data, Random(seed)) for seed in range(40)]
        assert edits == [mutate(data, Random(seed)) for seed in range(40)]
        assert sum(each != data for each in edits) > 32 and len(set(edits)) > 25, mutate
    assert len(list(_places(json.loads(document)))) == 7
