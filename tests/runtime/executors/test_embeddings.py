"""Rows of the token table: the file's, read when they are first needed, in memory of their own."""

from __future__ import annotations

import os

import numpy as np
import pytest

from duq.runtime.errors import PlanError
from duq.runtime.executors import embeddings
from duq.runtime.executors.embeddings import Embeddings
from duq.runtime.plan import Plan
from tests.support.plans import CONFIG, write_plan

TABLE = np.random.default_rng(0).integers(0, 1 << 16, (CONFIG.vocab_size, CONFIG.llm.width), np.uint16)


@pytest.fixture
def path(tmp_path):
    write_plan(tmp_path / "engine.plan", {"embedding": TABLE})
    return tmp_path / "engine.plan"


@pytest.mark.parametrize("kept", [1, 60, 4096])
def test_the_rows_of_any_prompts(path, kept, monkeypatch):
    """Also of more tokens than are kept, at once or one after the other."""
    monkeypatch.setattr(embeddings, "KEPT_ROWS", kept)
    table, random = Embeddings(Plan(path)), np.random.default_rng(1)
    for count in (0, 1, CONFIG.max_prompt_tokens, 5, CONFIG.max_prompt_tokens, CONFIG.max_prompt_tokens):
        tokens = random.integers(0, len(TABLE), count)
        np.testing.assert_array_equal(table.rows(tokens), TABLE[tokens])
    np.testing.assert_array_equal(table.rows(np.array([-1, len(TABLE)])), TABLE[[0, -1]])


def test_a_row_is_read_once_and_the_caller_may_write_to_it(path):
    table = Embeddings(Plan(path))
    table.rows(np.array([3, 3, 7]))[:] = 0
    os.truncate(path, 0)
    np.testing.assert_array_equal(table.rows(np.array([7, 3])), TABLE[[7, 3]])
    with pytest.raises(PlanError, match="was written to while in use"):
        table.rows(np.array([3, 4]))
    np.testing.assert_array_equal(table.rows(np.array([3, 7])), TABLE[[3, 7]])


@pytest.mark.parametrize(("entries", "has"), [({}, "None"), ({"embedding": TABLE[1:]}, TABLE[1:].nbytes)])
def test_a_plan_without_the_whole_table(tmp_path, entries, has):
    write_plan(tmp_path / "engine.plan", {"other": b""} | entries)
    with pytest.raises(PlanError, match=f"entry embedding has {has} bytes, not {TABLE.nbytes}; compile it again"):
        Embeddings(Plan(tmp_path / "engine.plan"))
